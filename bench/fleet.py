"""A fleet under losses: every accepted job ends once, whatever is killed.

`python bench/fleet.py RESULTS.json TREE` starts a real fleet (Ray Serve, two ComfyUI on the CPU),
hands in 100 small jobs, 16 at a time, kills a worker's ComfyUI at random moments and Serve's
controller once, sends bursts into the full queue, and restarts the fleet on the same store. The
jobs are small pictures and four seconds of waiting: nothing here is about speed.
"""

from __future__ import annotations

import asyncio
import hashlib
import io
import json
import random
import sys
import tempfile
import time
from pathlib import Path

import harness

JOBS, AT_ONCE, QUEUE, KILLS, SEED = 100, 16, 20, 5, 7
WAIT_SECONDS, PATIENCE = 4.0, 1800.0
ROUNDS = 40
WORDS, TRIES = ("--queue", str(QUEUE), "--job-seconds", "120"), 10


def graph(number: int) -> bytes:
    return json.dumps(
        {
            "1": {
                "class_type": "EmptyImage",
                "inputs": {"width": 64, "height": 64, "batch_size": 1, "color": 1000 * number},
            },
            "2": {
                "class_type": "ImageScale",
                "inputs": {
                    "image": ["1", 0], "upscale_method": "nearest-exact", "width": 256,
                    "height": 256, "crop": "disabled",
                },
            },
            "3": {
                "class_type": "SaveImage",
                "inputs": {"images": ["2", 0], "filename_prefix": "p"},
            },
            "4": {"class_type": "FleetTestWait", "inputs": {"value": str(WAIT_SECONDS)}},
        }
    ).encode()  # fmt: skip


def color_of(data: bytes) -> int:
    from PIL import Image

    red, green, blue = Image.open(io.BytesIO(data)).convert("RGB").getpixel((128, 128))
    return (red << 16) + (green << 8) + blue


def listens(process) -> bool:
    import psutil

    try:
        return any(each.status == psutil.CONN_LISTEN for each in process.net_connections("tcp"))
    except psutil.Error:
        return False


class Losses:
    """Kills at random moments while jobs run, and writes down what."""

    def __init__(self, fleet, dice: random.Random):
        self.fleet, self.dice, self.told = fleet, dice, []
        self.began = time.monotonic()

    async def go(self) -> None:
        for turn in range(KILLS):
            await asyncio.sleep(self.dice.uniform(4, 12))
            if turn == KILLS // 2:
                for controller in self.fleet.named("ray::ServeController"):
                    self._kill("Serve's controller", controller)
                await asyncio.sleep(self.dice.uniform(4, 12))
            for _ in range(600):
                # One that is starting has no job to lose.
                ready = [each for each in self.fleet.comfys() if listens(each)]
                if len(ready) > 1:
                    self._kill("a worker's ComfyUI", self.dice.choice(ready))
                    break
                await asyncio.sleep(0.5)

    def _kill(self, what: str, process) -> None:
        process.kill()
        self.told.append({"second": round(time.monotonic() - self.began, 1), "killed": what})


async def burst(client, number: int) -> dict[str, int]:
    """As many orders at once as the queue holds twice over: what they were answered."""
    import aiohttp

    async def one(session, each):
        form = aiohttp.FormData(default_to_multipart=True)
        form.add_field("workflow", graph(number + each))
        async with session.post(f"{client.server.base}/v1/jobs", data=form) as answer:
            said = await answer.json()
            if answer.status == 503:
                assert int(answer.headers["Retry-After"]) >= 1, said
            return answer.status, said.get("id")

    async with aiohttp.ClientSession(headers=client.server.headers) as session:
        told = await asyncio.gather(*(one(session, each) for each in range(2 * QUEUE)))
    for _, job in told:
        if job:
            await client.cancel(job)
    counts = [status for status, _ in told]
    return {str(status): counts.count(status) for status in sorted(set(counts))}


