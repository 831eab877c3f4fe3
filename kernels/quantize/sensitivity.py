"""What share of a Wan model's output depends on one linear layer: by its architecture, or measured.

Wan is a stack of blocks that each add three branches to one stream: self-attention,
cross-attention, feed-forward. If all branches add alike, a relative error energy r in one of n
branches reaches the output as r / n. A layer of one branch therefore counts 1 / n; one that feeds
many counts their sum: the text embedding all cross-attentions, the time projection every branch
through its gates. The head makes the output itself and counts 1. That is `wiring`, which needs no
run of the model and knows nothing of how strong a branch is.

`probe` measures: it disturbs the weights of one layer at a time and looks at the model's output. On
small random models a choice made so has a two to three times smaller error than one made by wiring.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Mapping

import torch

from ..device_types import widened
from ..errors import FrugalError
from .curves import LayerCurve

BLOCK = re.compile(r"(vace_)?blocks\.(\d+)\.(.+)$")
BRANCHES = 3
# What enters or leaves a block as a whole.
AROUND = ("before_proj", "after_proj")
CONTEXT = ("text_embedding.", "img_emb.")


def wiring(layers: Iterable[str]) -> dict[str, float]:
    """Layer (canonical key without `.weight`) -> share of the model's output that depends on it,
    over 0 up to 1.
    """
    names = tuple(layers)
    places = {name: BLOCK.match(name) for name in names}
    blocks = {(found[1], found[2]) for found in places.values() if found}
    branches = max(1, BRANCHES * len(blocks))
    shares = {}
    for name, found in places.items():
        if found:
            shares[name] = (BRANCHES if found[3] in AROUND else 1) / branches
        else:
            shares[name] = 1 / BRANCHES if name.startswith(CONTEXT) else 1.0
    return shares


def probe(
    layers: Iterable[tuple[str, Callable[[], torch.Tensor]]],
    run: Callable[[Mapping[str, torch.Tensor]], torch.Tensor],
    *,
    amount: float = 0.05,
    seed: int = 0,
    step: Callable[[str], None] = lambda name: None,
) -> dict[str, float]:
    """Layer -> relative error energy of the model's output over that of the layer's weight.

    `layers`: (name, function that reads the float weight [out, in]). `run` gives the model's output
    for fixed inputs, any shape, always the same, with the given float32 differences (layer ->
    [out, in]) added to its weights; it is called once with none and once for every layer. The
    difference is Gaussian noise of `amount` times the norm of the weight: small enough for an
    answer that grows in proportion, above what 16-bit arithmetic blurs. Same seed, same noise.

    Raises FrugalError for an output that is zero or not finite.
    """
    reference = widened(run({}).detach())
    power = float(reference.square().sum())
    generator = torch.Generator().manual_seed(seed)
    shares = {}
    for name, read in layers:
        weight = read()
        noise = torch.randn(tuple(weight.shape), generator=generator)
        noise *= amount * widened(weight).norm() / noise.double().norm()
        moved = float((widened(run({name: noise.float()}).detach()) - reference).square().sum())
        if not (math.isfinite(power) and math.isfinite(moved) and power > 0):
            raise FrugalError(
                f"an output of energy {power:g} that moves by {moved:g} with {name}",
                "finite outputs that are not zero",
                "measure with inputs on which the model works",
            )
        shares[name] = moved / power / amount**2
        step(name)
    return shares


def for_outputs(shares: Mapping[str, float], curves: Mapping[str, LayerCurve]) -> dict[str, float]:
    """What `probe` measured, by error of the layers' weights, as weights for errors of their
    outputs, which is what calibrated curves hold; the same where the weights alone were judged.
    """
    return {name: share / curves[name].white for name, share in shares.items()}
