"""The attention node inside ComfyUI: layouts, chaining, clones, 8-bit rules, torch.compile."""

from __future__ import annotations

import json

import comfy.ldm.modules.attention as core
import comfy.model_management
import comfy.sample
import comfy.samplers
import pytest
import torch
from comfy.patcher_extension import WrappersMP

from frugal.kernels.attention import selector
from frugal.kernels.attention.backends import BACKENDS, TORCH
from frugal.kernels.errors import FrugalError
from frugal.nodes.sampling import attention_run
from frugal.nodes.sampling.attention import FrugalAttention
from frugal.nodes.wan import load_run
from frugal.tests.helpers import wan as wan_bed
from frugal.tests.helpers.attention import by_rows, fake, mask_of, off, tensors

pytestmark = pytest.mark.usefixtures("inference")
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def no_memory(tmp_path, monkeypatch):
    """Each test with a user folder of its own, so that none remembers another's choice."""
    monkeypatch.setattr(attention_run, "choices_file", lambda: tmp_path / "attention.json")
    return tmp_path / "attention.json"


@pytest.fixture
def backends(monkeypatch):
    """Replace the table of kernels: a call with the wanted ones."""

    def put(*wanted):
        monkeypatch.setattr(attention_run, "BACKENDS", wanted)
        monkeypatch.setattr(selector.KernelSelector.__init__, "__defaults__", defaults(wanted))

    return put


def defaults(wanted):
    return tuple(
        wanted if value is BACKENDS else value
        for value in selector.KernelSelector.__init__.__defaults__
    )


def wan(tmp_path, config=wan_bed.T2V, name="wan.safetensors"):
    path = wan_bed.write(tmp_path / name, wan_bed.weights(config))
    return load_run.load_wan(path)[0]


def sampled(model, steps=2, cfg=1.0, seed=5, callback=None, size=8):
    latent = torch.zeros(1, 16, 2, size, size)
    noise = comfy.sample.prepare_noise(latent, seed)
    context = 0.1 * torch.randn(1, 12, 4096, generator=torch.Generator().manual_seed(9))
    cond = [[context, {}]]
    levels = model.get_model_object("model_sampling")
    return comfy.sample.sample_custom(
        model, noise, cfg, comfy.samplers.sampler_object("euler"),
        comfy.samplers.calculate_sigmas(levels, "simple", steps), cond, cond, latent,
        callback=callback, disable_pbar=True, seed=seed,
    )  # fmt: skip


def rows(model):
    return model.get_attachment(attention_run.KEY).table.rows


# Layouts, outside a model: the wrapped function of ComfyUI with our override in its options.


def run_options(earlier=None, **kernel_selector):
    token = "here"
    run = attention_run.Run(selector.KernelSelector(CPU, **kernel_selector), [True])
    override = attention_run.make_override(token, earlier)
    return {attention_run.ATTENTION_OVERRIDE: override, attention_run.KEY: {token: run}}, run


def laid_out(q, k, v, skip_reshape):
    if skip_reshape:
        return q, k, v
    return tuple(each.transpose(1, 2).flatten(2) for each in (q, k, v))


@pytest.mark.parametrize("kind", ["none", "bool2", "bool3", "bool4", "add2", "add3", "add4"])
@pytest.mark.parametrize("skip_output", [False, True])
@pytest.mark.parametrize("skip_reshape", [False, True])
@pytest.mark.parametrize("kv_heads", [4, 2])
def test_layouts_masks_and_grouped_heads(kind, skip_reshape, skip_output, kv_heads):
    q, k, v = tensors(Hkv=kv_heads)
    mask = mask_of(kind)
    more = {"enable_gqa": True, "scale": 0.3} if kv_heads == 2 else {}
    options, _ = run_options()
    for transformer_options in (options, options | {attention_run.KEY: {}}):
        found = core.optimized_attention(
            *laid_out(q, k, v, skip_reshape), heads=4, mask=mask, skip_reshape=skip_reshape,
            skip_output_reshape=skip_output, transformer_options=transformer_options, **more,
        )  # fmt: skip
        want = by_rows(q, k, v, mask, more.get("scale", 40**-0.5))
        want = want if skip_output else want.transpose(1, 2).flatten(2)
        assert found.shape == want.shape and found.dtype == q.dtype
        assert off(found, want) < 1e-6


