"""Low-rank changes applied to inputs, against the dense matrices that they stand for."""

from __future__ import annotations

import pytest
import torch

from frugal.kernels.checkpoints.diffusers_names import to_diffusers
from frugal.kernels.checkpoints.wan_keys import Naming
from frugal.kernels.checkpoints.wan_shapes import WanConfig, parameters
from frugal.kernels.lora import low_rank
from frugal.kernels.lora.names import ending, spelling, spellings
from frugal.kernels.lora.report import LoraReport

pytestmark = pytest.mark.numeric

MAKE = torch.Generator().manual_seed(5)


def noise(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=MAKE)


def kron(outer: torch.Tensor, inner: torch.Tensor) -> torch.Tensor:
    """By the definition, entry by entry of the blocks."""
    return torch.cat([torch.cat([entry * inner for entry in row], dim=1) for row in outer], dim=0)


def cases() -> dict[str, tuple[low_rank.Delta | None, torch.Tensor]]:
    """label -> (delta, D [24, 32] by its formula in float64)."""
    up, down = noise(24, 3), noise(3, 32)
    product = up.double() @ down.double()
    a1, b1, a2, b2 = noise(24, 2), noise(2, 32), noise(24, 3), noise(3, 32)
    hadamard = (a1.double() @ b1.double()) * (a2.double() @ b2.double())
    w1, w2 = noise(4, 8), noise(6, 4)
    left, right, low_left, low_right = noise(6, 2), noise(2, 4), noise(4, 2), noise(2, 8)
    inner, outer = left.double() @ right.double(), low_left.double() @ low_right.double()
    return {
        "LoRA": (low_rank.lora(up, down, 1.5), 0.5 * product),
        "LoRA without alpha": (low_rank.lora(up, down, None), product),
        "LoHa": (low_rank.loha((a1, b1), (a2, b2), 4.0), 2.0 * hadamard),
        "LoKr": (low_rank.lokr((w1,), (w2,), 7.0), kron(w1.double(), w2.double())),
        "LoKr, inner a product": (
            low_rank.lokr((w1,), (left, right), 4.0),
            2.0 * kron(w1.double(), inner),
        ),
        "LoKr, both products": (
            low_rank.lokr((low_left, low_right), (left, right), 3.0),
            1.5 * kron(outer, inner),
        ),
    }


CASES = cases()


