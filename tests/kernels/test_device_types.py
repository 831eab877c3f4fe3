"""Devices without float64: nothing of this type is made there."""

from __future__ import annotations

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from frugal.kernels import device_types
from frugal.kernels.causal.rotate import shifted
from frugal.kernels.quantize import curves, gptq, moments, sensitivity, shrinkage

CPU, META = torch.device("cpu"), torch.device("meta")


class Narrow(TorchDispatchMode):
    """A device without float64: nothing may become float64 on it."""

    def __init__(self, device: torch.device):
        super().__init__()
        self.device = device

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        made = func(*args, **(kwargs or {}))

        def wide(each) -> bool:
            return (
                isinstance(each, torch.Tensor)
                and each.device == self.device
                and each.dtype in (torch.float64, torch.complex128)
            )

        given = [each for each in args if isinstance(each, torch.Tensor)]
        # On the CPU float64 may be made to take up what comes from the device, but nothing on the
        # way there.
        if wide(made) and not any(map(wide, given)) and (given or self.device != CPU):
            raise TypeError(f"{func} on {self.device}, which has no float64")
        return made


def test_the_stand_in_refuses():
    with Narrow(CPU), pytest.raises(TypeError, match="no float64"):
        torch.ones(2).double()
    with Narrow(META), pytest.raises(TypeError, match="no float64"):
        torch.arange(4, dtype=torch.float64, device=META)


def test_keys_are_turned_without_float64_on_their_device():
    k = torch.randn(1, 6, 2, 128, generator=torch.Generator().manual_seed(1))
    with Narrow(META):
        assert shifted(k.to(META).bfloat16(), 3.25).dtype == torch.bfloat16
    # And as exactly as before: a turn and its opposite leave the keys.
    assert (shifted(shifted(k, 3.25), -3.25) - k).abs().max() < 1e-5


def test_sums_without_float64_are_those_of_float32(monkeypatch):
    """The statistics and errors of quantising, on the CPU as if it were such a device."""
    g = torch.Generator().manual_seed(2)
    rows, weight = torch.randn(64, 48, generator=g), torch.randn(32, 48, generator=g)
    held = weight + 0.01 * torch.randn(32, 48, generator=g)

    def measured():
        gatherer = moments.Gatherer(48, 48)
        gatherer.add(rows)
        hessian = rows.t() @ rows / 64
        shares = sensitivity.probe(
            [("a", lambda: weight)], lambda change: rows @ (weight + change.get("a", 0)).t()
        )
        return [
            float(gatherer._squares.sum()),
            gptq.output_error(weight, held, hessian),
            shrinkage.shrinkage(hessian, 64),
            curves._dot(weight, held),
            shares["a"],
        ]

    want = measured()
    monkeypatch.setattr(device_types, "FLOAT64", ())
    monkeypatch.setattr(torch, "ones", _fails)
    device_types.wide.cache_clear()
    try:
        with Narrow(CPU):
            # The noise of `importance` is made on the CPU, whatever the model's device.
            monkeypatch.setattr(torch.Tensor, "double", lambda tensor: tensor)
            found = measured()
    finally:
        device_types.wide.cache_clear()
    assert found == pytest.approx(want, rel=1e-4)


def _fails(*_, **__):
    raise RuntimeError("Required aspect fp64 is not supported on the device")