def memory(fleet) -> dict[str, int]:
    """Resident MB of the workers, of the scheduler's process."""
    workers = sorted(each.memory_info().rss // 10**6 for each in fleet.comfys())
    scheduler = [
        each.memory_info().rss // 10**6 for each in fleet.named("ray::ServeReplica:fleet:scheduler")
    ]
    return {"workers": workers, "scheduler": scheduler[0] if scheduler else 0}


async def steady(client, fleet) -> dict[str, object]:
    """Memory before and after a number of jobs without losses."""
    jobs = [await client.submit(graph(n), {}, f"warm-{n}", patience=PATIENCE) for n in range(8)]
    for job in jobs:
        await client.wait(job["id"], PATIENCE)
    before = memory(fleet)
    room = asyncio.Semaphore(AT_ONCE)

    async def one(number):
        async with room:
            job = await client.submit(graph(number), {}, f"flat-{number}", patience=PATIENCE)
            return (await client.wait(job["id"], PATIENCE))["status"]

    told = await asyncio.gather(*(one(number) for number in range(ROUNDS)))
    return {"jobs": ROUNDS, "completed": told.count("completed"), "rss_mb_before": before,
            "rss_mb_after": memory(fleet)}  # fmt: skip


async def under_losses(client, fleet, folder: Path) -> dict[str, object]:
    """The 100 jobs."""
    dice = random.Random(SEED)
    room, losses = asyncio.Semaphore(AT_ONCE), Losses(fleet, dice)

    async def one(number):
        async with room:
            key = f"loss-{number}"
            job = await client.submit(graph(number), {}, key, patience=PATIENCE)
            return await client.wait(job["id"], PATIENCE)

    began = time.monotonic()
    killer = asyncio.ensure_future(losses.go())
    done = await asyncio.gather(*(one(number) for number in range(JOBS)))
    seconds = time.monotonic() - began
    killer.cancel()
    await asyncio.gather(killer, return_exceptions=True)
    right = 0
    for number, job in enumerate(done):
        if job["status"] == "completed":
            (path,) = await client.fetch(job, folder / str(number))
            right += color_of(path.read_bytes()) == 1000 * number
    ids = {job["id"] for job in done}
    listed = [job for job in (await client.jobs(limit=1000)) if job["key"].startswith("loss-")]
    statuses = [job["status"] for job in done]
    return {
        "jobs": JOBS,
        "at_once": AT_ONCE,
        "killed": losses.told,
        "ended": {status: statuses.count(status) for status in sorted(set(statuses))},
        "different_jobs": len(ids),
        "jobs_listed_for_these_keys": len(listed),
        "results_with_the_right_picture": right,
        "attempts": sum(job["attempts"] for job in done),
        "errors": [job["error"] for job in done if job["error"]],
        "seconds": round(seconds, 1),
    }


def digests(client, fleet) -> dict[str, str]:
    """key -> SHA-256 of the result, of all completed jobs with a key."""

    async def main():
        async with client() as fresh:
            found = {}
            with tempfile.TemporaryDirectory() as folder:
                for job in await fresh.jobs("completed", 1000):
                    if job["key"]:
                        (path,) = await fresh.fetch(job, Path(folder) / job["id"])
                        found[job["key"]] = hashlib.sha256(path.read_bytes()).hexdigest()
            return found

    return asyncio.run(main())


def main(results: Path, tree: Path) -> None:
    harness.enter("none")
    import ray

    from frugal.servers.fleet.client import FleetClient
    from frugal.tests.helpers.fleet_process import fleet_process

    with tempfile.TemporaryDirectory(prefix="frugal-fleet-") as place:
        folder = Path(place)
        with fleet_process(tree, folder, *WORDS, tries=TRIES) as fleet:
            began = time.monotonic()
            fleet.wait()
            up = time.monotonic() - began

            def client():
                return FleetClient(fleet.url, fleet.token)

            async def first():
                async with client() as running:
                    flat = await steady(running, fleet)
                    told = await under_losses(running, fleet, folder / "got")
                    refused = await burst(running, JOBS)
                    return flat, told, refused, (await running.fleet())["counters"]

            flat, told, refused, counters = asyncio.run(first())
            before = digests(client, fleet)
            left = fleet.stop()
            fleet.start()
            fleet.wait_for_http()
            time.sleep(5)
            after = digests(client, fleet)
    harness.write(
        results,
        {
            "commit": harness.commit(),
            "comfyui": tree.name,
            "ray": ray.__version__,
            "note": "CPU, two cores shared with other work: seconds are upper bounds",
            "start_seconds": round(up, 1),
            "steady": flat,
            "losses": told,
            "burst_into_a_queue_of": {"queue": QUEUE, "orders": 2 * QUEUE, "answers": refused},
            "counters": counters,
            "restart": {
                "processes_left": left,
                "results_before": len(before),
                "results_the_same_after": sum(
                    after.get(key) == text for key, text in before.items()
                ),
            },
        },
    )


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
