"""A prompt encoded by ComfyUI's own umT5 code survives the trip through a file, bit for bit."""

from __future__ import annotations

import comfy.sd
import pytest
import torch

from frugal.nodes.text import embed_files
from frugal.tests.helpers.umt5 import WIDTH, umt5


@pytest.fixture(scope="module")
def clip():
    state, options = umt5()
    return comfy.sd.load_text_encoder_state_dicts(
        [state], clip_type=comfy.sd.CLIPType.WAN, model_options=options
    )


def encode(clip, text: str):
    return clip.encode_from_tokens_scheduled(clip.tokenize(text))


def test_the_tiny_encoder_encodes(clip):
    red, blue = encode(clip, "a red shirt"), encode(clip, "a blue shirt")
    assert red[0][0].shape == (1, 512, WIDTH)
    assert torch.isfinite(red[0][0]).all()
    assert not torch.equal(red[0][0], blue[0][0])
    assert torch.equal(red[0][0], encode(clip, "a red shirt")[0][0])


def test_encoded_prompt_survives_the_file(clip):
    before = encode(clip, "a red (striped:1.3) shirt walks over the old bridge")
    path = embed_files.save(before, "umt5/prompt")
    [name] = [n for n in embed_files.names() if path.stem in n]
    [(tensor, entry)] = embed_files.load(name)
    assert torch.equal(tensor, before[0][0]) and tensor.dtype == before[0][0].dtype
    assert set(entry) == set(before[0][1])
    for key, value in before[0][1].items():
        same = torch.equal(entry[key], value) if torch.is_tensor(value) else entry[key] == value
        assert same, key
