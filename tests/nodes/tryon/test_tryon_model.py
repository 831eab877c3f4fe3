"""The loaded MODEL against diffusers' UNet with skipped cross-attention, from every file kind."""

from __future__ import annotations

import json

import comfy.model_management
import comfy.model_patcher
import comfy.model_sampling
import comfy.sample
import comfy.supported_models
import comfy.utils
import pytest
import torch
from comfy.model_detection import detect_unet_config
from diffusers import AutoencoderKL, UNet2DConditionModel
from safetensors.torch import save_file

from frugal.kernels.checkpoints import catvton
from frugal.kernels.errors import FrugalError
from frugal.kernels.tryon.schedule import ddim_timesteps
from frugal.nodes._comfy import REPORT_KEY
from frugal.nodes.tryon import glue, load_run, unet
from frugal.nodes.tryon import sigmas as sampling
from frugal.tests.helpers import tryon as bed
from frugal.tests.helpers.tryon import (
    HEADS,
    META,
    FakeVAE,
    attention_tensors,
    forward,
    inputs,
    make_unet,
    relative,
    run,
    scene,
    skip_cross_attention,
    state,
)


@pytest.fixture(scope="module")
def base():
    return make_unet(0)


@pytest.fixture(scope="module")
def tuned(base):
    """The base with other self-attention: what the attention file turns it into."""
    other = make_unet(1).state_dict()
    tuned = make_unet(0)
    tuned.load_state_dict(
        {
            name: other[name] if ".attn1." in name else tensor
            for name, tensor in base.state_dict().items()
        }
    )
    return skip_cross_attention(tuned)


@pytest.fixture(scope="module")
def folder(tmp_path_factory, base, tuned):
    root = tmp_path_factory.mktemp("catvton")
    weights = state(base)
    table = comfy.utils.unet_to_diffusers(catvton.unet_config(load_run.shapes_of(weights), "x"))
    ldm = {table[name]: tensor for name, tensor in weights.items()}
    whole = {f"model.diffusion_model.{name}": tensor for name, tensor in ldm.items()}
    whole["first_stage_model.encoder.conv_in.bias"] = torch.zeros(3)
    save_file(weights, root / "diffusers.safetensors", META)
    save_file(ldm, root / "ldm.safetensors", META)
    save_file(whole, root / "checkpoint.safetensors", META)
    save_file(attention_tensors(tuned), root / "attention.safetensors")
    merged = {name: t for name, t in state(tuned).items() if ".attn2." not in name}
    save_file(merged, root / "merged.safetensors", META | {"frugal.licence": "CC0"})
    (root / "folder" / "unet").mkdir(parents=True)
    save_file(weights, root / "folder" / "unet" / "diffusion_pytorch_model.safetensors")
    (root / "folder" / "unet" / "config.json").write_text(json.dumps({"attention_head_dim": HEADS}))
    return root


def report_text(patcher):
    return patcher.attachments[REPORT_KEY].text()


BASES = ["diffusers.safetensors", "ldm.safetensors", "checkpoint.safetensors", "folder"]


@pytest.mark.parametrize("name", BASES)
def test_every_naming_gives_the_reference_forward(folder, tuned, name):
    patcher = load_run.load_catvton(
        str(folder / name), str(folder / "attention.safetensors"), "fp32"
    )
    x, t = inputs()
    assert relative(run(patcher, x, t), forward(tuned, x, t)) <= 1e-5
    assert ("other parts" in report_text(patcher)) == (name == "checkpoint.safetensors")
    assert not [k for k in patcher.model.diffusion_model.state_dict() if ".attn2." in k]
    report = patcher.attachments[REPORT_KEY]
    assert report.licence == load_run.WEIGHTS_LICENCE and "attention.safetensors" in report.files
    stored = sum(p.nbytes for p in patcher.model.diffusion_model.parameters())
    assert report.formats == {"float32": stored}


def test_a_merged_file_without_cross_attention_loads(folder, tuned):
    patcher = load_run.load_catvton(str(folder / "merged.safetensors"), None, "fp32")
    x, t = inputs()
    assert relative(run(patcher, x, t), forward(tuned, x, t)) <= 1e-5
    assert patcher.attachments[REPORT_KEY].licence == "CC0"
    assert "dresses nobody" not in report_text(patcher)
    plain = load_run.load_catvton(str(folder / "ldm.safetensors"), None, "fp32")
    assert "dresses nobody" in report_text(plain)


