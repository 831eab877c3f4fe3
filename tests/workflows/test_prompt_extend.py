"""The prompt node in a real ComfyUI against a real `transformers serve` with a tiny Qwen 3.5."""

from __future__ import annotations

import pytest

from frugal.tests.helpers.patience import HANG
from frugal.tests.helpers.servers import transformers_serve, write_tiny_qwen

pytestmark = pytest.mark.comfy


@pytest.fixture(scope="module")
def chat(tmp_path_factory):
    """(address, model name). Its weights are random: it shows the protocol, not the prose."""
    folder = tmp_path_factory.mktemp("chat")
    model = folder / "qwen"
    write_tiny_qwen(model)
    with transformers_serve(model, folder / "serve.log") as url:
        yield url, str(model)


def graph(url: str, model: str, **more) -> dict:
    widgets = {
        "text": "a cat walks",
        "server_url": url,
        "model": model,
        "task": "text to video",
        "language": "English",
        "style": "film",
        "seed": 0,
        "max_tokens": 24,
        "timeout_s": HANG,
        "key_variable": "",
        "if_it_fails": "stop",
    }
    shown = {"class_type": "PreviewAny", "inputs": {"source": ["1", 0]}}
    node = {"class_type": "FrugalPromptExtend", "inputs": {**widgets, **more}}
    return {"1": node, "2": shown}


def text(result) -> str:
    assert result.status == "success", result.errors
    return result.outputs["2"]["text"][0]


def test_a_real_server_answers(server, chat):
    url, model = chat
    said = text(server.run(graph(url, model)))
    assert said and said != "a cat walks"
    # The same words again, from what was kept: a fresh graph has nothing cached for the node.
    assert text(server.run(graph(url, model, timeout_s=HANG - 1))) == said
    kept = list((server.base / "user" / "frugal_prompts").glob("*.json"))
    assert len(kept) == 1


def test_a_wrong_model_stops_or_falls_back(server, chat):
    url, _ = chat
    result = server.run(graph(url, "another"))
    assert result.status == "error" and "another" in str(result.errors)
    fallen = server.run(graph(url, "another", if_it_fails="use the original prompt"))
    assert text(fallen) == "a cat walks"
