"""The prompt node against the real vLLM, on a CPU with SmolLM2 135M: its protocol, not its prose.

Runs when asked for only, see docs/engines.md.
"""

from __future__ import annotations

import time

import pytest

from frugal.tests.helpers import engines as bed

pytestmark = pytest.mark.skipif(not bed.PYTHON, reason=bed.NEEDED)
ASKED = "a cat walks through snow"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("chat")


@pytest.fixture(scope="module")
def server(folder):
    bed.inside(folder, str(bed.PLATFORM / "smollm2_folder.py"), str(folder / "smollm2"))
    with bed.vllm_chat(folder, folder / "smollm2", "smollm2") as running:
        bed.record("vLLM start", seconds=round(running.seconds, 1))
        yield running


@pytest.fixture(scope="module", params=bed.TREES, ids=lambda tree: tree.name)
def comfy(request, folder):
    with bed.comfy(request.param, folder) as running:
        yield running


def graph(server: bed.Engine, **more) -> dict:
    widgets = {
        "text": ASKED,
        "server_url": server.url,
        "model": "",
        "task": "text to video",
        "language": "English",
        "style": "",
        "seed": 3,
        "max_tokens": 64,
        "timeout_s": 300.0,
        "key_variable": bed.KEY_VARIABLE,
        "if_it_fails": "stop",
    }
    node = {"class_type": "FrugalPromptExtend", "inputs": {**widgets, **more}}
    shown = {
        str(place + 2): {"class_type": "PreviewAny", "inputs": {"source": ["1", place]}}
        for place in range(2)
    }
    return {"1": node, **shown}


def texts(comfy, graph: dict) -> tuple[str, str]:
    """The prompt that goes on, and the report."""
    result = comfy.run(graph)
    assert result.status == "success", result.errors
    return result.outputs["2"]["text"][0], result.outputs["3"]["text"][0]


def test_the_prompt_is_rewritten(comfy, server):
    began = time.monotonic()
    said, report = texts(comfy, graph(server))
    seconds = time.monotonic() - began
    assert said and said != ASKED and "rewritten by smollm2" in report, report
    # The same question is answered from what was kept, another seed by the server.
    assert texts(comfy, graph(server, timeout_s=299.0))[0] == said
    assert texts(comfy, graph(server, seed=4))[0] != said
    bed.record(f"prompt, {comfy.tree.name}", seconds=round(seconds, 1), letters=len(said))


def test_refusals_stop_or_fall_back(comfy, server):
    result = comfy.run(graph(server, seed=5, key_variable=""))
    assert result.status == "error" and "401" in str(result.errors)
    result = comfy.run(graph(server, seed=5, model="another"))
    assert result.status == "error" and "another" in str(result.errors)
    said, report = texts(
        comfy, graph(server, seed=5, model="another", if_it_fails="use the original prompt")
    )
    assert said == ASKED and "the original prompt is used" in report
