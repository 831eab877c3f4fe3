"""Every gate on the kind of card, taken and refused: by compute capability from the tables that
hold the limits, and by a pretended device without 8-bit floats, float64 or products of integers.
"""

from __future__ import annotations

import sys
import types
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from frugal.kernels import device_types
from frugal.kernels.attention import measure, packages
from frugal.kernels.attention.backends import BACKENDS, NAMED
from frugal.kernels.causal import paged_kernels, strategies
from frugal.kernels.causal.cache import VideoCache
from frugal.kernels.causal.options import CacheOptions
from frugal.kernels.causal.storage import PageFormat
from frugal.kernels.checkpoints.layouts import LayerLayout
from frugal.kernels.checkpoints.matmul_precision import AUTO, LOW, plan_matmul
from frugal.kernels.compile import graphs
from frugal.kernels.errors import FrugalError
from frugal.kernels.formats import fp8_linear, hardware
from frugal.kernels.memory import doctor
from frugal.kernels.quantize import compiled

# GTX 1080, V100, RTX 20, A100, RTX 30, RTX 40, H100, B200, RTX 50.
CARDS = ((6, 1), (7, 0), (7, 5), (8, 0), (8, 6), (8, 9), (9, 0), (10, 0), (12, 0))
CUDA = torch.device("cuda")
HALF, BRAIN = torch.float16, torch.bfloat16
ALL = CARDS


def since(major: int, minor: int) -> tuple[tuple[int, int], ...]:
    return tuple(card for card in CARDS if card >= (major, minor))


# Kernel -> the cards that may run it, in fp16 and in bfloat16, written from the packages' own
# statements and checks.
ATTENTION = {
    "torch": (ALL, ALL),
    "chunked": (ALL, ALL),
    "torch-math": (ALL, ALL),
    "torch-cudnn": (since(8, 0), since(8, 0)),
    "torch-flash": (since(8, 0), since(8, 0)),
    "torch-efficient": (ALL, since(8, 0)),
    "torch-fa3": (((9, 0),), ((9, 0),)),
    "flash-attn-2": (since(8, 0), since(8, 0)),
    "flash-attn-3": (((9, 0),), ((9, 0),)),
    "flash-attn-4": (since(9, 0), since(9, 0)),
    "xformers": (ALL, since(8, 0)),
    "kitchen-int8": (since(7, 5), since(7, 5)),
    "sage": (since(8, 0), since(8, 0)),
    "flex": (since(7, 0), since(8, 0)),
}
# Format -> the cards that multiply in it.
FORMATS = {
    "float8_e4m3fn": since(8, 9),
    "float8_e5m2": since(8, 9),
    "int8_tensorwise": since(7, 5),
    "convrot_w4a4": since(7, 5),
    "asym_w4a8_int8": since(8, 0),
    "nvfp4": since(10, 0),
    "mxfp8": since(10, 0),
}
PAGED = {
    "FlashAttention 3": ((9, 0),),
    "varlen_attn": since(8, 0),
    "flex_attention": since(7, 0),
}


def taken(allows) -> tuple[tuple[int, int], ...]:
    return tuple(card for card in CARDS if allows(card))


def test_every_kernel_has_its_cards():
    assert set(ATTENTION) == {each.name for each in BACKENDS if each.devices != ("cpu",)}
    assert set(FORMATS) == set(hardware.FORMATS)
    assert set(PAGED) == {each.name for each in paged_kernels.KERNELS}


@pytest.mark.parametrize("name", list(ATTENTION))
def test_attention_by_card(name):
    for dtype, cards in zip((HALF, BRAIN), ATTENTION[name], strict=True):
        backend = NAMED[name]
        assert taken(lambda c, b=backend, d=dtype: b.refused_card(c, d) is None) == cards
    for card in set(CARDS) - set(cards):
        assert "compute capability" in (backend.refused_card(card, BRAIN) or "")


def on_card(monkeypatch, card):
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: card)
    monkeypatch.setattr(paged_kernels, "_has_triton", lambda: True)
    monkeypatch.setattr(paged_kernels, "importable", lambda _: True)
    monkeypatch.setattr(paged_kernels, "flash_3", lambda: None)
    # As torch 2.13 has it.
    monkeypatch.setattr(paged_kernels, "varlen", lambda: lambda block_table, seqused_k: None)


