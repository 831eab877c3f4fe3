"""What share of a Wan model's output hangs on one linear layer.

Wan is a stack of blocks that each add three branches to one stream: self-attention,
cross-attention, feed-forward. If all branches add alike, a relative error energy r in one of n
branches reaches the output as r / n. A layer of one branch therefore counts 1 / n; one that feeds
many counts their sum: the text embedding all cross-attentions, the time projection every branch
through its gates. The head makes the output itself and counts 1. This is how the layers are wired,
not how sensitive they are: that is measured, as the error of each layer's own output.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

BLOCK = re.compile(r"(vace_)?blocks\.(\d+)\.(.+)$")
BRANCHES = 3
# What enters or leaves a block as a whole.
AROUND = ("before_proj", "after_proj")
CONTEXT = ("text_embedding.", "img_emb.")


def wiring(layers: Iterable[str]) -> dict[str, float]:
    """Layer (canonical key without `.weight`) -> share of the model's output that hangs on it,
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
