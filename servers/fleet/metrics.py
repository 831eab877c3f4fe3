"""The fleet's numbers in Prometheus' text format."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .scheduler import JobScheduler

KIND = "text/plain; version=0.0.4; charset=utf-8"
COUNTED = {
    "accepted": "Orders taken in.",
    "completed": "Jobs that ended with a result.",
    "failed": "Jobs that ended with an error.",
    "cancelled": "Jobs that were cancelled.",
    "expired": "Ended jobs deleted for their age.",
    "refused_full": "Orders refused because the queue was full.",
    "refused_memory": "Orders refused because their plan exceeds a worker's memory.",
    "refused_token": "Requests without the right token.",
    "workers_lost": "Attempts that ended with the loss of their worker.",
    "taken_up_again": "Running jobs queued again after a restart of the scheduler.",
}


def text(scheduler: JobScheduler) -> bytes:
    """Counters outlive a restart; gauges are of this moment."""
    from prometheus_client import CollectorRegistry, generate_latest
    from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily

    class Now:
        def collect(self):
            counters = scheduler.store.counters()
            for name, what in COUNTED.items():
                yield CounterMetricFamily(f"frugal_fleet_{name}", what, value=counters.get(name, 0))
            kept = GaugeMetricFamily(
                "frugal_fleet_jobs", "Jobs in the store, by status.", labels=["status"]
            )
            for status, count in scheduler.store.counts().items():
                kept.add_metric([status], count)
            yield kept
            for name, what, value in (
                ("queue_limit", "Jobs that may be open at once.", scheduler.rules.queue),
                ("result_bytes", "Bytes of all kept results.", scheduler.store.bytes_kept()),
                ("worker_memory_bytes", "Memory orders are held against.", scheduler.memory),
            ):
                yield GaugeMetricFamily(f"frugal_fleet_{name}", what, value=value)

    registry = CollectorRegistry()
    registry.register(Now())  # type: ignore[arg-type]
    return generate_latest(registry)
