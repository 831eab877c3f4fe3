"""Other packages' attention kernels through stand-ins with their signatures, and torch.compile."""

from __future__ import annotations

import importlib
import sys
import types
from dataclasses import replace

import pytest
import torch
import torch.nn.attention

from frugal.kernels.attention import KernelSelector, packages, torch_sdpa
from frugal.kernels.attention.backends import BACKENDS, TORCH, Backend
from frugal.kernels.attention.call import describe
from frugal.kernels.attention.measure import Decision
from frugal.tests.helpers.attention import by_rows, mask_of, off, tensors

CPU = torch.device("cpu")


def test_the_flash_switch_is_put_back():
    attention_module = torch.nn.attention
    if not hasattr(attention_module, "activate_flash_attention_impl"):
        pytest.skip("this PyTorch cannot switch its flash kernel")
    log = []

    class Handle:
        def remove(self):
            log.append("removed")

    attention_module.register_flash_attention_impl("frugal-test", register_fn=Handle)
    with pytest.raises(KeyError), torch_sdpa.flash_implementation("frugal-test"):
        assert attention_module.current_flash_attention_impl() == "frugal-test"
        raise KeyError
    assert attention_module.current_flash_attention_impl() is None and log == ["removed"]
    attention_module.activate_flash_attention_impl("frugal-test")
    try:
        with pytest.raises(ValueError), torch_sdpa.flash_implementation("nobody"):
            pass
        assert attention_module.current_flash_attention_impl() == "frugal-test"
    finally:
        attention_module.restore_flash_attention_impl()


def install(monkeypatch, name, **functions):
    module = types.ModuleType(name)
    for key, value in functions.items():
        setattr(module, key, value)
    monkeypatch.setitem(sys.modules, name, module)
    return module


def plain(q, k, v, scale, mask=None):
    """(B, L, H, D) in and out, as the packages' functions have it."""
    q, k, v = (each.transpose(1, 2) for each in (q, k, v))
    times = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(times, 1), v.repeat_interleave(times, 1)
    return by_rows(q, k, v, mask, scale).transpose(1, 2).to(q.dtype)


@pytest.mark.parametrize(
    ("module", "run", "gives"),
    [
        ("flash_attn", packages.flash_2, lambda out: out),
        ("flash_attn_interface", packages.flash_3, lambda out: (out, None)),
        ("flash_attn.cute", packages.flash_4, lambda out: (out, None)),
    ],
)
def test_flash_packages(monkeypatch, module, run, gives):
    def flash_attn_func(q, k, v, softmax_scale=None, causal=True):
        assert not causal and q.stride(-1) == 1
        return gives(plain(q, k, v, softmax_scale))

    if "." in module:
        install(monkeypatch, module.split(".")[0])
    install(monkeypatch, module, flash_attn_func=flash_attn_func)
    q, k, v = tensors(Hkv=2)
    assert off(run(q, k, v, None, 0.2), by_rows(q, k, v, None, 0.2)) < 1e-6


