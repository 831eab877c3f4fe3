"""The Ray Serve application: one scheduler, one ComfyUI in each worker replica.

A worker's process and its ComfyUI end together, whichever ends first; Serve then starts another
one. The scheduler alone keeps state, on disk, so that losing any process loses no accepted job.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from ...kernels.errors import FrugalError
from .job_request import JobRequest
from .scheduler import Event, JobScheduler, Limits, Rules
from .store import Store

# Requests that ask for a state while others hand in files.
ASKING = 500
LOOK = 0.5


@dataclass(frozen=True)
class Fleet(Limits):
    """Everything that a fleet is started with; the fields are also the arguments of `build`.

    comfyui, python, comfy_arguments: what a worker runs. store: folder of the jobs, on a disk that
    outlives the scheduler. work: folder of the workers' own files. workers, most_workers: replicas,
    the latter for autoscaling. gpus, cpus: what Ray reserves per worker. store_resource: name of a
    Ray resource that only the machine with the store has. token_env: the variable that holds the
    token where the application is built; or token_hash, its SHA-256 as hex. The rest: see Limits.
    """

    comfyui: str
    store: str
    work: str
    python: str = ""
    comfy_arguments: tuple[str, ...] = ()
    workers: int = 1
    most_workers: int = 0
    gpus: float = 1.0
    cpus: float = 1.0
    store_resource: str = ""
    token_env: str = ""
    token_hash: str = ""
    largest_request: int = 256 * 10**6

    def rules(self) -> Rules:
        """The part of it that the scheduler goes by."""
        limits = {each.name: getattr(self, each.name) for each in fields(Limits)}
        return Rules(**limits, at_once=2 * max(self.workers, self.most_workers) + 2)


class Worker:
    """One ComfyUI."""

    async def __init__(self, fleet: Fleet):
        from .worker_process import Comfy, Recipe

        self.comfy = Comfy(
            Recipe(
                comfyui=fleet.comfyui,
                base=fleet.work,
                python=fleet.python,
                arguments=tuple(fleet.comfy_arguments),
                cpu=not fleet.gpus,
                job_seconds=fleet.job_seconds,
                secrets=(fleet.token_env,),
            )
        )
        try:
            await self.comfy.start()
        except BaseException:
            await self.comfy.stop()
            raise
        self._watcher = asyncio.ensure_future(self._watch())

    async def _watch(self) -> None:
        assert self.comfy.process is not None
        await self.comfy.process.wait()
        # Without its ComfyUI this process could only refuse jobs. Gone at once, none is sent here.
        self.comfy.place.remove()
        os._exit(1)

    async def run(self, job: str, order: JobRequest) -> AsyncIterator[Event]:
        """Events of one order."""
        from .worker_process import LostError

        try:
            async for event in self.comfy.run(job, order):
                yield event
        except LostError:
            process = self.comfy.process
            if process is not None and process.returncode is None:
                process.kill()
            raise

    async def facts(self) -> Mapping[str, Any]:
        """Its name and memory in bytes."""
        return {"worker": self.comfy.name, "memory": self.comfy.memory}

    async def check_health(self) -> None:
        """Raises when its ComfyUI is gone."""
        if not self.comfy.alive():
            raise RuntimeError("ComfyUI has ended")

    async def __del__(self) -> None:
        comfy = getattr(self, "comfy", None)
        if comfy is not None and hasattr(self, "_watcher"):
            self._watcher.cancel()
            await comfy.stop()


class FrontDesk:
    """The one replica that answers requests and keeps the store."""

    async def __init__(self, fleet: Fleet, workers: Any):
        self.fleet, self.workers = fleet, workers
        self.scheduler = JobScheduler(Store(Path(fleet.store)), self._run, fleet.rules())
        self.scheduler.open()
        self._greeting = asyncio.ensure_future(self._greet())

    async def _run(self, job: str, order: JobRequest) -> AsyncIterator[Event]:
        events = self.workers.options(stream=True).run.remote(job, order)
        try:
            async for event in events:
                yield event
        finally:
            # Ends the graph when the caller has gone; nothing happens to a call that has ended.
            events.cancel()

    async def _greet(self) -> None:
        # Until the first worker has said its memory no plan can be judged.
        while not self.scheduler.memory:
            try:
                facts = await self.workers.facts.remote()
                self.scheduler.seen(facts["worker"], facts["memory"])
                return
            except Exception:
                await asyncio.sleep(LOOK)


def build(arguments: Mapping[str, Any]) -> Any:
    """The Serve application; `arguments` are the fields of Fleet. This is what a Serve config file
    names as import_path.
    """
    from ray import serve

    from .http import application, hashed
    from .token import from_environment

    known = {each.name for each in fields(Fleet)}
    if unknown := sorted(set(arguments) - known):
        raise FrugalError(
            f"unknown arguments {', '.join(unknown)}",
            ", ".join(sorted(known)),
            "correct the Serve config",
        )
    fleet = Fleet(**arguments)
    if fleet.token_env:
        fleet = replace(fleet, token_hash=hashed(from_environment(fleet.token_env)))
    if not fleet.token_hash:
        raise FrugalError(
            "a fleet without a token", "token_env, a variable that holds one", "set token_env"
        )
    resources = {fleet.store_resource: 0.001} if fleet.store_resource else {}
    most = max(fleet.workers, fleet.most_workers)
    scaling: dict[str, Any] = {"num_replicas": fleet.workers}
    if most > fleet.workers:
        scaling = {
            "autoscaling_config": {
                "min_replicas": fleet.workers,
                "max_replicas": most,
                "target_ongoing_requests": 1,
            }
        }
    workers = serve.deployment(
        Worker,
        name="worker",
        max_ongoing_requests=1,
        # The scheduler bounds the queue; a second bound here could only break its promises.
        max_queued_requests=-1,
        health_check_period_s=3,
        health_check_timeout_s=30,
        graceful_shutdown_timeout_s=15,
        ray_actor_options={"num_cpus": fleet.cpus, "num_gpus": fleet.gpus},
        **scaling,
    )

    def pages() -> Any:
        return application(
            lambda: serve.get_replica_context().servable_object.scheduler,
            fleet.token_hash,
            fleet.largest_request,
        )

    scheduler = serve.deployment(
        serve.ingress(pages)(FrontDesk),
        name="scheduler",
        num_replicas=1,
        max_ongoing_requests=ASKING,
        health_check_period_s=3,
        health_check_timeout_s=30,
        ray_actor_options={"num_cpus": 0, "resources": resources},
    )
    return scheduler.bind(fleet, workers.bind(fleet))