def test_plain_fp8_weights_compute_what_their_values_say(folder, tmp_path):
    merged, _ = load_run.read_file(str(folder / "merged.safetensors"))
    small = {n: t.to(torch.float8_e4m3fn) if t.ndim > 1 else t for n, t in merged.items()}
    save_file(small, tmp_path / "fp8.safetensors", META)
    patcher = load_run.load_catvton(str(tmp_path / "fp8.safetensors"), None, "auto")
    reference = skip_cross_attention(make_unet(0))
    reference.load_state_dict({n: t.float() for n, t in small.items()}, strict=False)
    x, t = inputs()
    assert relative(run(patcher, x, t), forward(reference, x, t)) <= 1e-5


def test_a_damaged_file_is_refused(folder, tmp_path):
    path = tmp_path / "cut.safetensors"
    path.write_bytes((folder / "ldm.safetensors").read_bytes()[:-100])
    with pytest.raises(FrugalError, match=r"cut\.safetensors"):
        load_run.load_catvton(str(path), None, "fp32")


def test_skipping_differs_from_deleting_and_from_stock_cross_attention(folder, tuned):
    x, t = inputs()
    want = forward(tuned, x, t)
    patcher = load_run.load_catvton(str(folder / "merged.safetensors"), None, "fp32")
    model = patcher.model.diffusion_model
    for name in unet.cross_attention_modules(model):
        comfy.utils.set_attr(model, name, None)
    assert relative(run(patcher, x, t), want) > 0.1
    stock = make_unet(0)
    stock.load_state_dict(tuned.state_dict())
    assert relative(forward(stock, x, t), want) > 0.1


def test_the_object_patch_way_is_the_same_and_comes_off(folder, base):
    tensors, _ = load_run.read_file(str(folder / "ldm.safetensors"))
    config = comfy.supported_models.SD15(detect_unet_config(tensors, ""))
    config.unet_config["num_heads"] = HEADS
    config.set_inference_dtype(torch.float32, None)
    model = config.get_model(tensors, "").load_model_weights(dict(tensors), "")
    cpu = torch.device("cpu")
    stock = comfy.model_patcher.ModelPatcher(model, load_device=cpu, offload_device=cpu)
    x, t = inputs()
    context = torch.zeros(2, 1, 8)
    before = run(stock, x, t, context)
    assert relative(before, forward(base, x, t)) <= 1e-5
    skipped = unet.apply_skip_cross_attention(stock)
    reference = skip_cross_attention(make_unet(0))
    assert relative(run(skipped, x, t, context), forward(reference, x, t)) <= 1e-5
    comfy.model_management.unload_all_models()
    assert torch.equal(run(stock, x, t, context), before)


def test_mapped_files_are_not_written_to(folder):
    path = folder / "ldm.safetensors"
    before = path.read_bytes()
    patcher = load_run.load_catvton(str(path), str(folder / "attention.safetensors"), "fp32")
    with torch.no_grad():
        for parameter in patcher.model.diffusion_model.parameters():
            parameter.zero_()
    assert path.read_bytes() == before
    again = load_run.load_catvton(str(path), None, "fp32")
    assert any(p.abs().max() > 0 for p in again.model.diffusion_model.parameters())


def test_dtypes(folder):
    path = str(folder / "merged.safetensors")
    auto = load_run.load_catvton(path, None, "auto")
    assert auto.model.get_dtype() == torch.float32  # a CPU computes fp16 slowly
    x, t = inputs()
    want = run(auto, x, t)
    for name, dtype, limit in (("fp16", torch.float16, 5e-3), ("bf16", torch.bfloat16, 3e-2)):
        half = load_run.load_catvton(path, None, name)
        assert {p.dtype for p in half.model.diffusion_model.parameters()} == {dtype}
        assert 0 < relative(run(half, x, t), want) < limit


def test_prediction_type_reaches_the_model(folder, tmp_path, tuned):
    save_file(state(tuned), tmp_path / "v.safetensors", META | {"modelspec.prediction_type": "v"})
    patcher = load_run.load_catvton(str(tmp_path / "v.safetensors"), None, "fp32")
    assert patcher.model.model_type.name == "V_PREDICTION"
    assert load_run.load_catvton(
        str(folder / "merged.safetensors"), None, "fp32"
    ).model.model_type.name == ("EPS")


