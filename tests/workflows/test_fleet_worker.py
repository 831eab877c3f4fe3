"""The fleet's worker with a real ComfyUI: graphs, files, errors, limits, and how it ends."""

from __future__ import annotations

import asyncio
import io
import json
import subprocess
import sys
from dataclasses import replace

import psutil
import pytest
from PIL import Image

pytest.importorskip("filelock")
from frugal.kernels.errors import FrugalError
from frugal.servers.fleet.job_request import order
from frugal.servers.fleet.worker_process import Comfy, LostError, Recipe
from frugal.tests.helpers.fleet import picture_graph
from frugal.tests.helpers.fleet_process import comfy_arguments
from frugal.tests.helpers.installed import installed
from frugal.tests.helpers.patience import HANG, comes


@pytest.fixture(scope="module")
def loop():
    made = asyncio.new_event_loop()
    yield made
    made.close()


@pytest.fixture(scope="module")
def recipe(comfy_tree, tmp_path_factory):
    folder = tmp_path_factory.mktemp("worker")
    arguments = tuple(comfy_arguments(folder / "base"))
    return Recipe(str(comfy_tree), str(folder / "work"), "", arguments, True, HANG, ("MY_SECRET",))


@pytest.fixture(scope="module")
def held():
    return {}


@pytest.fixture
def comfy(loop, recipe, held, monkeypatch_module):
    """A running one; a test that ends it leaves the next one a new one."""
    if "comfy" not in held or not held["comfy"].alive():
        held["comfy"] = Comfy(recipe)
        loop.run_until_complete(held["comfy"].start())
    return held["comfy"]


@pytest.fixture(scope="module")
def monkeypatch_module(loop, held):
    patch = pytest.MonkeyPatch()
    patch.setenv("MY_SECRET", "s" * 20)
    patch.setenv("RAY_AUTH_TOKEN", "s" * 20)
    patch.setenv("FRUGAL_FLEET_TOKEN", "s" * 20)
    yield
    patch.undo()
    if "comfy" in held:
        loop.run_until_complete(held["comfy"].stop())


def graph_of(kind, value=""):
    return {"1": {"class_type": f"Test{kind}", "inputs": {"value": value}}}


async def events(comfy, graph, **files):
    made = order(json.dumps(graph), files)
    return [event async for event in comfy.run("job", made)]


def run(loop, comfy, graph, **files):
    """(last event, name -> bytes of the files)."""
    told = loop.run_until_complete(events(comfy, graph, **files))
    assert told[0] == {"kind": "started", "worker": comfy.name, "memory": comfy.memory}
    found = {}
    for event in told[1:-1]:
        found[event["name"]] = found.get(event["name"], b"") + event["data"]
    return told[-1], found


def picture(color):
    data = io.BytesIO()
    Image.new("RGB", (8, 8), color).save(data, "PNG")
    return data.getvalue()


def test_input_files_in_results_out_nothing_left(loop, comfy):
    assert comfy.memory > 10**9
    graph = picture_graph()
    graph["1"] = {"class_type": "LoadImage", "inputs": {"image": "in.png"}}
    for color in ((255, 0, 0), (0, 255, 0), (0, 255, 0)):
        # The third time ComfyUI has it all in its cache, and must save it again.
        last, found = run(loop, comfy, graph, **{"in.png": picture(color)})
        assert last["kind"] == "done", last
        assert list(found) == ["out/p_00001_.png"]
        shown = Image.open(io.BytesIO(found["out/p_00001_.png"]))
        assert shown.size == (8, 8) and shown.convert("RGB").getpixel((0, 0)) == color
    for name in ("input", "output", "temp"):
        assert not list((comfy.place.folder / name).iterdir())


def test_errors_name_the_node(loop, comfy):
    last, _ = run(loop, comfy, graph_of("Raise", "this is wrong"))
    assert last["kind"] == "failed"
    assert last["error"].startswith("node 1 (TestRaise): RuntimeError: this is wrong")
    last, _ = run(loop, comfy, {"7": {"class_type": "NoSuchNode", "inputs": {}}})
    assert "ComfyUI refused the graph" in last["error"] and "NoSuchNode" in last["error"]
    graph = picture_graph()
    del graph["2"]["inputs"]["filename_prefix"]
    last, _ = run(loop, comfy, graph)
    assert "node 2 (SaveImage)" in last["error"] and "filename_prefix" in last["error"]
    assert run(loop, comfy, picture_graph())[0]["kind"] == "done"


