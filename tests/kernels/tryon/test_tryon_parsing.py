"""Label numbers by their names, and what a parser sees."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from frugal.kernels.errors import FrugalError
from frugal.kernels.masks.labels import ATR, DENSEPOSE, LIP, decode
from frugal.kernels.tryon import parsing


@pytest.mark.parametrize(("name", "known"), [("ATR", ATR), ("LIP", LIP)])
@pytest.mark.parametrize("write", [str, str.lower, lambda n: n.replace("-", "_"), str.upper])
def test_names_decide_and_not_numbers(name, known, write):
    shuffled = (
        [known[(5 * i + 3) % len(known)] for i in range(len(known))]
        if name == "ATR"
        else [*known[::-1]]
    )
    assert sorted(shuffled) == sorted(known)
    order = parsing.label_order({i: write(label) for i, label in enumerate(shuffled)})
    assert order.map == name and not order.body
    assert [known[number] for number in order.labels] == shuffled
    raw = (
        torch.arange(len(known)).view(1, 3, -1)
        if len(known) % 3 == 0
        else torch.arange(len(known)).view(1, 2, -1)
    )
    found = parsing.renumber(raw, order.labels)
    assert [known[number] for number in found.flatten()] == shuffled


def test_fashn_becomes_atr_and_a_body():
    names = dict(enumerate(parsing.FASHN))
    order = parsing.label_order(names)
    assert order.map == "ATR"
    of = {names[i]: (ATR[order.labels[i]], DENSEPOSE[order.body[i]]) for i in names}
    assert of["top"] == ("Upper-clothes", "Background")
    assert of["hands"] == ("Left-arm", "Left-hand") and of["feet"][1] == "Left-foot"
    assert of["torso"] == ("Upper-clothes", "Torso") and of["face"][0] == "Face"
    assert of["background"] == ("Background", "Background")


def test_unknown_names_keep_their_numbers_and_gaps_are_refused():
    order = parsing.label_order({0: "sky", 1: "road", 2: "car"})
    assert (order.map, order.labels, order.body) == ("numbers", (0, 1, 2), ())
    # One name short of ATR is not ATR.
    short = dict(enumerate([*ATR[:-1], "Shawl"]))
    assert parsing.label_order(short).map == "numbers"
    for names in ({0: "a", 2: "b"}, {1: "a", 2: "b"}, {}, {i: str(i) for i in range(257)}):
        with pytest.raises(FrugalError, match="without a gap"):
            parsing.label_order(names)


def test_preprocess_reads_every_form_of_size():
    read = parsing.Preprocess.read
    assert read({}).size == (512, 512)
    assert read({"size": 64}).size == read({"size": {"height": 64, "width": 64}}).size == (64, 64)
    assert read({"size": {"height": 576, "width": 384}}).size == (576, 384)
    with pytest.raises(FrugalError, match="height and a width"):
        read({"size": {"shortest_edge": 512}})
    made = read({"size": 8, "image_mean": [0.5, 0.4, 0.3], "image_std": [0.5, 0.25, 0.1]})
    picture = torch.tensor([1.0, 0.9, 0.5]).expand(2, 8, 8, 3)
    assert torch.allclose(made(picture)[:, :, 0, 0], torch.tensor([1.0, 2.0, 2.0]).expand(2, 3))
    assert made(torch.rand(1, 20, 30, 3)).shape == (1, 3, 8, 8)


def test_labels_survive_the_way_as_a_picture():
    labels = torch.arange(18).view(1, 3, 6)
    back, form = decode(parsing.as_picture(labels).numpy(), "ATR")
    assert form == "grey level" and (back == labels.numpy()).all()


def test_labels_are_taken_after_interpolation():
    logits = torch.zeros(1, 2, 2, 2)
    logits[0, 1, :, 1] = 1.0
    logits[0, 0, :, 0] = 1.0
    found = parsing.labels_of(logits, (4, 8))
    assert found.shape == (1, 4, 8) and found[0, 0].tolist() == [0] * 4 + [1] * 4


class Largest(TorchDispatchMode):
    """Remembers the most elements of any tensor that was made."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        made = func(*args, **(kwargs or {}))
        if isinstance(made, torch.Tensor):
            self.elements = max(self.elements, made.numel())
        return made


def test_a_large_photo_takes_one_class_at_a_time():
    """The same labels as from all classes at once, without 18 maps of the photo's size."""
    logits = torch.randn(1, 18, 30, 20, generator=torch.Generator().manual_seed(4))
    size = (431, 299)
    whole = F.interpolate(logits, size=size, mode="bilinear", align_corners=False)
    with Largest() as seen:
        found = parsing.labels_of(logits, size)
    assert found.dtype == torch.uint8 and seen.elements == size[0] * size[1]
    best = whole.topk(2, dim=1).values
    clear = (best[:, 0] - best[:, 1]) > 1e-5  # what rounding cannot turn
    assert clear.float().mean() > 0.99 and len(found.unique()) == 18
    assert torch.equal(found[clear].long(), whole.argmax(1)[clear])
