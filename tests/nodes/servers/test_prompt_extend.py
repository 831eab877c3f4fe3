"""The prompt node in ComfyUI: what it hands on, when it asks again, what it keeps."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from aiohttp import web

from frugal.kernels.errors import FrugalError
from frugal.tests.helpers.patience import FOREVER, HANG
from frugal.tests.helpers.servers import completion, scripted

WIDGETS = dict(
    text="a cat",
    model="m",
    task="text to video",
    language="English",
    style="",
    seed=0,
    max_tokens=64,
    timeout_s=HANG,
    key_variable="",
)


@pytest.fixture
def node(comfy_tree, tmp_path, monkeypatch):
    """The node class, with a user folder of its own and no server around it."""
    import folder_paths

    from frugal.nodes.servers.prompt import FrugalPromptExtend

    monkeypatch.setattr(folder_paths, "get_user_directory", lambda: str(tmp_path))
    hidden = SimpleNamespace(unique_id=None, prompt=None)
    monkeypatch.setattr(FrugalPromptExtend, "hidden", hidden, raising=False)
    return FrugalPromptExtend


def run(node, url, **more):
    return node.execute(**{**WIDGETS, "server_url": url, **more}).result


def test_the_answer_goes_on_and_is_kept(node):
    async def handle(request, body):
        return completion(f"<think>hm</think>Answer {len(stub.seen)}.")

    with scripted(handle) as stub:
        text, report = run(node, stub.url)
        assert text == "Answer 1." and "rewritten by m on 127.0.0.1" in report
        # The same question is not paid for twice, nor are time-out and key part of it.
        assert run(node, stub.url, timeout_s=5.0)[0] == "Answer 1."
        changes = [{"seed": 1}, {"text": "a dog"}, {"task": "image to video"}, {"style": "film"}]
        changes += [{"image": torch.zeros(1, 8, 8, 3)}, {"image": torch.ones(1, 8, 8, 3)}]
        texts = [run(node, stub.url, **change)[0] for change in changes]
        assert texts == [f"Answer {place}." for place in range(2, 2 + len(changes))]
    # Nobody is there any more.
    text, report = run(node, stub.url)
    assert text == "Answer 1." and "cached answer" in report


def test_without_an_answer_the_prompt_stays_and_is_asked_again(node):
    async def handle(request, body):
        return web.Response(status=500, text="boom") if broken else completion("Better.")

    def mark(url):
        return node.fingerprint_inputs(**{**WIDGETS, "server_url": url, "if_it_fails": "stop"})

    with scripted(handle) as stub:
        broken, before = True, mark(stub.url)
        text, report = run(node, stub.url)
        assert text == "a cat" and "original prompt" in report and "boom" in report
        with pytest.raises(FrugalError, match="boom"):
            run(node, stub.url, if_it_fails="stop")
        after = mark(stub.url)
        assert after != before
        broken = False
        assert run(node, stub.url, if_it_fails="stop")[0] == "Better."
        # A success changes nothing: what comes after it in the graph need not run again.
        assert mark(stub.url) == after


def test_a_wired_prompt_that_failed_is_asked_again(node, monkeypatch):
    """ComfyUI leaves wired inputs out when it asks for the fingerprint."""
    wired = {"text": ["1", 0], **{k: v for k, v in WIDGETS.items() if k != "text"}}
    url = "http://127.0.0.1:9/v1"
    prompt = {"7": {"inputs": {**wired, "server_url": url, "if_it_fails": "stop"}}}
    monkeypatch.setattr(node, "hidden", SimpleNamespace(unique_id="7", prompt=prompt))
    seen = {k: v for k, v in prompt["7"]["inputs"].items() if k != "text"}
    before = node.fingerprint_inputs(**seen)
    with pytest.raises(FrugalError, match="cannot be reached"):
        run(node, url, if_it_fails="stop")
    assert node.fingerprint_inputs(**seen) != before


def test_cancel_is_no_failure(node):
    """Interrupting must stop the graph, not go on with the original prompt."""
    import comfy.model_management as mm

    async def handle(request, body):
        mm.interrupt_current_processing()
        import asyncio

        await asyncio.sleep(FOREVER)

    with scripted(handle) as stub, pytest.raises(mm.InterruptProcessingException):
        run(node, stub.url)
    assert not mm.processing_interrupted()


@pytest.mark.parametrize(
    ("more", "says"),
    [
        ({"server_url": " "}, "neither a server nor a CLIP input"),
        ({"clip": object()}, "a server and a CLIP input"),
        ({"text": " "}, "empty prompt"),
    ],
)
def test_contradictions_are_errors(node, more, says):
    with pytest.raises(FrugalError, match=says):
        node.execute(**{**WIDGETS, "server_url": "http://127.0.0.1:9", **more})


def test_a_clip_that_cannot_write(node):
    clip = SimpleNamespace(generate=len, cond_stage_model=torch.nn.Linear(1, 1))
    text, report = run(node, "", clip=clip)
    assert text == "a cat" and "cannot write" in report


def test_a_language_model_in_the_graph_is_asked(node):
    """The call that ComfyUI's Generate Text makes, with the task before the prompt."""
    said = {}

    def tokenize(text, **options):
        said.update(text=text, **options)
        return "tokens"

    def generate(tokens, **options):
        said.update(tokens=tokens, **options)
        return "ids"

    inner = SimpleNamespace(transformer=SimpleNamespace(generate=generate))
    encoder = SimpleNamespace(clip="qwen", qwen=inner, generate=generate)
    clip = SimpleNamespace(
        tokenize=tokenize,
        generate=generate,
        cond_stage_model=encoder,
        decode=lambda ids: f"</think> A cat, from {ids}.",
    )
    text, _ = run(node, "", clip=clip, seed=5)
    assert text == "A cat, from ids."
    assert said["text"].endswith("\na cat") and "video" in said["text"]
    assert (said["thinking"], said["seed"], said["max_length"]) == (False, 5, 64)


def test_pictures_are_made_small():
    from io import BytesIO

    from PIL import Image

    from frugal.nodes.servers import glue

    half = torch.cat([torch.zeros(1, 1000, 400, 3), torch.ones(1, 1000, 400, 3)], 2)
    picture = Image.open(BytesIO(glue.png(half)))
    assert picture.size == (614, 768) and picture.getpixel((10, 10)) == (0, 0, 0)
    assert picture.getpixel((600, 10)) == (255, 255, 255) and glue.png(None) == b""
