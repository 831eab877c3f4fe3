"""The graphs that make a video, with tiny files under the public names: from Run to the file."""

from __future__ import annotations

import json
import re

import numpy as np
import pytest

from frugal.demo.layout import WORKFLOWS
from frugal.tests.helpers import shipped
from frugal.tests.helpers.graphs import faults, skip_if_too_old

pytestmark = pytest.mark.comfy
SHAPE = (shipped.HEIGHT, shipped.WIDTH, 3)
ONE_VIDEO = ("wan_t2v_1.3b", "wan_i2v_14b_12gb", "wan2.1_i2v_4steps_12gb", "wan2.2_i2v_4steps_12gb")


@pytest.fixture(scope="module")
def texts(server):
    """The public files are here for these tests alone: others look at what the page says without
    them, on the same server.
    """
    before = set(server.models.rglob("*"))
    yield shipped.write_files(server)
    for path in set(server.models.rglob("*")) - before:
        if path.is_file() and not path.name.startswith("frugal_demo"):
            path.unlink()


def loaded(name: str) -> dict:
    return json.loads((WORKFLOWS / f"{name}.json").read_text(encoding="utf-8"))


def videos(server, prompt: dict) -> list[np.ndarray]:
    result = server.run(prompt)
    assert (result.status, result.errors) == ("success", [])
    found = [entry for _, entry in result.files() if entry["filename"].endswith(".mp4")]
    return [
        shipped.frames(server.output / entry["subfolder"] / entry["filename"]) for entry in found
    ]


@pytest.mark.parametrize("name", ONE_VIDEO)
def test_one_video(server, texts, name):
    [made] = videos(server, shipped.small(server, name, texts))
    assert made.shape == (shipped.FRAMES, *SHAPE)


def test_four_steps_are_two_of_each_expert(server, texts):
    """At the noise levels of the LoRAs, with both LoRAs applied, planned for the card."""
    prompt = shipped.small(server, "wan2.2_i2v_4steps_12gb", texts, seed=8)
    [sampler] = [n for n in prompt.values() if n["class_type"] == "FrugalSampler"]
    assert (sampler["inputs"]["steps"], sampler["inputs"]["cfg"]) == (4, 1.0)
    shown = {"FrugalSampler": "sampler", "FrugalLoraSide": "lora", "FrugalMemoryPlan": "plan"}
    for key, node in list(prompt.items()):
        if node["class_type"] in shown:
            inputs = {"source": [key, 1]}
            prompt[f"report_{key}"] = {"class_type": "PreviewAny", "inputs": inputs}
    before = len(server.log_text())
    result = server.run(prompt)
    assert (result.status, result.errors) == ("success", [])
    assert "2 steps with the high noise expert, 2 low" in server.log_text()[before:]
    said: dict[str, list[str]] = {}
    for key, output in result.outputs.items():
        if key.startswith("report_"):
            kind = prompt[key.removeprefix("report_")]["class_type"]
            said.setdefault(shown[kind], []).append(" ".join(output["text"]))
    assert len(said["lora"]) == 2
    for text in said["lora"]:
        applied, all_keys = re.search(r"(\d+) of (\d+) keys applied", text).groups()
        assert applied == all_keys and int(applied) > 0
    [plan], [sampler] = said["plan"], said["sampler"]
    assert "fits" in plan and "does NOT fit" not in plan and "11.00 GB" in plan
    # It would advise, were the noise levels or the guidance not as trained, or a LoRA missing.
    assert "were distilled at" not in sampler and "no LoRA on" not in sampler


def test_two_ways_on_from_one_beginning(server, texts):
    made = videos(server, shipped.small(server, "causal_video", texts))
    assert [len(each) for each in made] == [shipped.FRAMES] * 3
    # All prompts are the same here: the two go apart by their seeds alone.
    assert not np.array_equal(made[1][0], made[2][0])


def test_a_long_video_from_a_picture(server, texts):
    [made] = videos(server, shipped.small(server, "long_video", texts))
    assert made.shape == (shipped.FRAMES, *SHAPE)


def test_a_dressed_photo_moves_larger_and_smoother(server, texts):
    skip_if_too_old(server, WORKFLOWS / "tryon_to_video_4steps.json")
    shipped.write_enhancers(server.models)
    [made] = videos(server, shipped.small(server, "tryon_to_video_4steps", texts))
    assert made.shape == (2 * shipped.FRAMES - 1, 2 * SHAPE[0], 2 * SHAPE[1], 3)


@pytest.mark.parametrize("name", [*ONE_VIDEO, "causal_video", "long_video"])
def test_the_graph_as_shipped_is_understood(server, name):
    """All that it lacks here are the public files."""
    assert faults(server.convert(loaded(name)), server.object_info()) == []