@pytest.mark.parametrize("width", [40, 80, 128, 160])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_head_widths_and_dtypes(width, dtype):
    q, k, v = tensors(D=width, dtype=dtype)
    options, _ = run_options()
    found = core.optimized_attention(
        *laid_out(q, k, v, False), 4, attn_precision=torch.float32, transformer_options=options
    )
    want = by_rows(q, k, v, None, width**-0.5).transpose(1, 2).flatten(2)
    assert found.dtype == dtype and off(found, want) < (1e-6 if dtype == torch.float32 else 1e-2)


def test_two_stacked_overrides_both_run(backends):
    """A named 8-bit kernel takes long self-attention; the text's few keys go to the first one."""
    eight = fake("eight", lambda out: out * 1.02, exact=False)
    backends(eight, TORCH)
    seen = []

    def first(func, *args, **kwargs):
        seen.append(args[1].shape[1])
        return func(*args, **kwargs)

    options, run = run_options(first, choice="eight", allow_lossy=True)
    q, k, v = laid_out(*tensors(B=1, H=2, Lq=1024, Lk=1024), False)
    call = dict(heads=2, transformer_options=options)
    long = core.optimized_attention(q, k, v, **call)
    short = core.optimized_attention(q, k[:, :257], v[:, :257], **call)
    marked = core.optimized_attention(q, k, v, low_precision_attention=False, **call)
    precise = core.optimized_attention(q, k, v, attn_precision=torch.float32, **call)
    assert eight.run.calls >= 2 and seen == [257, 1024, 1024]
    plain = core.optimized_attention(q, k, v, heads=2)
    assert off(long, 1.02 * plain.double()) < 1e-5
    assert off(marked, plain.double()) < 1e-5 and torch.equal(marked, precise)
    assert off(short, core.optimized_attention(q, k[:, :257], v[:, :257], heads=2).double()) < 1e-6
    handed = {(r.call.k_len, r.names[0]) for (_, c), r in run.kernel_selector.routes.items() if c}
    assert handed == {(1024, "eight"), (1024, "handed on"), (257, "handed on")}
    # The first one's own call of ComfyUI's function comes back to our exact kernels.
    rest = {r.call.k_len: r.calls for (_, c), r in run.kernel_selector.routes.items() if not c}
    assert rest == {1024: 2, 257: 1} and run.kernel_selector.handed_on == 3


def test_auto_does_not_drop_an_override_that_does_more(tmp_path):
    """It gets every call and our kernels in the place of ComfyUI's; one with a kernel of its own
    keeps it.
    """
    model = wan(tmp_path)
    other, seen = model.clone(), []

    def halved(func, q, k, v, *args, **kwargs):
        seen.append(q.shape)
        return func(q, k, 0.5 * v, *args, **kwargs)

    other.model_options["transformer_options"][attention_run.ATTENTION_OVERRIDE] = halved
    want = sampled(other)
    calls = len(seen)
    patched = attention_run.apply(other)
    assert off(sampled(patched), want.double()) < 1e-4 < off(sampled(model), want.double())
    assert len(seen) >= 2 * calls and sum(row.calls for row in rows(patched)) == calls
    assert other.model_options["transformer_options"][attention_run.ATTENTION_OVERRIDE] is halved

    def own_kernel(func, q, k, v, heads, **kwargs):
        return core.attention_pytorch(q, k, v, heads, _inside_attn_wrapper=True)

    other.model_options["transformer_options"][attention_run.ATTENTION_OVERRIDE] = own_kernel
    patched = attention_run.apply(other)
    assert off(sampled(patched), sampled(model).double()) < 1e-4
    assert rows(patched) == ()
    table = patched.get_attachment(attention_run.KEY).table
    assert table.text() == "attention: no calls reached this node"


# Whole models.


@pytest.mark.parametrize("config", [wan_bed.T2V, wan_bed.I2V], ids=["t2v", "i2v"])
def test_wan_is_the_same_picture(tmp_path, config):
    model = wan(tmp_path, config)
    before = sampled(model)
    patched = attention_run.apply(model)
    assert off(sampled(patched), before.double()) < 1e-4
    found = {(row.shape[2], row.shape[3]): row for row in rows(patched)}
    assert set(found) == {(32, 32), (32, 12)}
    # Without an image prompt, I2V attends to the text with both pairs of keys and values.
    text, steps = 2 if config.image else 1, 2
    assert found[32, 32].calls == config.layers * steps
    assert found[32, 12].calls == config.layers * steps * text
    assert all(row.ms > 0 and row.tflops > 0 and row.default_ms > 0 for row in found.values())
    assert torch.equal(sampled(model), before), "the model itself was changed"