def test_bad_files_are_refused_with_the_reason(folder, tmp_path, base, tuned):
    def refused(tensors, match, metadata=META, attention=None):
        path = tmp_path / "bad.safetensors"
        save_file(tensors, path, metadata)
        with pytest.raises(FrugalError, match=match):
            load_run.load_catvton(str(path), attention, "fp32")

    good = state(base)
    refused(state(make_unet(0, 4)), "4 input channels .a plain text-to-image model")
    refused(state(make_unet(0, 5)), "5 input channels; expected the 9")
    refused({n: t for n, t in good.items() if n != "conv_out.bias"}, "lacks 1 tensors")
    refused(good | {"extra.weight": torch.zeros(1)}, "1 unknown tensors, the first 'extra.weight'")
    ldm, _ = load_run.read_file(str(folder / "ldm.safetensors"))
    scaled = "input_blocks.4.1.transformer_blocks.0.attn1.to_q.weight_scale"
    refused(ldm | {scaled: torch.ones(())}, "unknown ones .'input_blocks.4.1")
    refused(
        {n: t for n, t in ldm.items() if n != "input_blocks.3.0.out_layers.3.weight"},
        "is incomplete",
    )
    refused(good | {"conv_in.bias": torch.zeros(3)}, "contradicts its own structure")
    refused(good, "num_heads '5'", {"num_heads": "5"})
    attention = tmp_path / "attention.safetensors"
    tensors = attention_tensors(tuned)
    swapped = dict(tensors)
    for tensor in catvton.TENSORS:
        swapped[f"32.{tensor}"], swapped[f"48.{tensor}"] = (
            tensors[f"48.{tensor}"],
            tensors[f"32.{tensor}"],
        )
    save_file(swapped, attention)
    refused(good, "belong together", attention=str(attention))
    with pytest.raises(FrugalError, match="no UNet weights under unet/"):
        load_run.load_catvton(str(tmp_path), None, "fp32")


def test_reload_factory_gives_the_same_model(folder):
    args = (
        str(folder / "ldm.safetensors"),
        str(folder / "attention.safetensors"),
        "fp32",
        "as stored",
    )
    patcher = load_run.load_catvton(*args)
    if getattr(patcher, "cached_patcher_init", None) is None:
        pytest.skip("this ComfyUI has no reload factories")
    make, given = patcher.cached_patcher_init[:2]
    assert given == args
    x, t = inputs()
    again = make(*given, disable_dynamic=True)
    assert torch.equal(run(again, x, t), run(patcher, x, t))


FULL_ORDER = [
    *(f"input_blocks.{n}.1" for n in (1, 2, 4, 5, 7, 8)),
    *(f"output_blocks.{n}.1" for n in range(3, 12)),
    "middle_block.1",
]


def test_the_full_size_model_maps_as_published():
    """686 names of diffusers, 80 attention tensors, 606 tensors without cross-attention."""
    with torch.device("meta"):
        full = UNet2DConditionModel(
            in_channels=9,
            out_channels=4,
            block_out_channels=(320, 640, 1280, 1280),
            cross_attention_dim=768,
            attention_head_dim=8,
        )
    tensors = full.state_dict()
    assert len(tensors) == 686
    found, config = load_run.canonical_unet(tensors, "x")
    assert len(found) == 606 and sum(t.numel() for t in found.values()) == 815_572_804
    attention = attention_tensors(full)
    assert len(attention) == 80 and sum(t.numel() for t in attention.values()) == 49_574_080
    merged = load_run.merge_attention(found, config, attention, "x")
    assert merged.keys() == found.keys()
    for index, block in enumerate(FULL_ORDER):
        for tensor in catvton.TENSORS:
            name = f"{block}.transformer_blocks.0.attn1.{tensor}"
            assert merged[name] is attention[f"{8 * index}.{tensor}"]


def test_conditioning_gives_the_reference_channels(folder):
    person, garment, mask = scene()
    vae = FakeVAE()
    positive, negative, latent = glue.conditioning(person, garment, mask, vae)
    assert latent["samples"].shape == (1, 4, 16, 4) and not latent["samples"].any()
    masked = (person * 2 - 1) * (mask < 0.5)[..., None]
    upper = 0.18215 * vae.encode((masked + 1) / 2)
    lower = 0.18215 * vae.encode(garment)
    small = torch.nn.functional.interpolate(mask[:, None], size=(8, 4), mode="nearest")
    patcher = load_run.load_catvton(str(folder / "merged.safetensors"), None, "fp32")
    for side, below in ((positive, lower), (negative, torch.zeros_like(lower))):
        want = torch.cat([torch.cat([small, 0 * small], 2), torch.cat([upper, below], 2)], dim=1)
        entries = side[0][1]
        made = patcher.model.extra_conds(
            noise=torch.randn(1, 4, 16, 4), device=torch.device("cpu"), **entries
        )["c_concat"].cond
        assert torch.allclose(made, want, atol=1e-6)
        assert torch.equal(made[:, :1], want[:, :1])


def sides_of(conditioning):
    """(uncond, cond) extra channels as the published pipeline builds them."""
    return [
        torch.cat([e["concat_mask"], bed.SCALE * e["concat_latent_image"]], 1)
        for e in (conditioning[1][0][1], conditioning[0][0][1])
    ]


