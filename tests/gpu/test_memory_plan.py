"""Predicted memory against torch's own count on a card; needs CUDA and a ComfyUI folder.

Weights are random, since memory does not depend on them.
"""

from __future__ import annotations

import sys
from dataclasses import replace

import pytest
import torch

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
SIZES = {"480p": (832, 480), "720p": (1280, 720)}


@pytest.fixture(scope="module")
def comfy(comfy_tree):
    """ComfyUI on the card. Other tests put it on the CPU, for the whole process."""
    import comfy.cli_args

    if "comfy.model_management" not in sys.modules:
        comfy.cli_args.args.cpu = False
    import comfy.model_management
    import comfy.sample
    import comfy.sd

    if comfy.model_management.get_torch_device().type != "cuda":
        pytest.skip("ComfyUI is on the CPU in this process: run tests/gpu by itself")
    return comfy


def wan(comfy, config, dtype=torch.bfloat16, form=None):
    """A MODEL of random weights on the card's host, in a quantised format if `form` names one."""
    from frugal.kernels.checkpoints.wan_shapes import parameters
    from frugal.tests.helpers.wan import fake_native

    state = {}
    for name, parameter in parameters(config).items():
        layer = name.removesuffix(".weight")
        if form and parameter.linear and name.startswith("blocks."):
            state |= fake_native(layer, form, *parameter.shape)
        else:
            state[name] = torch.zeros(parameter.shape, dtype=dtype)
    return comfy.sd.load_diffusion_model_state_dict(state, model_options={})


def configuration(size: str, image: bool):
    from frugal.kernels.memory.fit import WAN

    return WAN[f"Wan {size} {'I2V' if image else 'T2V'}"]


@pytest.mark.parametrize("size", ["1.3B", "14B"])
@pytest.mark.parametrize("picture", list(SIZES))
@pytest.mark.parametrize("pieces", [1, 4])
def test_forward_peak_within_ten_percent(comfy, size, picture, pieces, record_property):
    """Two layers on the card show the peak of all: what one needs is needed once."""
    from frugal.kernels.memory.plan import Job, MemoryOptions
    from frugal.nodes.memory import meta_models
    from frugal.nodes.memory.chunked_blocks import ActiveOptions, forwards

    device = torch.device("cuda")
    job = Job(*SIZES[picture], 81)
    memory_options = MemoryOptions(True, pieces, pieces)
    config = replace(configuration(size, size == "14B"), layers=2)
    patcher = wan(comfy, config)
    predicted = meta_models.ForwardPeaks(patcher.model, device).of(1, job.latent, memory_options)
    model = patcher.model.diffusion_model.to(device)
    for path, forward in list(
        forwards(
            model,
            ActiveOptions.of(memory_options),
            lambda path: model.get_submodule(path.rpartition(".")[0]).forward,
        )
    ):
        model.get_submodule(path.rpartition(".")[0]).forward = forward
    given = meta_models.inputs(
        model, 1, job.latent, meta_models.compute_dtype(patcher.model), device
    )
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    with torch.inference_mode():
        arguments = given()
        arguments["transformer_options"] = {}
        model(**arguments)
    counted = torch.cuda.max_memory_allocated() - before
    record_property("predicted", predicted)
    record_property("counted", counted)
    assert predicted == pytest.approx(counted, rel=0.1)


@pytest.mark.parametrize("rows", [2, 4, 8])
def test_pieces_on_this_card_stay_within_rounding(rows, record_property):
    """Whether the last bit agrees is up to cuBLAS, which may take another kernel for fewer rows."""
    from frugal.kernels.memory.chunks import in_pieces

    with torch.device("cuda"):
        layer = torch.nn.Linear(5120, 13824, dtype=torch.bfloat16)
        x = torch.randn(1, 32760, 5120, dtype=torch.bfloat16)
    with torch.inference_mode():
        whole, part = layer(x), in_pieces(lambda piece, _: layer(piece), x, rows)
    record_property("bitwise", torch.equal(whole, part))
    assert float((whole - part).abs().max()) <= 2**-7 * float(whole.abs().max())


@pytest.mark.parametrize("form", ["asym_w4a8_int8", "int8_tensorwise"])
def test_14b_i2v_under_twelve_gigabytes(comfy, form, record_property):
    """Two guided steps at 832 x 480, 81 frames, with the allocator capped: no error."""
    from frugal.kernels.memory.plan import Job
    from frugal.nodes.memory import memory_plan_run

    if form not in getattr(comfy.quant_ops, "QUANT_ALGOS", {}):
        pytest.skip(f"this ComfyUI does not know {form}")
    limit = 12 * 10**9
    total = torch.cuda.get_device_properties(0).total_memory
    job = Job(832, 480, 81)
    patcher = wan(comfy, configuration("14B", True), form=form)
    torch.cuda.empty_cache()
    torch.cuda.set_per_process_memory_fraction(min(1.0, limit / total))
    try:
        plan, peaks = memory_plan_run.plan_of(patcher, job, limit / 10**9 - 0.5)
        assert plan.fits
        model = memory_plan_run.apply(patcher, plan, peaks, True, None)
        latent = torch.zeros(1, 16, *job.latent)
        text = [[torch.zeros(1, 512, 4096), {}]]
        torch.cuda.reset_peak_memory_stats()
        with torch.inference_mode():
            comfy.sample.sample(
                model, comfy.sample.prepare_noise(latent, 1), 2, 5.0, "euler", "simple",
                text, text, latent, disable_pbar=True, seed=1,
            )  # fmt: skip
        record_property("peak", torch.cuda.max_memory_allocated())
        assert torch.cuda.max_memory_allocated() <= limit
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
