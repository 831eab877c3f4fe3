"""What each format would cost one layer: exact bytes, and the error of its output.

A linear layer y = W x that runs with a stored weight What has the error E x, E = What - W. Over
inputs with the mean H = E[x x^T] the energy of that error is tr(E H E^T), that of the output
tr(W H W^T).
Without statistics H is the identity: the errors are then those of the weight alone. H of few inputs
is shrunk first (shrink.py): the error is then what other inputs of their kind must expect.

The quantisation of activations, which some formats do while they run, is not part of these numbers.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from ..device_types import widened
from ..errors import FrugalError
from ..formats import codec
from ..formats import table as formats
from .shrinkage import shrink_

# Values turned to float32 at a time: bounds the working memory beside the weight and its H.
PIECE = 1 << 22


class Statistics(Protocol):
    """Calibration statistics of one layer."""

    @property
    def independent(self) -> int:
        """How many inputs H stands on, 0 for enough of them."""
        ...

    def hessian(self) -> torch.Tensor:
        """Float32 [in, in]: the mean of x x^T over the recorded inputs, ordinary basis; a new
        tensor.
        """
        ...


@dataclass(frozen=True)
class FormatError:
    """One layer in one format. bytes: all its stored tensors. Energies over the same inputs, float:
    noise = tr(E H E^T), signal = tr(W H W^T), inner = tr(W H What^T).
    """

    bytes: int
    noise: float
    signal: float
    inner: float

    @property
    def relative(self) -> float:
        """||error|| / ||output||, root over all rows and inputs: sqrt(noise / signal)."""
        return math.sqrt(self.noise / self.signal) if self.noise else 0.0

    @property
    def cosine(self) -> float:
        """Cosine between the outputs of W and of What, 1 if both are zero."""
        stored = 2 * self.inner - self.signal + self.noise
        if self.signal <= 0 and stored <= 0:
            return 1.0
        if self.signal <= 0 or stored <= 0:
            return 0.0
        return max(-1.0, min(1.0, self.inner / math.sqrt(self.signal * stored)))

    @property
    def snr_db(self) -> float:
        """10 log10(signal / noise) in dB; infinite where nothing is lost."""
        return 10 * math.log10(self.signal / self.noise) if self.noise else math.inf


@dataclass(frozen=True)
class LayerCurve:
    """One layer [out, in]: format -> what it costs, format -> why it does not suit, and whether
    inputs were recorded (else the weight alone was judged).

    white: the relative error energy of the output for an error of the weight that has no direction,
    over the relative energy of that error: ||W||^2 tr(H) / (in * tr(W H W^T)); 1 where the weight
    alone was judged.
    """

    name: str
    shape: tuple[int, int]
    formats: Mapping[str, FormatError]
    refused: Mapping[str, str]
    calibrated: bool
    white: float = 1.0


def stored_error(
    name: str,
    target: str,
    weight: torch.Tensor,
    tensors: Mapping[str, torch.Tensor],
    options: Mapping[str, Any],
    statistics: Statistics | None = None,
    device: torch.device | str = "cpu",
) -> FormatError:
    """The error of `tensors` (suffix -> tensor, in the format `target` with `options`) as a stored
    form of the float weight [out, in]. Works in pieces of rows on `device`.

    Raises FrugalError where the statistics are of another width, or an error is not finite.
    """
    hessian = _hessian(name, weight, statistics, device)
    return _error(name, target, weight, tensors, options, hessian, device)


def layer_curve(
    name: str,
    weight: torch.Tensor,
    targets: Sequence[str] = formats.TARGETS,
    *,
    statistics: Statistics | None = None,
    device: torch.device | str = "cpu",
) -> LayerCurve:
    """Encode one float weight [out, in] in every format that suits it, decode it again and compare.
    With statistics the encoding is the calibrated one, so the errors are those of the tensors
    that the converter writes.
    """
    shape = (int(weight.shape[0]), int(weight.shape[1]))
    hessian = _hessian(name, weight, statistics, device)
    made: dict[str, FormatError] = {}
    refused: dict[str, str] = {}
    for target in targets:
        reason = formats.suits(target, shape)
        if reason is not None:
            refused[target] = reason
            continue
        options = formats.options(target, shape)
        tensors = codec.encode(target, weight, device, options, statistics=statistics, where=name)
        made[target] = _error(name, target, weight, tensors, options, hessian, device)
    white = 1.0
    if hessian is not None and made:
        white = _white(weight, hessian, next(iter(made.values())).signal)
    return LayerCurve(name, shape, made, refused, statistics is not None, white)


def measure(
    layers: Iterable[tuple[str, Callable[[], torch.Tensor]]],
    targets: Sequence[str] = formats.TARGETS,
    *,
    statistics: Callable[[str], Statistics | None] = lambda name: None,
    device: torch.device | str = "cpu",
    step: Callable[[LayerCurve], None] = lambda curve: None,
) -> dict[str, LayerCurve]:
    """The curves of many layers, given as (name, function that reads the float weight): one weight
    at a time is held. `statistics` finds a layer's; `step` gets each curve when
    it is made.
    """
    curves = {}
    for name, read in layers:
        curves[name] = layer_curve(
            name, read(), targets, statistics=statistics(name), device=device
        )
        step(curves[name])
    return curves


def _hessian(
    name: str, weight: torch.Tensor, statistics: Statistics | None, device: torch.device | str
) -> torch.Tensor | None:
    if statistics is None:
        return None
    hessian = statistics.hessian()
    width = weight.shape[1]
    if tuple(hessian.shape) != (width, width):
        raise FrugalError(
            f"{name} has {width} inputs, its calibration {tuple(hessian.shape)}",
            "statistics recorded from this model",
            "choose the calibration file of this model, or none",
        )
    made = hessian.to(device=device, dtype=torch.float32)
    shrink_(made, statistics.independent)
    return made


def _error(
    name: str,
    target: str,
    weight: torch.Tensor,
    tensors: Mapping[str, torch.Tensor],
    options: Mapping[str, Any],
    hessian: torch.Tensor | None,
    device: torch.device | str,
) -> FormatError:
    size = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
    shape = (int(weight.shape[0]), int(weight.shape[1]))
    decoded = codec.decode(target, tensors, options, shape)
    signal = noise = cross = 0.0
    step = max(1, PIECE // shape[1])
    for start in range(0, shape[0], step):
        piece = weight[start : start + step].to(device=device, dtype=torch.float32)
        lost = decoded[start : start + step].to(device=device, dtype=torch.float32) - piece
        seen = piece if hessian is None else piece @ hessian
        signal += _dot(seen, piece)
        if not lost.any():
            continue
        cross += _dot(seen, lost)
        noise += _dot(lost if hessian is None else lost @ hessian, lost)
    # H is positive semidefinite, its float32 copy nearly so.
    signal, noise = max(signal, 0.0), max(noise, 0.0)
    if not (math.isfinite(signal) and math.isfinite(noise)) or (noise and not signal):
        raise FrugalError(
            f"{name} in {target} has an output of energy {signal:g} and an error of {noise:g}",
            "finite weights and statistics, and an output that is not zero",
            "choose another file or calibration",
        )
    return FormatError(size, noise, signal, signal + cross)


def _white(weight: torch.Tensor, hessian: torch.Tensor, signal: float) -> float:
    step = max(1, PIECE // weight.shape[1])
    pieces = (widened(weight[start : start + step]) for start in range(0, len(weight), step))
    energy = sum(float(piece.square().sum()) for piece in pieces)
    mean = float(widened(hessian.diagonal()).mean())
    return energy * mean / signal if signal and energy and mean else 1.0


def _dot(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((widened(a) * b).sum())