@pytest.mark.parametrize("cfg, eta", [(2.5, 1.0), (1.0, 1.0), (2.5, 0.0), (1.0, 0.0)])
def test_sampling_equals_the_published_loop(folder, tuned, cfg, eta):
    """DDIM written with diffusers, noise injected on both sides; two persons, four steps."""
    person, garment, mask = scene(batch=2)
    made = glue.conditioning(person, garment, mask, FakeVAE())
    start, fresh = bed.noises(made[2]["samples"].shape, 4)
    want = bed.published_loop(tuned, sides_of(made), start, fresh, cfg, eta)
    patcher = load_run.load_catvton(str(folder / "merged.safetensors"), None, "fp32")
    got = bed.native_loop(patcher, made, start, fresh, cfg, eta)
    assert relative(got, want) <= 1e-5
    # The picture, from the person's half, in 8 bits: no value more than one step apart.
    torch.manual_seed(3)
    vae = AutoencoderKL(
        block_out_channels=(16, 16, 16, 16),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        norm_num_groups=8,
        layers_per_block=1,
    ).eval()
    pictures = []
    for latents in (got, want):
        half = latents[:, :, : latents.shape[2] // 2] / bed.SCALE
        with torch.no_grad():
            pictures.append(((vae.decode(half).sample / 2 + 0.5).clamp(0, 1) * 255).round())
    assert pictures[1].std() > 10 and pictures[1].shape == (2, 3, 64, 32)
    assert (pictures[0] - pictures[1]).abs().max() <= 1


def test_two_persons_at_once_equal_two_single_runs(folder):
    person, garment, mask = scene(batch=2)
    patcher = load_run.load_catvton(str(folder / "merged.safetensors"), None, "fp32")
    both = glue.conditioning(person, garment, mask, FakeVAE())
    start, fresh = bed.noises(both[2]["samples"].shape, 4)
    together = bed.native_loop(patcher, both, start, fresh, 2.5, 1.0)
    for i in range(2):
        one = slice(i, i + 1)
        alone = glue.conditioning(person[one], garment[one], mask[one], FakeVAE())
        single = bed.native_loop(patcher, alone, start[one], [n[one] for n in fresh], 2.5, 1.0)
        assert relative(together[one], single) <= 1e-5
    assert relative(together[:1], together[1:]) > 0.1


@pytest.mark.parametrize("wrong", ["one side for both", "sigma 0 at the end", "start at sigma"])
def test_what_the_published_loop_is_not(folder, tuned, wrong):
    """Each of these is a plausible mistake; the parity test tells it from the published loop."""
    person, garment, mask = scene(batch=1)
    made = glue.conditioning(person, garment, mask, FakeVAE())
    start, fresh = bed.noises(made[2]["samples"].shape, 4)
    want = bed.published_loop(tuned, sides_of(made), start, fresh, 2.5, 1.0)
    patcher = load_run.load_catvton(str(folder / "merged.safetensors"), None, "fp32")
    sigmas, _ = sampling.reference_schedule(patcher, 4, 1.0)
    queue = iter(fresh)
    sampler = sampling.DDIMSampler(1.0, noise_sampler=lambda *_: next(queue))
    negative = made[1]
    if wrong == "one side for both":
        negative = made[0]
    elif wrong == "sigma 0 at the end":
        sigmas = torch.cat([sigmas[:-1], torch.zeros(1)])
    else:
        sampler.max_denoise = lambda *_: False
    got = comfy.sample.sample_custom(
        patcher, start, 2.5, sampler, sigmas, made[0], negative, made[2]["samples"],
        disable_pbar=True, seed=0,
    )  # fmt: skip
    assert relative(bed.SCALE * got, want) > 1e-3


def test_the_sampler_refuses_another_kind_of_model(folder):
    patcher = load_run.load_catvton(str(folder / "merged.safetensors"), None, "fp32")

    class Flow(comfy.model_sampling.ModelSamplingDiscreteFlow, comfy.model_sampling.CONST):
        pass

    patcher.add_object_patch("model_sampling", Flow())
    with pytest.raises(FrugalError, match="ModelSamplingDiscreteFlow"):
        sampling.reference_schedule(patcher, 20, 1.0)


def test_the_schedule_equals_diffusers(folder):
    patcher = load_run.load_catvton(str(folder / "merged.safetensors"), None, "fp32")
    scheduler = bed.scheduler()
    for steps in (1, 4, 5, 10, 20, 25, 30, 40, 50, 100):
        scheduler.set_timesteps(steps)
        assert ddim_timesteps(steps) == scheduler.timesteps.tolist()
        alphas = scheduler.alphas_cumprod[[*scheduler.timesteps.tolist(), 0]]
        sigmas, _ = sampling.reference_schedule(patcher, steps, 1.0)
        assert torch.allclose(
            sigmas, ((1 - alphas) / alphas).sqrt(), rtol=1e-3
        )  # float32 alphas are no better
