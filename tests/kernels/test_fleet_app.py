"""The fleet as an installed pack has it: what it needs, what it refuses, what a cluster is told."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from frugal.kernels.errors import FrugalError
from frugal.tests.bed.installed import installed

ROOT = Path(__file__).resolve().parents[2]
WITHOUT = "import sys\nfor name in {names!r}: sys.modules[name] = None\n"
CLIENT = (
    "import importlib\n"
    "for name in ('client', 'sheet', 'batch', 'orders', 'store', 'desk', 'comfy', 'token'):\n"
    "    importlib.import_module('frugal.kernels.remote.fleet.' + name)\n"
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
    assert run.stderr.startswith("no usable token in the environment variable NO_SUCH_TOKEN")


def test_serve_without_ray_says_what_to_install(site, tmp_path):
    hide = (
        "import sys, importlib.util as u\nfind = u.find_spec\n"
        "u.find_spec = lambda name, *more: None if name == 'ray' else find(name, *more)\n"
    )
    words = ["fleet", "serve", "--comfyui", str(tmp_path), "--store", str(tmp_path / "store")]
    run = python(site, hide + COMMAND.format(words=words))
    assert run.returncode == 1 and run.stderr.startswith("no ray here; expected")
    assert "pip install 'comfyui-frugal[fleet]'" in run.stderr
    assert not (tmp_path / "store").exists()


def test_refused_fleets(monkeypatch):
    pytest.importorskip("ray")
    from frugal.kernels.remote.fleet import serving
    from frugal.kernels.remote.fleet.app import Fleet, build

    with pytest.raises(FrugalError, match="unknown arguments colour"):
        build({"comfyui": "c", "store": "s", "work": "w", "colour": 1})
    with pytest.raises(FrugalError, match="a fleet without a token"):
        build({"comfyui": "c", "store": "s", "work": "w"})
    monkeypatch.setenv("SHORT_TOKEN", "short")
    with pytest.raises(FrugalError, match="no usable token"):
        build({"comfyui": "c", "store": "s", "work": "w", "token_env": "SHORT_TOKEN"})
    with pytest.raises(FrugalError, match="2 workers with 1 GPU each, and Ray has 1 GPU"):
        serving._check_room(Fleet("c", "s", "w", workers=2), {"GPU": 1.0, "CPU": 8.0})
    serving._check_room(Fleet("c", "s", "w", workers=2), {"GPU": 2.0, "CPU": 8.0})


def test_ray_gets_a_token_of_its_own(monkeypatch, tmp_path):
    from frugal.kernels.remote.fleet import serving

    names = ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH")
    for name in names:
        monkeypatch.setenv(name, "x")
        monkeypatch.delenv(name)
    serving.ray_token(tmp_path)
    path = Path(os.environ["RAY_AUTH_TOKEN_PATH"])
    assert os.environ["RAY_AUTH_MODE"] == "token" and path.parent == tmp_path
    assert len(path.read_text()) >= 40 and path.stat().st_mode & 0o777 == 0o600
    assert "They ask for Ray's token" in serving.open_ports()[0]
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    assert "THEY ASK FOR NO TOKEN" in serving.open_ports()[0]


def test_the_kubernetes_example_starts_what_there_is(monkeypatch):
    pytest.importorskip("ray")
    yaml = pytest.importorskip("yaml")
    from ray.serve.schema import ServeDeploySchema

    from frugal.kernels.remote.fleet.app import build

    text = (ROOT / "docs" / "fleet-kuberay.yaml").read_text("utf-8")
    service = next(part for part in yaml.safe_load_all(text) if part["kind"] == "RayService")
    config = ServeDeploySchema.model_validate(yaml.safe_load(service["spec"]["serveConfigV2"]))
    (application,) = config.applications
    assert application.import_path == f"{build.__module__}:{build.__name__}"
    monkeypatch.setenv("FRUGAL_FLEET_TOKEN", "t" * 20)
    built = build(application.args)
    desk = built._bound_deployment
    assert desk.name == "desk"
    assert desk.ray_actor_options["resources"] == {"fleet_store": 0.001}
    head = service["spec"]["rayClusterConfig"]["headGroupSpec"]["rayStartParams"]["resources"]
    # Quoted twice: once for YAML, once for the shell that KubeRay writes.
    assert json.loads(json.loads(head.strip("'"))) == {"fleet_store": 1}
    worker = desk.init_args[1]._bound_deployment
    assert worker._deployment_config.autoscaling_config.max_replicas == 8