def test_flash_4_alone_is_no_flash_2(monkeypatch, tmp_path):
    """Its wheel has flash_attn/cute and no flash_attn/__init__.py."""
    (tmp_path / "flash_attn" / "cute").mkdir(parents=True)
    (tmp_path / "flash_attn" / "cute" / "__init__.py").write_text("")
    for name in [name for name in sys.modules if name.partition(".")[0] == "flash_attn"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.syspath_prepend(tmp_path)
    absent = {each.name: each.absent("cuda") for each in BACKENDS}
    assert absent["flash-attn-2"] == "is not installed" and absent["flash-attn-4"] is None
    (tmp_path / "flash_attn" / "__init__.py").write_text("")
    importlib.invalidate_caches()
    for name in [name for name in sys.modules if name.partition(".")[0] == "flash_attn"]:
        monkeypatch.delitem(sys.modules, name)
    assert next(b for b in BACKENDS if b.name == "flash-attn-2").absent("cuda") is None


def test_sage_leaves_the_keys_alone(monkeypatch):
    def sageattn(q, k, v, tensor_layout="HND", is_causal=True, sm_scale=None, smooth_k=True, **_):
        assert tensor_layout == "NHD" and not is_causal
        if smooth_k:
            k -= k.mean(dim=1, keepdim=True)
        assert k.mean(dim=1).abs().max() < 1e-5, "unsmoothed keys lose accuracy in 8 bits"
        return plain(q, k, v, sm_scale)

    install(monkeypatch, "sageattention", sageattn=sageattn)
    q, k, v = tensors(Hkv=2)
    k += 3
    before = k.clone()
    assert off(packages.sage(q, k, v, None, 0.2), by_rows(q, k, v, None, 0.2)) < 1e-5
    assert torch.equal(k, before)


def test_sage_2_smooths_the_keys_itself(monkeypatch):
    """Its front door takes any argument and hands none on."""
    seen = []

    def sageattn(
        q, k, v, tensor_layout="HND", is_causal=False, sm_scale=None, return_lse=False, **kwargs
    ):
        assert not kwargs, "what is dropped here must not be counted on"
        seen.append(k)
        return plain(q, k - k.mean(dim=1, keepdim=True), v, sm_scale)

    install(monkeypatch, "sageattention", sageattn=sageattn)
    q, k, v = tensors(Hkv=2)
    k += 3
    assert off(packages.sage(q, k, v, None, 0.2), by_rows(q, k, v, None, 0.2)) < 1e-5
    # The caller's own keys, not a copy.
    assert seen[0].data_ptr() == k.data_ptr()


@pytest.mark.parametrize("kind", ["none", "bool2", "bool4", "add4"])
def test_xformers_masks(monkeypatch, kind):
    def memory_efficient_attention(q, k, v, attn_bias=None, scale=None):
        if attn_bias is not None:
            assert attn_bias.dtype == q.dtype and attn_bias.stride(-2) % 8 == 0
            assert attn_bias.shape == (2, 4, 9, 13)
        return plain(q, k, v, scale, attn_bias)

    install(monkeypatch, "xformers")
    install(monkeypatch, "xformers.ops", memory_efficient_attention=memory_efficient_attention)
    sys.modules["xformers"].ops = sys.modules["xformers.ops"]
    q, k, v = tensors()
    mask = mask_of(kind)
    four = mask[None, None] if mask is not None and mask.dim() == 2 else mask
    assert off(packages.xformers(q, k, v, four, 0.2), by_rows(q, k, v, mask, 0.2)) < 1e-6


def test_kitchen_int8(monkeypatch):
    def int8_attention(q, k, v, *, scale=None, attn_mask=None):
        assert q.stride(-1) == 1
        return by_rows(q, k, v, attn_mask, scale).to(q.dtype)

    install(monkeypatch, "comfy_kitchen", int8_attention=int8_attention)
    q, k, v = tensors(Hkv=2)
    mask = mask_of("bool4")
    found = packages.kitchen_int8(q, k, v, mask, 0.2)
    assert off(found, by_rows(q, k, v, mask, 0.2)) < 1e-6


def test_package_kernels_do_not_break_a_graph(monkeypatch):
    def flash_attn_func(q, k, v, softmax_scale=None, causal=False):
        print("inside", end="")  # noqa: T201 - what tracing could not follow
        return plain(q, k, v, softmax_scale)

    install(monkeypatch, "flash_attn", flash_attn_func=flash_attn_func)
    q, k, v = tensors(Lq=16, Lk=16)
    torch.library.opcheck(
        torch.ops.frugal.attention_flash_attn_2.default,
        (q, k, v, None, 0.2),
        test_utils=("test_schema", "test_faketensor"),
    )
    half = [each.half() for each in (q, k, v)]
    backend = replace(
        next(b for b in BACKENDS if b.name == "flash-attn-2"), devices=(), package=None
    )
    kernel_selector = KernelSelector(CPU, "flash-attn-2", backends=(backend, TORCH))
    explained = torch._dynamo.explain(lambda *a: kernel_selector.attend(*a) * 2)(*half)
    assert explained.graph_break_count == 0 and explained.graph_count == 1
    nodes = [str(n.target) for n in explained.graphs[0].graph.nodes if n.op == "call_function"]
    assert any("frugal.attention_flash_attn_2" in each for each in nodes), nodes
    found = torch.compile(lambda *a: kernel_selector.attend(*a) * 2, backend="eager")(*half)
    assert off(found, 2 * by_rows(*half, None, 40**-0.5)) < 1e-3


def test_compiled_calls_take_the_remembered_kernel():
    q, k, v = tensors(Lq=16, Lk=16)
    kernel_selector = KernelSelector(CPU, backends=(TORCH, packages_fake()))
    key = kernel_selector._key(describe(q, k, v, None))
    remembered = {key: Decision((("opaque", 1e-3), ("torch", 2e-3)))}
    kernel_selector = KernelSelector(CPU, backends=(TORCH, packages_fake()), decisions=remembered)
    explained = torch._dynamo.explain(lambda *a: kernel_selector.attend(*a))(q, k, v)
    nodes = [str(n.target) for n in explained.graphs[0].graph.nodes]
    assert explained.graph_break_count == 0
    assert any("attention_test_opaque" in each for each in nodes), nodes


def packages_fake():
    run = packages.opaque(
        "test-opaque", lambda q, k, v, m, s: TORCH.run(q, k, v, m, s).transpose(1, 2)
    )
    return Backend("opaque", run, devices=(), dtypes=(), multiple=1)
