"""The fleet as an installed pack has it: what it needs, what it refuses, what a cluster is told."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from frugal.kernels.errors import FrugalError
from frugal.tests.helpers.installed import installed
from frugal.tests.helpers.patience import comes

ROOT = Path(__file__).resolve().parents[3]
WITHOUT = "import sys\nfor name in {names!r}: sys.modules[name] = None\n"
CLIENT = (
    "import importlib\n"
    "names = 'client', 'csv_jobs', 'batch', 'job_request', 'store', 'scheduler', 'worker_process'\n"
    "for name in (*names, 'token'):\n"
    "    importlib.import_module('frugal.servers.fleet.' + name)\n"
)
COMMAND = (
    "import runpy\nsys.argv = {words!r}\nrunpy.run_module('frugal.fleet', run_name='__main__')\n"
)


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    return installed(tmp_path_factory.mktemp("site"))


def python(site, code):
    environment = {**os.environ, "PYTHONPATH": str(site)}
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=environment
    )


def test_a_client_needs_neither_ray_nor_torch_nor_comfyui(site):
    names = ["ray", "torch", "numpy", "numba", "comfy", "starlette", "prometheus_client"]
    run = python(site, WITHOUT.format(names=names) + CLIENT)
    assert run.returncode == 0, run.stderr
    words = ["fleet", "status", "--token-env", "NO_SUCH_TOKEN"]
    run = python(site, WITHOUT.format(names=names) + COMMAND.format(words=words))
    assert run.returncode == 1, run.stderr
    assert ": no usable token in the environment variable NO_SUCH_TOKEN" in run.stderr


def test_serve_without_ray_says_what_to_install(site, tmp_path):
    hide = (
        "import sys, importlib.util as u\nfind = u.find_spec\n"
        "u.find_spec = lambda name, *more: None if name == 'ray' else find(name, *more)\n"
    )
    words = ["fleet", "serve", "--comfyui", str(tmp_path), "--store", str(tmp_path / "store")]
    run = python(site, hide + COMMAND.format(words=words))
    assert run.returncode == 1 and ": no ray here; expected" in run.stderr
    assert "pip install 'comfyui-frugal[fleet]'" in run.stderr
    assert not (tmp_path / "store").exists()


def test_refused_fleets(monkeypatch):
    pytest.importorskip("ray")
    from frugal.servers.fleet import launch
    from frugal.servers.fleet.app import Fleet, build

    with pytest.raises(FrugalError, match="unknown arguments colour"):
        build({"comfyui": "c", "store": "s", "work": "w", "colour": 1})
    with pytest.raises(FrugalError, match="a fleet without a token"):
        build({"comfyui": "c", "store": "s", "work": "w"})
    monkeypatch.setenv("SHORT_TOKEN", "short")
    with pytest.raises(FrugalError, match="no usable token"):
        build({"comfyui": "c", "store": "s", "work": "w", "token_env": "SHORT_TOKEN"})
    with pytest.raises(FrugalError, match="2 workers with 1 GPU each, and Ray has 1 GPU"):
        launch._check_room(Fleet("c", "s", "w", workers=2), {"GPU": 1.0, "CPU": 8.0})
    launch._check_room(Fleet("c", "s", "w", workers=2), {"GPU": 2.0, "CPU": 8.0})


def test_ray_gets_a_token_of_its_own(monkeypatch, tmp_path):
    from frugal.servers.fleet import launch

    names = ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH")
    for name in names:
        monkeypatch.setenv(name, "x")
        monkeypatch.delenv(name)
    launch.ray_token(tmp_path)
    path = Path(os.environ["RAY_AUTH_TOKEN_PATH"])
    assert os.environ["RAY_AUTH_MODE"] == "token" and path.parent == tmp_path
    assert len(path.read_text()) >= 40 and path.stat().st_mode & 0o777 == 0o600
    assert "They ask for Ray's token" in launch.open_ports()[0]
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    assert "THEY ASK FOR NO TOKEN" in launch.open_ports()[0]


def test_the_kubernetes_example_starts_what_there_is(monkeypatch):
    pytest.importorskip("ray")
    yaml = pytest.importorskip("yaml")
    from ray.serve.schema import ServeDeploySchema

    from frugal.servers.fleet.app import build

    text = (ROOT / "docs" / "fleet-kuberay.yaml").read_text("utf-8")
    service = next(part for part in yaml.safe_load_all(text) if part["kind"] == "RayService")
    config = ServeDeploySchema.model_validate(yaml.safe_load(service["spec"]["serveConfigV2"]))
    (application,) = config.applications
    assert application.import_path == f"{build.__module__}:{build.__name__}"
    monkeypatch.setenv("FRUGAL_FLEET_TOKEN", "t" * 20)
    built = build(application.args)
    scheduler = built._bound_deployment
    assert scheduler.name == "scheduler"
    assert scheduler.ray_actor_options["resources"] == {"fleet_store": 0.001}
    head = service["spec"]["rayClusterConfig"]["headGroupSpec"]["rayStartParams"]["resources"]
    # Quoted twice: once for YAML, once for the shell that KubeRay writes.
    assert json.loads(json.loads(head.strip("'"))) == {"fleet_store": 1}
    worker = scheduler.init_args[1]._bound_deployment
    assert worker._deployment_config.autoscaling_config.max_replicas == 8


# Answers as ComfyUI does, and writes one file per graph: enough for the wiring. The real one is in
# tests/workflows.
PRETENDED = """
import os, pathlib, sys
from aiohttp import web
place = dict(zip(sys.argv, sys.argv[1:]))
history = {}
async def prompt(request):
    asked = await request.json()
    node = asked["prompt"]["1"]["inputs"]
    if node["color"] == 13:
        os._exit(3)
    read = (pathlib.Path(place["--input-directory"]) / "a.txt").read_bytes()
    output = pathlib.Path(place["--output-directory"]) / "r.txt"
    output.write_bytes(read + str(node["color"]).encode())
    history[asked["prompt_id"]] = {"status": {"status_str": "success"}, "outputs": {}}
    return web.json_response({})