@pytest.mark.parametrize("label", CASES)
def test_delta_is_its_formula(label):
    delta, wanted = CASES[label]
    assert delta is not None and delta.shape == (24, 32)
    torch.testing.assert_close(delta.dense(torch.float64), wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("rows", [1, 7, 300])
@pytest.mark.parametrize("label", CASES)
def test_branch_adds_the_product(label, rows, monkeypatch):
    monkeypatch.setattr(low_rank, "CHUNK", 64)
    delta, wanted = CASES[label]
    assert delta is not None
    x, out = noise(rows, 32), noise(rows, 24)
    expected = out.double() + 0.7 * x.double() @ wanted.t()
    low_rank.branch(delta).add_(out, x, 0.7)
    torch.testing.assert_close(out.double(), expected, rtol=1e-5, atol=1e-4)


def test_parts_of_a_fused_layer():
    delta, wanted = CASES["LoRA"]
    assert delta is not None
    x, out = noise(5, 32), torch.zeros(5, 72)
    low_rank.branch(delta, place=(0, 24)).add_(out, x, 1.0)
    torch.testing.assert_close(out[:, 24:48], (x.double() @ wanted.t()).float())
    assert not out[:, :24].any() and not out[:, 48:].any()
    wide, out = noise(5, 64), torch.zeros(5, 24)
    low_rank.branch(delta, place=(1, 16)).add_(out, wide, 1.0)
    torch.testing.assert_close(out, (wide[:, 16:48].double() @ wanted.t()).float())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("label", ["LoRA", "LoKr, inner a product"])
def test_small_types_round_once(label, dtype):
    """The sum is rounded as a dense product in this type is, not once more."""
    delta, wanted = CASES[label]
    assert delta is not None
    x, out = noise(64, 32).to(dtype), noise(64, 24).to(dtype)
    exact = out.double() + x.double() @ wanted.t()
    low_rank.branch(delta).add_(out, x, 1.0)
    error = (out.double() - exact).norm() / exact.norm()
    assert error <= 2 * torch.finfo(dtype).eps


def test_loha_that_is_no_smaller_is_left():
    a, b = noise(24, 4), noise(4, 32)
    assert low_rank.loha((a, b), (a, b), None) is None
    assert low_rank.loha((a[:, :3], b[:3]), (a[:, :4], b), None) is not None


@pytest.mark.parametrize("shape", [(24,), (24, 1)])
def test_dora_gain(shape):
    """magnitude * (W + D) / ||W + D|| over rows, from the paper."""
    delta, wanted = CASES["LoRA"]
    assert delta is not None
    weight, magnitude = noise(24, 32), noise(24).abs() + 0.5
    gain = low_rank.dora_gain(weight, delta, magnitude.reshape(shape))
    changed = weight.double() + wanted
    result = magnitude.double()[:, None] * changed / changed.norm(dim=1, keepdim=True)
    rows = delta.scaled_rows(gain)
    ours = gain.double()[:, None] * weight.double() + rows.dense(torch.float64)
    torch.testing.assert_close(ours, result, rtol=1e-5, atol=1e-5)
    assert CASES["LoKr"][0] is not None
    with pytest.raises(ValueError, match="Kronecker"):
        CASES["LoKr"][0].scaled_rows(gain)


@pytest.mark.parametrize("parts", ["text", "image", "vace"])
def test_diffusers_names_are_read_back(parts):
    """As the loader reads them, in the other direction."""
    config = WanConfig(
        dim=256, ffn_dim=512, layers=12, in_dim=16, out_dim=16, image=parts == "image",
        **({"vace_layers": 2, "vace_in_dim": 96} if parts == "vace" else {}),
    )  # fmt: skip
    layers = [name[:-7] for name in parameters(config) if name.endswith(".weight")]
    theirs = {layer: to_diffusers(layer) for layer in layers}
    for layer, name in theirs.items():
        assert Naming("", True).layer(name) == layer
    assert theirs["blocks.11.self_attn.o"] == "blocks.11.attn1.to_out.0"
    # No spelling stands for two layers.
    found = spellings(layers)
    assert len(found) == len({*map(spelling, layers), *map(spelling, theirs.values())})
    for prefix in ("lora_unet_", "lora_unet__", "pipe.dit.", "base_model.model.transformer.", ""):
        for name in ("blocks_3.attn2.to_q", "blocks.3.cross_attn.q", "blocks_3_cross_attn_q"):
            assert found[spelling(prefix + name)] == "blocks.3.cross_attn.q", prefix + name
    assert spelling("lora_te_blocks_3_cross_attn_q") not in found


def test_endings_of_peft():
    forms = {
        ".lora_A.default.weight": (".lora_A.weight", "default"),
        ".lora_B.weight": (".lora_B.weight", ""),
        ".lora_B.bias": (".lora_B.bias", ""),
        ".lora_B.name.bias": (".lora_B.bias", "name"),
        ".lora_magnitude_vector": (".dora_scale", ""),
        ".lora_magnitude_vector.default.weight": (".dora_scale", "default"),
        ".lora_up.weight": (".lora_up.weight", ""),
        ".lora_up.bias": (".lora_B.bias", ""),
        ".alpha": (".alpha", ""),
    }
    assert {text: (ending(text).text, ending(text).adapter) for text in forms} == forms


def test_report_names_what_was_left():
    left = {f"blocks.{n}.x.lora_A.weight": "no such layer in this model" for n in range(9)}
    report = LoraReport("a.safetensors", 0.5, 20, 9, 2, {**left, "z.alpha": "odd"}, 4, 3_000_000)
    lines = report.text().split("\n")
    assert lines[0] == "a.safetensors at 0.5: 10 of 20 keys not applied:"
    assert lines[1].startswith("- blocks.0.x.lora_A.weight, ") and "and 3 more: no such" in lines[1]
    assert lines[2:4] == ["- z.alpha: odd", "a.safetensors at 0.5: 11 of 20 keys applied"]
    assert lines[4] == "4 layers with an unmerged adapter, 3.0 MB"
    assert report.as_dict()["left"] == dict(report.left)
    whole = LoraReport("a.safetensors", 1.0, 9, 9, 0, {}, 4, 0)
    assert whole.text().split("\n")[0] == "a.safetensors at 1: 9 of 9 keys applied"