@pytest.mark.parametrize("card", CARDS, ids=str)
def test_the_causal_cache_by_card(monkeypatch, card):
    on_card(monkeypatch, card)
    modern = card in since(8, 0)
    assert strategies.cuda_kernel(HALF, CUDA) == (
        strategies.FLASH if modern else strategies.EFFICIENT
    )
    assert strategies.cuda_kernel(BRAIN, CUDA) == (strategies.FLASH if modern else "")
    why = paged_kernels.refusals(PageFormat((1, 1024, 12, 128), HALF), CUDA, 9)
    assert {name for name, reason in why.items() if not reason} == {
        name for name, cards in PAGED.items() if card in cards
    }


def facts(card, **changes) -> doctor.Facts:
    on = {"cuda": doctor.Backend(True, False, None, dict.fromkeys(hardware.INTEGER.values(), None))}
    for name, kernel in hardware.INTEGER.items():
        on["cuda"].kernels[kernel] = FORMATS[name][0]
    base: dict[str, Any] = dict(
        comfyui="1", torch="2", cuda="13.0", device="card", kind="cuda", capability=card,
        memory_total=10**10, memory_free=10**10, ram_total=10**10, ram_free=10**10,
        kitchen="1", kitchen_used=True, backends=on, formats=tuple(FORMATS),
        attention=dict.fromkeys(doctor.ATTENTION, "1"),
    )  # fmt: skip
    return doctor.Facts(**base | changes)


@pytest.mark.parametrize("name", list(FORMATS))
def test_formats_by_card(name):
    layers = SimpleNamespace(file="wan.safetensors", layers={"a": LayerLayout(name)})

    def low(card) -> bool:
        try:
            plan_matmul(layers, LOW, card, "cuda:0")
        except FrugalError as error:
            assert "set matmul to auto" in str(error)
            return False
        return True

    def native(card) -> bool:
        found = {each.name: each.state for each in doctor.diagnose(facts(card)).formats}
        return found[hardware.FORMATS[name][0]] == doctor.NATIVE

    assert taken(low) == taken(native) == FORMATS[name]


def test_formats_as_comfy_kitchen_declares_them(monkeypatch):
    """What its compiled kernels need by their own account, independent of our table."""
    compiled = pytest.importorskip("comfy_kitchen.backends.cuda")
    if not hasattr(compiled, "_build_constraints"):
        pytest.skip("this comfy-kitchen keeps its limits elsewhere")
    # Without a card it leaves out what goes through cuBLASLt.
    monkeypatch.setattr(compiled, "_CUBLASLT_AVAILABLE", True)
    rules = compiled._build_constraints()
    kernels = {**hardware.INTEGER, "nvfp4": "scaled_mm_nvfp4"}
    found = {name: rules[kernel].min_compute_capability for name, kernel in kernels.items()}
    assert found == {name: hardware.FORMATS[name][1] for name in kernels}


@pytest.mark.parametrize("card", CARDS, ids=str)
def test_the_doctor_reads_the_same_table(card):
    found = {each.name: each for each in doctor.diagnose(facts(card)).attention}
    for label, kernel, *_ in doctor.ATTENTION.values():
        refused = kernel.refused_card(card)
        finding = found[f"{label} 1"]
        assert (finding.state == "no use here") == (refused is not None)
        assert refused is None or finding.meaning == refused


@pytest.mark.parametrize("card", CARDS, ids=str)
def test_a_torch_for_an_older_cuda(card):
    """The remedy is one that works for this card: CUDA 13 has no code for the oldest."""
    off = {"cuda": doctor.Backend(True, True, None, {})}
    text = doctor.diagnose(facts(card, cuda="12.8", backends=off)).text()
    assert "torch is built for CUDA 12.8" in text
    assert ("install a torch built for CUDA 13.0" in text) == (card >= (7, 5))
    assert ("uses PyTorch's own matmuls" in text) == (card < (7, 5))
    assert "int8: plain PyTorch" in text
    plain = {"int8_tensorwise": doctor.why_compiled_off("12.8", card)}
    layers = SimpleNamespace(file="f", layers={"a": LayerLayout("int8_tensorwise")})
    found = plan_matmul(layers, AUTO, card, "cuda:0", plain)
    assert not found.expanded and "torch is built for CUDA 12.8" in found.notes[0]