def test_secrets_are_kept_from_custom_nodes(loop, comfy):
    last, _ = run(loop, comfy, graph_of("Look"))
    names = set(next(iter(last["shown"].values()))["text"])
    assert "PATH" in names
    assert not names & {"MY_SECRET", "RAY_AUTH_TOKEN", "FRUGAL_FLEET_TOKEN"}


def test_a_limit_and_a_cancel_stop_the_graph_alone(loop, comfy, monkeypatch, tmp_path):
    """What comes after has its turn only when they have ended, for they wait forever."""
    pid = comfy.process.pid
    with monkeypatch.context() as patch:
        patch.setattr(comfy, "recipe", replace(comfy.recipe, job_seconds=0.5))
        last, _ = run(loop, comfy, graph_of("Wait", str(tmp_path / "never")))
    assert "longer than 0.5 s" in last["error"]

    async def cancelled():
        task = asyncio.ensure_future(events(comfy, graph_of("Wait", str(tmp_path / "nor"))))
        await comes((tmp_path / "nor.inside").exists, comfy.log_tail)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    loop.run_until_complete(cancelled())
    assert run(loop, comfy, picture_graph())[0]["kind"] == "done"
    assert comfy.process.pid == pid and comfy.alive()


def test_what_a_card_says_when_it_is_spoilt_loses_the_worker(loop, comfy):
    with pytest.raises(LostError, match="CUDA error"):
        run(loop, comfy, graph_of("Raise", "CUDA error: an illegal memory access"))


def test_a_process_that_ends_loses_the_worker(loop, comfy):
    with pytest.raises(LostError, match="does not answer"):
        run(loop, comfy, graph_of("End"))
    loop.run_until_complete(asyncio.wait_for(comfy.process.wait(), HANG))
    assert not comfy.alive()


OWNER = """
import asyncio, sys
from frugal.servers.fleet.worker_process import Comfy, Recipe
async def main():
    comfy = Comfy(Recipe(*sys.argv[1:3], "", tuple(sys.argv[3:]), True))
    task = asyncio.ensure_future(comfy.start())
    while comfy.process is None: await asyncio.sleep(0.01)
    print(comfy.process.pid, comfy.name, flush=True)
    await asyncio.sleep(600)
asyncio.run(main())
"""


@pytest.mark.skipif(sys.platform != "linux", reason="the system ends the child on Linux only")
def test_it_does_not_outlive_its_owner(recipe, tmp_path, loop):
    command = [sys.executable, "-c", OWNER, recipe.comfyui, recipe.base, *recipe.arguments]
    environment = {"PYTHONPATH": str(installed(tmp_path / "site")), "PATH": ""}
    owner = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True)
    pid, name = owner.stdout.readline().split()
    child = psutil.Process(int(pid))
    assert child.is_running()
    owner.kill()
    owner.wait()
    child.wait(HANG)
    left = loop.run_until_complete(_names_after_another(recipe))
    assert name not in left, "the next worker removes what a killed one left"


async def _names_after_another(recipe):
    other = Comfy(recipe)
    found = {each.name for each in other.place.folder.parent.iterdir() if each.is_dir()}
    await other.stop()
    return found


def test_a_comfyui_that_does_not_start_is_told(loop, recipe, tmp_path):
    bad = Comfy(Recipe(recipe.comfyui, str(tmp_path), "", ("--no-such-option",), True))
    with pytest.raises(FrugalError, match=r"status 2 while it started .*no-such-option"):
        loop.run_until_complete(bad.start())
    loop.run_until_complete(bad.stop())
    none = Comfy(Recipe(str(tmp_path), str(tmp_path), cpu=True))
    with pytest.raises(FrugalError, match=r"no main\.py"):
        loop.run_until_complete(none.start())
    loop.run_until_complete(none.stop())
