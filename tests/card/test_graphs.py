"""The shipped graphs on a server that was booted on the simulated card, over HTTP."""

from __future__ import annotations

import importlib.util
import json

import numpy as np
import pytest
import torch

from frugal.demo.layout import WORKFLOWS
from frugal.tests.card import modes
from frugal.tests.card.bounds import BRAIN, HALF
from frugal.tests.helpers import shipped

pytestmark = [
    pytest.mark.comfy,
    pytest.mark.skipif(
        modes.OLDER or importlib.util.find_spec("comfy.memory_management") is None,
        reason="graphs run with dynamic VRAM",
    ),
]
GRAPHS = (
    "wan_t2v_1.3b", "wan_i2v_14b_12gb", "causal_video", "tryon_12gb", "tryon_demo",
    "tryon_batch", "tryon_to_video_12gb", "calibrate_wan",
)  # fmt: skip
# Of latents: guidance of 6 where HALF has 3. Of pictures: what the VAE's bfloat16 rounds.
LATENTS, PICTURES = 2 * HALF, BRAIN
roomy = pytest.mark.skipif(modes.NAME != "dynamic", reason="once, where there is room")


@pytest.fixture(scope="module")
def texts(server):
    return shipped.write_files(server)


@pytest.fixture(scope="module")
def firsts():
    """What each graph made in its first run."""
    return {}


def run(server, texts, name, seed=7):
    result = server.run(shipped.probed(shipped.small(server, name, texts, seed)))
    assert (result.status, result.errors) == ("success", [])
    found = shipped.made(server, result)
    assert found and any(node for node in result.executed)
    return found


def same(one, other) -> bool:
    return len(one) == len(other) and all(map(np.array_equal, one, other))


def test_every_graph_is_listed():
    """What is not: masks and remote_video load no model, quantize_wan has no forward, and the
    parts of the others are all in the graphs above.
    """
    shown = {path.stem for path in WORKFLOWS.glob("*.json")}
    assert shown - set(GRAPHS) == {
        "masks", "remote_video", "quantize_wan", "long_video", "tryon_to_video_4steps",
        "wan2.1_i2v_4steps_12gb", "wan2.2_i2v_4steps_12gb",
    }  # fmt: skip


def test_dynamic_vram_is_on(server):
    found = "DynamicVRAM support detected and enabled" in server.log_text()
    assert found == (modes.MODE is not None and modes.MODE.dynamic)
    devices = json.dumps(server._get("/system_stats")["devices"])
    assert ("Simulated CUDA" in devices) == modes.ON_CARD


@pytest.mark.parametrize("name", GRAPHS)
def test_twice(server, texts, firsts, same_as_cpu, name):
    """The second run is of models that are loaded; between them another seed, else ComfyUI would
    show what it kept. Where weights stream, the second run is the one in another order.
    """
    firsts[name] = run(server, texts, name)
    # A latent has 5 dimensions, a picture 3; a clip has 4 and is left out, as a codec makes much of
    # little: of pictures 1 % apart, files 7 % apart.
    compared = [torch.tensor(each) for each in firsts[name] if each.ndim != 4]
    same_as_cpu(compared, [PICTURES if each.ndim == 3 else LATENTS for each in compared])
    if modes.NAME == "dynamic":
        other, again = run(server, texts, name, seed=8), run(server, texts, name)
        assert not same(firsts[name], other)
        assert same(firsts[name], again)


@pytest.mark.skipif(not modes.ON_CARD, reason="the CPU only gives what to compare with")
def test_in_another_order(server, texts, firsts):
    """Backwards, but for the one that has just run."""
    last, *others = reversed(list(firsts))
    for name in (*others, last):
        assert same(firsts[name], run(server, texts, name)), name


@roomy
@pytest.mark.parametrize("name", ["wan_t2v_1.3b", "causal_video", "tryon_12gb"])
def test_after_an_interrupt(server, texts, firsts, name):
    def stop(node, value, maximum):
        if maximum:
            server.interrupt()

    prompt = shipped.small(server, name, texts, seed=9)
    for node in prompt.values():
        if "steps" in node["inputs"]:
            node["inputs"]["steps"] = 20
    assert server.run(prompt, stop).status == "interrupted"
    assert same(firsts[name], run(server, texts, name))


@roomy
@pytest.mark.parametrize("name", ["wan_i2v_14b_12gb", "tryon_demo", "causal_video"])
def test_after_free(server, texts, firsts, name):
    server.free()
    assert same(firsts[name], run(server, texts, name))