def test_eight_bit_attention_follows_the_switch(monkeypatch):
    """comfy-kitchen calls its attention available where ComfyUI switched its kernels off, too."""

    def states(disabled):
        return lambda: {"cuda": {"available": True, "disabled": disabled}}

    kitchen = types.ModuleType("comfy_kitchen")
    kitchen.int8_attention_is_available = lambda: True
    monkeypatch.setitem(sys.modules, "comfy_kitchen", kitchen)
    kitchen.list_backends = states(False)
    assert packages.kitchen_missing() is None
    kitchen.list_backends = states(True)
    assert "is off" in (packages.kitchen_missing() or "")
    kitchen.int8_attention_is_available = lambda: False
    kitchen.list_backends = states(False)
    assert "not for this device" in (packages.kitchen_missing() or "")


@pytest.mark.parametrize(("cuda", "off"), [("12.8", True), (None, True), ("13.0", False)])
def test_without_comfyui_its_switch_is_followed(monkeypatch, cuda, off):
    """Their CUDA runtime is 13; an older driver refuses it at the first call."""
    kitchen, switched = types.ModuleType("comfy_kitchen"), []
    kitchen.registry = SimpleNamespace(disable=switched.append)
    monkeypatch.setitem(sys.modules, "comfy_kitchen", kitchen)
    monkeypatch.setattr(torch.version, "cuda", cuda)
    assert bool(compiled.follow_comfyui()) == off
    assert switched == ["cuda"] * off


@pytest.mark.parametrize(
    ("name", "do"),
    [("TritonMissing", "install it, or turn"), ("GPUTooOldForTriton", "turn compiling off, for")],
)
def test_no_triton_and_a_card_that_it_does_not_know(monkeypatch, name, do):
    """torch's own errors, raised where inductor raises them."""
    from torch._inductor import exc

    monkeypatch.setattr(graphs.os, "name", "posix")
    card = SimpleNamespace(name="GTX 1080", major=6, minor=1)
    arguments = (card, None) if name.startswith("GPU") else (None,)
    error = getattr(exc, name)(*arguments)

    def backend(*_):
        raise error

    monkeypatch.setattr(torch._dynamo, "lookup_backend", lambda _: backend)
    with pytest.raises(FrugalError, match="could not compile") as raised:
        graphs.Graphs("inductor")(torch.nn.Identity(), torch.ones(3))
    assert raised.value.do.startswith(do)
    monkeypatch.setattr(graphs.os, "name", "nt")
    assert ("triton-windows" in graphs.cannot(error).do) == (name == "TritonMissing")


@pytest.mark.parametrize("inside", [True, False])
def test_a_scaled_product_without_scales_per_row(monkeypatch, inside):
    """As on Windows or a card of Ada with an older torch: one scale for a whole matrix is all."""

    def scaled_mm(a, b, scale_a, scale_b, out_dtype):
        if scale_a.numel() > 1 and not inside:
            raise RuntimeError("rowwise scaling is only supported with CUDA SM90")
        return (a.float() @ b.float() * scale_a * scale_b).to(out_dtype)

    monkeypatch.setattr(fp8_linear, "_scaled_mm", scaled_mm)
    cpu, e4m3 = torch.device("cpu"), torch.float8_e4m3fn
    name, product = fp8_linear.choose(cpu, e4m3)
    assert name == ("scales inside" if inside else "scales outside")
    x, weight = torch.randn(5, 32), torch.randn(16, 32).to(e4m3)
    scale = 0.5 + torch.rand(16, 1)
    found = fp8_linear.fp8_linear(x, weight, scale, None, product)
    wanted = fp8_linear.fp8_linear(x, weight, scale, None)
    assert (found - wanted).norm() < 0.01 * wanted.norm()
    monkeypatch.setattr(fp8_linear, "_scaled_mm", None)
    with pytest.raises(FrugalError, match="set matmul to auto"):
        fp8_linear.choose(cpu, e4m3)