def test_wan_image_keys_stay_exact(tmp_path, backends):
    """257 image keys and 12 text keys never reach an 8-bit kernel, the long self-attention does."""
    eight = fake("eight", lambda out: out * 1.02, exact=False)
    backends(eight, TORCH)
    model = wan(tmp_path, wan_bed.I2V)
    arguments = wan_bed.inputs(wan_bed.I2V)
    arguments["x"] = torch.randn(1, 36, 4, 32, 32, generator=torch.Generator().manual_seed(1))
    options, run = run_options(choice="eight", allow_lossy=True)
    comfy.model_management.load_models_gpu([model])
    net = model.model.diffusion_model
    dtype = next(net.parameters()).dtype
    cast = {
        k: v.to(dtype) if k in ("x", "context", "clip_fea") else v for k, v in arguments.items()
    }
    net(**cast, transformer_options=options)
    used = {r.call.k_len: r.names[0] for r in run.kernel_selector.routes.values()}
    assert used.keys() == {1024, 257, 12} and used[1024] == "eight"
    assert "eight" not in (used[257], used[12])


def test_catvton_unet(tmp_path):
    from frugal.nodes.tryon import load_run as loading
    from frugal.tests.helpers.builders import tryon_model

    model = loading.load_catvton(str(tryon_model(tmp_path / "t.safetensors")), None, "fp32")
    comfy.model_management.load_models_gpu([model])
    x = torch.randn(2, 9, 32, 12, generator=torch.Generator().manual_seed(3))
    t = torch.full((2,), 601)
    net = model.model.diffusion_model
    dtype = model.model_dtype()
    before = net(x.to(dtype), t)
    options, run = run_options()
    after = net(x.to(dtype), t, transformer_options=options)
    assert off(after, before.double()) < (1e-4 if dtype == torch.float32 else 2e-2)
    assert {route.call.width for route in run.kernel_selector.routes.values()} == {32, 48}
    assert sum(route.calls for route in run.kernel_selector.routes.values()) >= 5


def test_a_second_run_measures_nothing(tmp_path, no_memory, monkeypatch):
    model = wan(tmp_path)
    sampled(attention_run.apply(model))
    assert no_memory.is_file()
    monkeypatch.setattr(selector, "measure", lambda *a: pytest.fail("measured again"))
    again = attention_run.apply(model)
    sampled(again)
    assert {row.source for row in rows(again)} == {"remembered"}


def test_a_user_folder_that_cannot_be_written(tmp_path, monkeypatch, caplog):
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(attention_run, "choices_file", lambda: tmp_path / "file" / "attention.json")
    model = wan(tmp_path)
    patched = attention_run.apply(model)
    assert off(sampled(patched), sampled(model).double()) < 1e-4
    assert "the measured choices were not kept" in caplog.text


def test_clones_are_independent(tmp_path):
    model = wan(tmp_path)
    options = model.model_options["transformer_options"]
    one, two = attention_run.apply(model), attention_run.apply(model, "chunked")
    assert attention_run.ATTENTION_OVERRIDE not in options
    assert not model.wrappers.get(WrappersMP.OUTER_SAMPLE)
    first, second = sampled(one), sampled(two)
    assert {row.backend for row in rows(two)} == {"chunked"}
    assert all(row.refused.get("chunked") is None for row in rows(two))
    assert off(first, second.double()) < 1e-4
    assert len(rows(one)) == len(rows(two)) == 2
    assert len(one.wrappers[WrappersMP.OUTER_SAMPLE][attention_run.KEY]) == 1


class Stop(BaseException):
    pass


@pytest.mark.parametrize("error", [Stop, RuntimeError])
def test_cancel_leaves_nothing(tmp_path, error):
    model = wan(tmp_path)
    patched = attention_run.apply(model)
    options = patched.model_options["transformer_options"]

    def cancel(step, x0, x, total):
        raise error

    with pytest.raises(error):
        sampled(patched, callback=cancel)
    assert attention_run.KEY not in options
    assert all(row.calls == wan_bed.T2V.layers for row in rows(patched))
    before = sampled(model)
    assert off(sampled(patched), before.double()) < 1e-4


