"""A tiny Segformer from a local folder, as the node reads it."""

from __future__ import annotations

import importlib.util
import json
import logging
import socket
import sys
import types

import folder_paths
import numpy as np
import pytest
import torch

from frugal.kernels.errors import FrugalError
from frugal.kernels.masks.labels import ATR, decode
from frugal.kernels.tryon.parsing import FASHN
from frugal.nodes.tryon import parse, parse_run
from frugal.tests.helpers.parsers import save_parser

# Not ATR's own order, so that a node which trusted numbers would be found out.
NAMES = [ATR[(7 * i + 2) % len(ATR)] for i in range(len(ATR))]


@pytest.fixture
def parsers(tmp_path):
    """A models/human_parsing of this test, with one parser saved as transformers saves it."""
    network = save_parser(tmp_path / "tiny", NAMES)
    (tmp_path / "no_parser").mkdir()
    kept = folder_paths.folder_names_and_paths[parse_run.KIND]
    folder_paths.folder_names_and_paths[parse_run.KIND] = ([str(tmp_path)], kept[1])
    yield tmp_path, network
    folder_paths.folder_names_and_paths[parse_run.KIND] = kept


def run(image, parser="tiny"):
    return parse.FrugalHumanParse.PREPARE_CLASS_CLONE({}).execute(image, parser).args


@torch.no_grad()
def test_the_node_gives_what_the_network_says_in_atr_order(parsers):
    from transformers import SegformerImageProcessor

    folder, network = parsers
    assert parse_run.choices() == ["tiny"]
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


class StandIn:
    """Has what the node uses of fashn-human-parser 0.1.1, with a preparation of its own."""

    def __init__(self, model_id="fashn-ai/fashn-human-parser", device=None):
        from transformers import SegformerForSemanticSegmentation

        self.device = device
        self.model = SegformerForSemanticSegmentation.from_pretrained(model_id).to(device).eval()

    def predict(self, image):
        ready = torch.from_numpy(image).permute(2, 0, 1)[None] / 255 - 0.3
        logits = self.model(pixel_values=ready.to(self.device)).logits
        shown = torch.nn.functional.interpolate(logits, size=image.shape[:2], mode="nearest")
        return shown.argmax(1)[0].numpy()


# The package itself takes part where somebody installed it; it would replace the tests' OpenCV.
FOUND = ["installed"] if importlib.util.find_spec("fashn_human_parser") else []


@pytest.fixture(params=["stand-in", *FOUND])
def fashn_class(request, monkeypatch):
    if request.param == "installed":
        return importlib.import_module("fashn_human_parser").FashnHumanParser
    module = types.ModuleType(parse_run.FASHN_PACKAGE)
    module.FashnHumanParser = StandIn
    module.__spec__ = importlib.util.spec_from_loader(module.__name__, None)
    monkeypatch.setitem(sys.modules, module.__name__, module)
    return StandIn


@torch.no_grad()
def test_fashn_models_are_read_by_the_package_where_there_is_one(parsers, fashn_class, monkeypatch):
    folder, _ = parsers
    names = list(FASHN)[::-1]
    save_parser(folder / "fashn", names)

    def refuse(*address):
        raise AssertionError(f"a connection to {address}")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    image = torch.rand(2, 90, 70, 3, generator=torch.Generator().manual_seed(1))
    labels, body, _, name = run(image, "fashn")
    found = torch.from_numpy(decode(labels.numpy(), "ATR")[0].astype("int64"))
    alone = fashn_class(model_id=str(folder / "fashn"), device="cpu")
    raw = np.stack([alone.predict((photo * 255).round().byte().numpy()) for photo in image])
    wanted = torch.tensor([ATR.index(FASHN[label][0]) for label in names])[torch.from_numpy(raw)]
    assert name == "ATR" and torch.equal(found, wanted) and len(wanted.unique()) > 2
    # The ATR parser beside it is none of the package's, and this pack's own way is another.
    assert parse_run.load(str(folder / "tiny"))[3].startswith("prepared at 48 x 64 px")
    monkeypatch.setattr(parse_run, "fashn_package", lambda folder: None)
    own, own_body, _, _ = run(image, "fashn")
    assert not torch.equal(own, labels)
    assert own_body.any() and body.any()
    (folder / "fashn" / "model.safetensors").unlink()
    with pytest.raises(FrugalError, match="no weights"):
        run(image, "fashn")


def test_a_package_that_cannot_be_imported_is_told_and_not_needed(parsers, monkeypatch, caplog):
    folder, _ = parsers
    save_parser(folder / "fashn", list(FASHN))
    broken = types.ModuleType(parse_run.FASHN_PACKAGE)  # without the class
    broken.__spec__ = importlib.util.spec_from_loader(broken.__name__, None)
    monkeypatch.setitem(sys.modules, broken.__name__, broken)
    with caplog.at_level(logging.WARNING):
        how = parse_run.load(str(folder / "fashn"))[3]
    assert how.startswith("prepared at 48 x 64 px")
    assert any("without fashn_human_parser" in record.message for record in caplog.records)


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
