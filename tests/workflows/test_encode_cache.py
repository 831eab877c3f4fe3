"""On a real server a prompt in the cache needs no encoder: the file here has none."""

from __future__ import annotations

import json
import math

import pytest
import torch
from safetensors.torch import save_file

from frugal.kernels.checkpoints.text_embeds import read_text_embeds, write_text_embeds
from frugal.nodes.text import cached_encode_run

pytestmark = pytest.mark.comfy
NAME = "hollow_umt5.safetensors"


def hollow_encoder(path) -> None:
    """The header of an umT5-XXL file over a hole: nothing could be loaded from it."""
    shapes = dict.fromkeys(
        (
            f"encoder.block.{layer}.{part}.weight"
            for layer in range(cached_encode_run.LAYERS)
            for part in cached_encode_run.LAYER_PARTS
        ),
        (1, 1),
    )
    shapes |= {cached_encode_run.FINAL_NORM: (1,), cached_encode_run.TOKENIZER: (1,)}
    shapes |= {cached_encode_run.TELLING: (cached_encode_run.TELLING_ROWS, 1)}
    shapes[cached_encode_run.EMBEDDING] = cached_encode_run.VOCABULARY
    header, end = {}, 0
    for name, shape in shapes.items():
        size = math.prod(shape)
        header[name] = {"dtype": "U8", "shape": shape, "data_offsets": [end, end + size]}
        end += size
    text = json.dumps(header).encode()
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + end)


@pytest.fixture
def kept(server, monkeypatch):
    """A hollow encoder, and two prompts kept for it."""
    path = server.models / "text_encoders" / NAME
    path.parent.mkdir(parents=True, exist_ok=True)
    hollow_encoder(path)
    folder = server.base / "user" / cached_encode_run.CACHE
    folder.mkdir(parents=True, exist_ok=True)
    monkeypatch.setattr(cached_encode_run, "cache_folder", lambda: folder)
    maker = cached_encode_run.identity(path) | cached_encode_run.computation("default")
    made = {}
    for seed, text in enumerate(("red", "blue")):
        tensor = torch.randn(1, 12, 64, generator=torch.Generator().manual_seed(seed))
        made[text] = [[tensor, {"pooled_output": None}]]
        write_text_embeds(made[text], cached_encode_run._entry_path(maker, text))
    yield made
    path.unlink()


def graph(positive: str, negative: str, encoder: str = NAME) -> dict:
    texts = {"positive_text": positive, "negative_text": negative}
    nodes = {
        "1": {
            "class_type": "FrugalCachedTextEncode",
            "inputs": {"encoder_name": encoder, "device": "default", **texts},
        }
    }
    for key, slot in (("2", 0), ("3", 1)):
        inputs = {"conditioning": ["1", slot], "filename_prefix": f"cached{key}"}
        nodes[key] = {"class_type": "FrugalSaveTextEmbeds", "inputs": inputs}
    return nodes


def test_kept_prompts_need_no_encoder(server, kept):
    result = server.run(graph("red", "blue"))
    assert (result.status, result.errors) == ("success", [])
    for key, text in (("2", "red"), ("3", "blue")):
        written = max((server.output / "text_embeds").glob(f"cached{key}_*"))
        [[tensor, extras]] = read_text_embeds(written)
        assert torch.equal(tensor, kept[text][0][0]) and extras == kept[text][0][1]


def test_another_encoder_is_refused_before_it_is_read(server):
    """ComfyUI itself would make an untrained SD 1 encoder of it and go on."""
    name = "no_umt5.safetensors"
    save_file({"a": torch.zeros(2)}, server.models / "text_encoders" / name)
    result = server.run(graph("red", "blue", name))
    assert result.status == "error"
    assert any(f"{name} lacks spiece_model" in str(error) for error in result.errors)