def test_eight_bits_only_in_their_steps(tmp_path):
    model = wan(tmp_path)
    levels = model.get_model_object("model_sampling")
    sigmas = comfy.samplers.calculate_sigmas(levels, "simple", 8)
    allowed = attention_run.allowed_steps(model, sigmas, (0.2, 0.8))
    inside = [
        levels.percent_to_sigma(0.8) <= s <= levels.percent_to_sigma(0.2) for s in sigmas[:-1]
    ]
    assert allowed == [bool(each) for each in inside] and 0 < sum(allowed) < 8
    assert attention_run.allowed_steps(model, sigmas, (0.0, 1.0)) == [True] * 8
    seen = []
    patched = attention_run.apply(model, allow_8bit=True, start=0.2, end=0.8)

    def watch(executor, *args, **kwargs):
        (options,) = (each for each in args if isinstance(each, dict) and attention_run.KEY in each)
        (run,) = options[attention_run.KEY].values()
        seen.append(run.lossy)
        return executor(*args, **kwargs)

    patched.add_wrapper_with_key(WrappersMP.DIFFUSION_MODEL, "watch", watch)
    sampled(patched, steps=8)
    assert seen == allowed


def test_torch_compile_has_no_break_of_ours(tmp_path):
    model = wan(tmp_path)
    comfy.model_management.load_models_gpu([model])
    net = model.model.diffusion_model
    dtype = next(net.parameters()).dtype
    block = net.blocks[0]
    g = torch.Generator().manual_seed(0)
    x = torch.randn(1, 32, 256, generator=g).to(dtype)
    e = 0.1 * torch.randn(1, 1, 6, 256, generator=g).to(dtype)
    context = torch.randn(1, 12, 256, generator=g).to(dtype)
    freqs = net.rope_encode(2, 8, 8, device=CPU, dtype=dtype)
    options, _ = run_options()

    def forward(x):
        return block(x, e=e, freqs=freqs, context=context, transformer_options=options)

    explained = torch._dynamo.explain(forward)(x)
    assert explained.graph_break_count == 0, explained.break_reasons
    want = block(x, e=e, freqs=freqs, context=context)
    found = torch.compile(forward, backend="eager")(x)
    assert off(found, want.double()) < (1e-5 if dtype == torch.float32 else 2e-2)


# The node.


def test_the_node(tmp_path):
    model = wan(tmp_path)
    node = FrugalAttention.PREPARE_CLASS_CLONE({"hidden_inputs": {}})
    patched, text = node.execute(model, "auto", False, 0.0, 1.0).args
    assert patched is not model and patched.model is model.model
    assert text.startswith("kernels for cpu: torch, torch-math, torch-upcast, chunked")
    assert "runs on cuda, not on cpu" in text
    with pytest.raises(FrugalError, match="sage runs on cuda, not on cpu; expected"):
        node.execute(model, "sage", True, 0.0, 1.0)


def test_an_8_bit_kernel_needs_leave(tmp_path, backends):
    backends(fake("eight", exact=False), TORCH)
    model = wan(tmp_path)
    with pytest.raises(FrugalError, match="eight computes in 8 bits and allow_8bit is off"):
        attention_run.apply(model, "eight")
    assert attention_run.apply(model, "eight", allow_8bit=True) is not model


def test_the_run_report_shows_it(tmp_path):
    from frugal.nodes.memory.run_report import FrugalReport

    patched = attention_run.apply(wan(tmp_path))
    node = FrugalReport.PREPARE_CLASS_CLONE({"hidden_inputs": {}})
    text, _ = node.execute(0.0, "USD", patched).args
    assert "attention" not in text
    sampled(patched)
    text, data = node.execute(0.0, "USD", patched.clone(), patched).args
    assert text.count("attention on cpu") == 1 and "1x2 heads x 32 on 32 tokens x 128" in text
    (table,) = json.loads(data)["attention"]
    assert sorted(row["shape"] for row in table["rows"]) == [
        [1, 2, 32, 12, 128],
        [1, 2, 32, 32, 128],
    ]
