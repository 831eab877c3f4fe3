"""In which pieces a causal video VAE takes a clip: learnt from its own loop, not assumed.

The Wan 2.1 VAE (arXiv 2503.20314) keeps the last frames that every causal convolution saw, so that
it can take a clip piece by piece. How long the pieces are differs between versions of its code, and
pieces of another length give another result. So its own `encode` or `decode` is run on numbered
frames of 2 x 2 pixels, with a stand-in for the network that writes down what it is given.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn

from ..errors import FrugalError

# Channels of what the stand-in returns: it can be halved, and taken apart in 2 x 2 patches.
WIDTH = 8
# Around the network; they see all frames at once and change none's place.
POINTWISE = ("conv1", "conv2")


@dataclass(frozen=True)
class Call:
    """One call of the network: frames `start` to `stop`, and the flags given by name."""

    start: int
    stop: int
    flags: Mapping[str, Any]


@dataclass(frozen=True)
class Cadence:
    """The calls for one clip. slots: entries of the state kept between them, 0 for no state.
    patch: side of the pixel patches that are folded into channels around the network.
    """

    calls: tuple[Call, ...]
    slots: int
    patch: int

    @property
    def used(self) -> int:
        """Frames that are taken; an encoder leaves a remainder out."""
        return self.calls[-1].stop


class _Recorder(nn.Module):
    def __init__(self, network: nn.Module, returned: Callable[[torch.Tensor], Any]):
        super().__init__()
        # A child, because the loop sizes the state by counting the layers it finds in here.
        self.network, self.returned = network, returned
        self.calls: list[Call] = []
        self.slots: set[int] = set()
        self.side = 0

    def forward(self, x: torch.Tensor, feat_cache: Any = None, feat_idx: Any = None, **flags: Any):
        numbers = [int(number) for number in x[0, 0, :, 0, 0].tolist()]
        expected = self.calls[-1].stop if self.calls else 0
        if numbers != list(range(expected, expected + len(numbers))):
            raise ValueError(f"frames {numbers} after frame {expected - 1}")
        self.calls.append(Call(expected, expected + len(numbers), flags))
        self.slots.add(0 if feat_cache is None else len(feat_cache))
        self.side = x.shape[-1]
        return self.returned(x.new_zeros(1, WIDTH, 1, 1, 1))


def observe(model: nn.Module, method: str, part: str, frames: int) -> Cadence:
    """How `model.<method>` ('encode', 'decode') calls `model.<part>` for a clip of `frames`.

    The model is neither run nor changed. Raises FrugalError when its loop cannot be followed.
    """
    loop = getattr(type(model), method)
    numbered = torch.arange(frames, dtype=torch.float32)
    clip = numbered.view(1, 1, -1, 1, 1).expand(1, 1, -1, 2, 2)
    reasons = []
    # Some versions return one tensor per call, others a list of them.
    for returned in (lambda x: x, lambda x: [x]):
        recorder = _Recorder(getattr(model, part), returned)
        around = dict.fromkeys(POINTWISE, lambda x: x)
        stand_in = SimpleNamespace(**{**dict(model.named_children()), **around, part: recorder})
        try:
            result = loop(stand_in, clip)
        except (AttributeError, TypeError, ValueError, RuntimeError, IndexError) as error:
            reasons.append(f"{type(error).__name__}: {error}")
            continue
        if recorder.calls and len(recorder.slots) == 1:
            outside = 2 if method == "encode" else result.shape[-1]
            inside = recorder.side if method == "encode" else 1
            return Cadence(tuple(recorder.calls), recorder.slots.pop(), outside // inside)
        reasons.append(f"{len(recorder.calls)} calls with {len(recorder.slots)} kinds of state")
    raise FrugalError(
        f"the VAE's {method} works in a way that is not known here ({ascii(reasons[0])[:120]})",
        "a loop over frames with a state",
        f"use ComfyUI's own 'VAE {method.title()}', and report the version of ComfyUI",
    )