def test_kernels_are_timed_on_every_kind_of_device(monkeypatch):
    """torch.mps.synchronize takes no device; a device that torch has no module for is not waited
    for.
    """
    waited = []
    monkeypatch.setattr(torch.mps, "synchronize", lambda: waited.append("mps"))
    monkeypatch.setattr(torch.xpu, "synchronize", lambda device=None: waited.append(device))
    for kind in ("mps", "xpu", "cpu", "privateuseone"):
        assert measure._clock(torch.device(kind, 0 if kind == "xpu" else None))() > 0
    assert waited == ["mps", torch.device("xpu", 0)]


FLOAT8 = (torch.float8_e4m3fn, torch.float8_e5m2)
PRETENDED = torch.device("meta")


class Lacks(TorchDispatchMode):
    """Refuses tensors of these types, and these operators, on a pretended device."""

    def __init__(self, dtypes=(), operators=(), device: str = PRETENDED.type):
        super().__init__()
        self.dtypes, self.operators, self.device = dtypes, operators, device

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        held = [x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
        if func in self.operators and any(x.device.type == self.device for x in held):
            raise NotImplementedError(f"{func} is not implemented for this device")
        out = func(*args, **kwargs or {})
        for made in tree_leaves(out):
            there = isinstance(made, torch.Tensor) and made.device.type == self.device
            if there and made.dtype in self.dtypes:
                raise TypeError(f"this device has no {made.dtype}, asked for by {func}")
        return out


@pytest.fixture(autouse=True)
def fresh():
    """What was found out of a device is kept for the process."""
    for function in (device_types.why_no_float8, device_types.why_no_int8_product):
        function.cache_clear()
    yield
    for function in (device_types.why_no_float8, device_types.why_no_int8_product):
        function.cache_clear()


def test_a_device_without_eight_bit_floats_is_found_out():
    assert device_types.why_no_float8(PRETENDED) == ""
    assert device_types.why_no_float8(torch.device("cpu")) == ""
    device_types.why_no_float8.cache_clear()
    with Lacks(FLOAT8):
        assert "no torch.float8_e4m3fn" in device_types.why_no_float8(PRETENDED)
        assert device_types.why_no_float8(torch.device("cpu")) == ""
        with pytest.raises(
            FrugalError, match="the cache is to be in fp8, and meta has no"
        ) as found:
            VideoCache(PageFormat((1, 16, 2, 12), HALF, "fp8"), 1, PRETENDED, CacheOptions(2, 1))
        assert found.value.do == "keep it in int8 or as computed"
        VideoCache(PageFormat((1, 16, 2, 12), HALF, "int8"), 1, PRETENDED, CacheOptions(2, 1))


def test_the_doctor_names_what_such_a_device_cannot():
    apple = facts(None, device="mps", kind="mps", cuda=None, backends={}, no_float8="none here")
    found = {each.name: each for each in doctor.diagnose(apple).formats}
    for name, (label, _) in hardware.FORMATS.items():
        without = name in ("int8_tensorwise", "convrot_w4a4")
        assert found[label].state == (doctor.PLAIN if without else doctor.IMPOSSIBLE), name
    assert "int8, GPTQ, AWQ or GGUF" in found["W4A8"].meaning
    apple = facts(None, device="mps", kind="mps", cuda=None, backends={}, no_int8="none here")
    found = {each.name: each for each in doctor.diagnose(apple).formats}
    assert found["int8"].state == doctor.EMULATED and "none here" in found["int8"].meaning


def test_a_device_without_products_of_integers_expands():
    assert device_types.why_no_int8_product(torch.device("cpu")) == ""
    with Lacks(operators=(torch.ops.aten._int_mm.default,)):
        why = device_types.why_no_int8_product(PRETENDED)
    assert "not implemented" in why
    held = {"a": LayerLayout("int8_tensorwise"), "b": LayerLayout("float8_e4m3fn")}
    layers = SimpleNamespace(file="f", layers=held)
    plain = {"int8_tensorwise": doctor.why_plain("int8_tensorwise", None)}
    found = plan_matmul(layers, AUTO, None, "mps", plain, why)
    assert found.expanded == ("a",)
    assert "mps has no integer matmul" in found.notes[0]
    only = SimpleNamespace(file="f", layers={"a": held["a"]})
    with pytest.raises(FrugalError, match="set matmul to auto or full"):
        plan_matmul(only, LOW, None, "mps", plain, why)
