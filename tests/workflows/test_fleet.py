"""A whole fleet as a person starts it: Ray Serve and two real ComfyUI, with losses."""

from __future__ import annotations

import asyncio
import contextlib
import io
import json
import urllib.error
import urllib.request

import aiohttp
import psutil
import pytest
from PIL import Image

pytest.importorskip("ray")
from frugal.kernels.errors import FrugalError
from frugal.servers.fleet.client import FleetClient
from frugal.tests.helpers.fleet import picture_graph
from frugal.tests.helpers.fleet_process import fleet_process
from frugal.tests.helpers.patience import HANG, comes, until

JOBS, QUEUE = 12, 16


@pytest.fixture(scope="module")
def fleet(comfy_tree, tmp_path_factory):
    trees = sorted(path.parent.name for path in comfy_tree.parent.glob("*/main.py"))
    if comfy_tree.name != trees[0]:
        pytest.skip("once is enough: test_fleet_worker.py runs with every ComfyUI")
    folder = tmp_path_factory.mktemp("fleet")
    limits = ("--queue", str(QUEUE), "--job-seconds", str(HANG))
    with fleet_process(comfy_tree, folder, *limits) as running:
        running.wait()
        yield running


def graph(color, gate=None):
    """A picture; gate: made no sooner than this file is there."""
    made = picture_graph(color)
    if gate:
        made["3"] = {"class_type": "TestWait", "inputs": {"value": str(gate)}}
    return json.dumps(made).encode()


def color_of(data):
    red, green, blue = Image.open(io.BytesIO(data)).convert("RGB").getpixel((0, 0))
    return (red << 16) + (green << 8) + blue


def test_it_answers_on_loopback_and_says_what_ray_opens(fleet):
    said = fleet.said()
    assert "ATTENTION: Ray itself opens ports on ALL network interfaces" in said
    assert "They ask for Ray's token" in said
    told = {int(line.split()[-1]) for line in said.splitlines() if "open to the network" in line}
    everywhere, own = set(), set()
    for process in fleet.processes():
        for each in process.net_connections("inet"):
            if each.status == psutil.CONN_LISTEN and each.laddr.ip in ("0.0.0.0", "::"):
                everywhere.add(each.laddr.port)
            if each.status == psutil.CONN_LISTEN and each.laddr.port == fleet.port:
                own.add(each.laddr.ip)
    assert own == {"127.0.0.1"}
    assert told & everywhere and fleet.port not in everywhere


def test_no_answer_without_the_token(fleet):
    for key in ("", "Bearer wrong", f"Bearer {fleet.token}x"):
        request = urllib.request.Request(f"{fleet.url}/v1/jobs", headers={"Authorization": key})
        with pytest.raises(urllib.error.HTTPError) as error:
            urllib.request.urlopen(request)
        assert error.value.code == 401


def test_every_job_ends_once_though_a_worker_is_killed(fleet):
    gate = fleet.folder / "first-gate"
    inside = gate.with_suffix(".inside")

    async def main():
        async with FleetClient(fleet.url, fleet.token) as client:
            sent = [client.submit(graph(n, gate), {}, f"job-{n}") for n in range(JOBS)]
            jobs = await asyncio.gather(*sent)
            await comes(inside.exists, fleet.told)
            (victim,) = [each for each in fleet.comfys() if each.pid == int(inside.read_text())]
            victim.kill()
            gate.touch()
            done = [await client.wait(job["id"], HANG) for job in jobs]
            assert [job["status"] for job in done] == ["completed"] * JOBS
            # Once, and the right one.
            again = [await client.submit(graph(n, gate), {}, f"job-{n}") for n in range(JOBS)]
            assert [job["id"] for job in again] == [job["id"] for job in jobs]
            for number, job in enumerate(done):
                (path,) = await client.fetch(job, fleet.folder / "got" / str(number))
                assert color_of(path.read_bytes()) == number
            told = await client.fleet()
            assert told["counters"]["accepted"] == told["counters"]["completed"] == JOBS
            assert told["counters"]["workers_lost"] == sum(job["attempts"] - 1 for job in done) > 0
            assert told["worker_memory"] > 10**9
            with pytest.raises(FrugalError, match=r"answered 413: plan it with .*the plan needs"):
                plan = json.dumps({"totals": {"sample": 10**15}}).encode()
                await client.submit(graph(1), {}, "planned", plan)

    asyncio.run(main())


def test_a_full_queue_refuses_and_what_was_accepted_ends(fleet):
    gate = fleet.folder / "second-gate"

    async def one(session, number):
        form = aiohttp.FormData(default_to_multipart=True)
        form.add_field("workflow", graph(number, gate))
        async with session.post(f"{fleet.url}/v1/jobs", data=form) as answer:
            said = await answer.json()
            if answer.status == 503:
                assert f"{QUEUE} jobs wait or run" in said["error"]
                assert 1 <= int(answer.headers["Retry-After"]) <= 300
                return None
            assert answer.status == 202, said
            return said["id"]

    async def main():
        headers = {"Authorization": f"Bearer {fleet.token}"}
        async with aiohttp.ClientSession(headers=headers) as session:
            told = await asyncio.gather(*(one(session, number) for number in range(2 * QUEUE)))
        accepted = [job for job in told if job]
        assert len(accepted) == QUEUE
        gate.touch()
        async with FleetClient(fleet.url, fleet.token) as client:
            done = [await client.wait(job, HANG) for job in accepted]
            assert {job["status"] for job in done} == {"completed"}
            assert (await client.fleet())["counters"]["refused_full"] == told.count(None)

    asyncio.run(main())


def test_results_outlive_the_fleet(fleet):
    async def main(client_of):
        async with client_of() as client:
            done = [job for job in await client.jobs() if job["key"] == "job-7"]
            (path,) = await client.fetch(done[0], fleet.folder / "later")
            return color_of(path.read_bytes()), len(await client.jobs())

    def client_of():
        return FleetClient(fleet.url, fleet.token)

    before = asyncio.run(main(client_of))
    assert before[0] == 7
    secret = fleet.token
    assert fleet.stop() == []
    (fleet.folder / "later" / "out" / "p_00001_.png").unlink()
    with pytest.raises(OSError):
        urllib.request.urlopen(f"{fleet.url}/health", timeout=HANG)
    fleet.start()
    fleet.wait_for_http()
    assert fleet.token == secret

    def answers():
        # Serve's proxy answers before it knows the scheduler.
        with contextlib.suppress(FrugalError):
            return asyncio.run(main(client_of))

    until(answers, fleet.told)
    assert answers() == before