async def told(request):
    name = request.match_info["name"]
    return web.json_response({name: history[name]} if name in history else {})
async def fixed(request):
    stats = {"devices": [{"vram_total": 5 * 10**9}]}
    return web.json_response(stats if request.path == "/system_stats" else {})
app = web.Application()
app.router.add_post("/prompt", prompt)
app.router.add_get("/history/{name}", told)
app.router.add_route("*", "/{tail:.*}", fixed)
web.run_app(app, host="127.0.0.1", port=int(place["--port"]))
"""


class Handle:
    """What a handle of Serve does: one call at a time, on a worker that is replaced if lost."""

    def __init__(self, make):
        self.make, self.workers, self.turn = make, [], asyncio.Lock()

    async def worker(self):
        if not self.workers or not self.workers[-1].comfy.alive():
            self.workers.append(await self.make())
        return self.workers[-1]

    def options(self, stream):
        assert stream
        return self

    @property
    def run(self):
        return SimpleNamespace(remote=lambda *order: Events(self._events(*order)))

    @property
    def facts(self):
        async def remote():
            async with self.turn:
                return await (await self.worker()).facts()

        return SimpleNamespace(remote=remote)

    async def _events(self, *order):
        async with self.turn:
            async for event in (await self.worker()).run(*order):
                yield event


class Events:
    """An async iterator that can be cancelled, as Serve's are."""

    def __init__(self, inner):
        self.inner, self.cancelled = inner, False

    def __aiter__(self):
        return self.inner

    def cancel(self):
        self.cancelled = True


def test_scheduler_and_workers_without_ray(tmp_path, monkeypatch):
    from frugal.servers.fleet import app
    from frugal.servers.fleet.job_request import order

    (tmp_path / "main.py").write_text(PRETENDED)
    fleet = app.Fleet(
        str(tmp_path), str(tmp_path / "store"), str(tmp_path / "work"), gpus=0, attempts=2
    )
    gone = []
    monkeypatch.setattr(app.os, "_exit", gone.append)

    class Worker(app.Worker):
        def __del__(self):
            # Serve awaits the one of the base class; here nobody would.
            pass

    async def make(cls, *words):
        # Serve awaits a constructor that is a coroutine.
        made = cls.__new__(cls)
        await made.__init__(*words)
        return made

    def job(color):
        graph = {"1": {"class_type": "A", "inputs": {"color": color}}}
        return order(json.dumps(graph), {"a.txt": b"in "})

    async def main():
        handle = Handle(lambda: make(Worker, fleet))
        front = await make(app.FrontDesk, fleet, handle)
        try:
            jobs = [front.scheduler.accept(job(color))[0].id for color in (5, 13, 6)]
            await comes(lambda: not front.scheduler.store.open_jobs())
            done = [front.scheduler.store.job(each) for each in jobs]
            assert [each.status for each in done] == ["completed", "failed", "completed"]
            assert "lost in each of 2 attempts" in done[1].error
            for each, text in ((jobs[0], b"in 5"), (jobs[2], b"in 6")):
                assert front.scheduler.store.file(each, "r.txt").read_bytes() == text
            assert front.scheduler.memory == 5 * 10**9
            assert front.scheduler.rules.at_once == 4 and front.scheduler.rules.attempts == 2
            with pytest.raises(RuntimeError, match="has ended"):
                await handle.workers[0].check_health()
            await comes(lambda: len(gone) == 2)
            assert gone == [1, 1]
            # The third job comes before or after the second loss, and no loss is charged to it.
            assert len(handle.workers) in (2, 3) and done[2].attempts == 1
            assert not handle.workers[0].comfy.place.folder.exists()
        finally:
            await front.scheduler.close()
            for worker in handle.workers:
                worker._watcher.cancel()
                await worker.comfy.stop()

    asyncio.run(main())


@pytest.mark.parametrize("fault", [asyncio.TimeoutError(), OSError("gone")])
def test_a_graph_that_has_ended_stays_so_when_tidying_fails(tmp_path, monkeypatch, fault):
    """A time-out there was told as that of the job."""
    pytest.importorskip("filelock")
    from frugal.servers.fleet.worker_process import Comfy, Recipe

    async def asked(method, path, body=None):
        if path == "/history":
            raise fault
        if path.startswith("/history/"):
            return {path.rpartition("/")[2]: {"status": {"status_str": "success"}, "outputs": {}}}
        return {}

    async def taken(body):
        return ""

    comfy = Comfy(Recipe(str(tmp_path), str(tmp_path / "work")))
    monkeypatch.setattr(comfy, "_ask", asked)
    monkeypatch.setattr(comfy, "_queue", taken)
    assert asyncio.run(comfy._graph({}))["kind"] == "done"
    comfy.place.remove()
