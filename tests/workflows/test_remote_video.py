"""The video node in a real ComfyUI, against a server process that speaks the dialects."""

from __future__ import annotations

import pytest

from frugal.servers.dialects import DIALECTS, TRTLLM, VLLM
from frugal.tests.helpers.servers import scripted
from frugal.tests.helpers.video_server import Videos

pytestmark = pytest.mark.comfy


def graph(url: str, dialect: str, **more) -> dict:
    widgets = {
        "servers": url,
        "dialect": dialect,
        "prompt": "a cat",
        "negative_prompt": "",
        "model": "",
        "width": 64,
        "height": 32,
        "frames": 5,
        "fps": 16,
        "steps": 2,
        "guidance": 5.0,
        "flow_shift": 0.0,
        "seed": 3,
        "timeout_minutes": 15.0,
        "filename_prefix": "video/remote",
        "key_variable": "",
    }
    node = {"class_type": "FrugalRemoteVideo", "inputs": {**widgets, **more}}
    saved = {"class_type": "SaveImage", "inputs": {"images": ["1", 0], "filename_prefix": "far"}}
    return {"1": node, "2": saved}


@pytest.mark.parametrize("dialect", DIALECTS)
def test_every_dialect_ends_in_files(server, dialect):
    one = Videos(dialect)
    with scripted(one) as stub:
        result = server.run(graph(f"{stub.url}/v1", dialect))
    assert (result.status, result.errors) == ("success", [])
    names = [entry["filename"] for _, entry in result.files()]
    assert len(one.asked) == 1
    assert sum(name.endswith(".mp4") for name in names) == 1
    assert sum(name.startswith("far") for name in names) == 5


def test_errors_carry_the_remedy(server):
    result = server.run(graph("http://127.0.0.1:9/v1", VLLM))
    assert result.status == "error"
    assert "start the server, or correct its address" in str(result.errors)
    result = server.run(graph("http://127.0.0.1:9/v1", TRTLLM, flow_shift=3.0))
    assert result.status == "error" and "set flow_shift to 0" in str(result.errors)
    result = server.run(graph("http://127.0.0.1:9/v1", VLLM, key_variable="sk-secret"))
    assert result.status == "error" and "environment variable" in str(result.errors)
    assert "secret" not in str(result.errors)
