"""A tiny Segformer from a local folder, as the node reads it."""

from __future__ import annotations

import json
import logging
import sys

import folder_paths
import pytest
import torch

from frugal.kernels.errors import FrugalError
from frugal.kernels.masks.labels import ATR, decode
from frugal.nodes.tryon import parse, parser_glue

TINY = {
    "num_encoder_blocks": 4, "depths": [1, 1, 1, 1], "hidden_sizes": [8, 8, 16, 16],
    "num_attention_heads": [1, 1, 2, 2], "decoder_hidden_size": 16, "sr_ratios": [8, 4, 2, 1],
}  # fmt: skip
# Not ATR's own order, so that a node which trusted numbers would be found out.
NAMES = [ATR[(7 * i + 2) % len(ATR)] for i in range(len(ATR))]


@pytest.fixture
def parsers(tmp_path):
    """A models/human_parsing of this test, with one parser saved as transformers saves it."""
    from transformers import SegformerConfig, SegformerForSemanticSegmentation

    torch.manual_seed(0)
    config = SegformerConfig(**TINY, id2label=dict(enumerate(NAMES)))
    network = SegformerForSemanticSegmentation(config).eval()
    network.save_pretrained(tmp_path / "tiny")
    settings = {
        "size": {"height": 64, "width": 48},
        "image_mean": [0.5] * 3,
        "image_std": [0.2] * 3,
    }
    (tmp_path / "tiny" / "preprocessor_config.json").write_text(json.dumps(settings))
    (tmp_path / "no_parser").mkdir()
    kept = folder_paths.folder_names_and_paths[parser_glue.KIND]
    folder_paths.folder_names_and_paths[parser_glue.KIND] = ([str(tmp_path)], kept[1])
    yield tmp_path, network
    folder_paths.folder_names_and_paths[parser_glue.KIND] = kept


def run(image, parser="tiny"):
    return parse.FrugalHumanParse.PREPARE_CLASS_CLONE(None).execute(image, parser).args


@torch.no_grad()
def test_the_node_gives_what_the_network_says_in_atr_order(parsers):
    from transformers import SegformerImageProcessor

    folder, network = parsers
    assert parser_glue.choices() == ["tiny"]
    image = torch.rand(2, 90, 70, 3, generator=torch.Generator().manual_seed(1))
    labels, body, preview, name = run(image)
    assert name == "ATR" and labels.shape == (2, 90, 70, 3) and not body.any()
    # transformers' own way, with its own file of settings, as far as resampling allows.
    processor = SegformerImageProcessor.from_pretrained(folder / "tiny", local_files_only=True)
    ready = processor(list((image * 255).round().byte().numpy()), return_tensors="pt")
    logits = network(pixel_values=ready["pixel_values"]).logits
    raw = processor.post_process_semantic_segmentation(
        type("Output", (), {"logits": logits})(), target_sizes=[(90, 70)] * 2
    )
    wanted = torch.tensor([ATR.index(label) for label in NAMES])[torch.stack(raw)]
    found = torch.from_numpy(decode(labels.numpy(), "ATR")[0].astype("int64"))
    assert len(found.unique()) > 2, "one label everywhere would prove nothing"
    assert (found == wanted).float().mean() > 0.97
    assert (found == torch.stack(raw)).float().mean() < 0.5
    changed = (preview != image).any(-1)
    assert torch.equal(changed | (found == 0), torch.ones_like(changed))
    assert not changed[found == 0].any()


def test_what_is_no_parser_is_refused(parsers):
    folder, _ = parsers
    image = torch.rand(1, 32, 32, 3)
    with pytest.raises(FrugalError, match=r"no human parser '\.\./tiny'"):
        run(image, "../tiny")
    config = json.loads((folder / "tiny" / "config.json").read_text())
    for change, match in (
        ({"model_type": "bert"}, "kind 'bert'"),
        ({"hidden_sizes": [8, 8, 16, 24]}, "of another shape"),
        ({"depths": [1, 1, 1, 2]}, "missing"),
    ):
        (folder / "tiny" / "config.json").write_text(json.dumps({**config, **change}))
        with pytest.raises(FrugalError, match=match):
            run(image)
    (folder / "tiny" / "config.json").write_text(json.dumps(config))
    (folder / "tiny" / "model.safetensors").unlink()
    with pytest.raises(FrugalError, match="no weights"):
        run(image)


def test_without_transformers_only_this_node_is_off(monkeypatch, caplog):
    import importlib

    monkeypatch.setitem(sys.modules, "transformers", None)
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "transformers" else find(name)
    )
    with caplog.at_level(logging.WARNING):
        spec = find(parse.__name__)
        again = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(again)
    assert not again.NODES and parse.FrugalHumanParse in parse.NODES
    assert [r.message for r in caplog.records] == [
        "[Frugal] Human Parse is off: install 'transformers' to get it."
    ]
