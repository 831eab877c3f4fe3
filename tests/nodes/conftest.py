"""What tests of nodes share: inference mode as ComfyUI runs nodes in, the tiny Wans of the beds."""

from __future__ import annotations

import comfy.model_management
import pytest
import torch

from frugal.nodes.wan import load_run
from frugal.tests.helpers import sampling
from frugal.tests.helpers import wan as wan_bed


@pytest.fixture
def inference():
    with torch.inference_mode():
        yield
    comfy.model_management.unload_all_models()


@pytest.fixture
def fp32(tmp_path):
    """A model of wan_bed's weights, loaded from tmp_path/fp32.safetensors."""
    return load_run.load_wan(wan_bed.write(tmp_path / "fp32.safetensors", wan_bed.weights()))[0]


@pytest.fixture(scope="module")
def wan(tmp_path_factory):
    return sampling.tiny_wan(tmp_path_factory.mktemp("wan"))


@pytest.fixture(scope="module")
def smooth_wan(wan):
    return sampling.smooth(wan)


@pytest.fixture(scope="module")
def prompts():
    return sampling.two_prompts()
