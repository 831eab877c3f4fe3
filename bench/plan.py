"""Is a traced plan what a run takes: predicted against counted memory, and the trace's own seconds.

`python bench/plan.py RESULTS.json TREE [TREE ...]` runs, per ComfyUI tree and in a process of its
own: a grid of tiny models with the proportions of the 1.3B and the 14B, sizes, frames and batches,
whole and in pieces, each forward predicted without memory, counted on real tensors by the same
counter, and counted by torch's CPU allocator, which knows nothing of ours; whole sampling runs by
the allocator, for the latents around a forward; and the trace of models of real size, whose peaks
are predictions that no run here has checked. All in fp32 on a CPU, the real sizes in bf16.

`python bench/plan.py --example PICTURE.png TREE` prints the plan of a 14B I2V in int8 and in W4A8,
832 x 480, 81 frames, in 12 GB, and draws the first: traced in bf16, weights by arithmetic.

`python bench/plan.py --cards TREE` prints what docs/start-12gb.md and the notes of the 4-step
graphs say of cards: one of Wan 2.2's experts at a time, cfg 1, by the same arithmetic.
"""

from __future__ import annotations

import json
import sys
import time
from dataclasses import replace
from types import SimpleNamespace

import harness

# Width, feed-forward width: 35/6 and 27/10 of the width, as in the 1.3B and the 14B.
MODELS = {"1.3B": (256, 1504, False), "14B": (384, 1040, True)}
GRID = (((3, 24, 24), 1), ((5, 24, 24), 1), ((3, 40, 20), 1), ((3, 24, 24), 2))
PIECES = 4
REAL = {
    "1.3B T2V": (1536, 8960, 12, 30, False),
    "14B I2V": (5120, 13824, 40, 40, True),
}
SIZES = {"480p": (832, 480), "720p": (1280, 720)}


def shape_of(dim: int, ffn: int, heads: int, layers: int, image: bool, dtype, channels: int = 0):
    """What a MODEL of this shape shows to the planner; its weights are nowhere."""
    import comfy.ldm.wan.model
    import comfy.ops

    config = dict(
        image_model="wan2.1", model_type="i2v" if image else "t2v", dim=dim, ffn_dim=ffn,
        num_heads=heads, num_layers=layers, in_dim=channels or (36 if image else 16), out_dim=16,
    )  # fmt: skip
    kind, operations = comfy.ldm.wan.model.WanModel, comfy.ops.disable_weight_init
    return SimpleNamespace(
        model_config=SimpleNamespace(unet_config=config),
        manual_cast_dtype=dtype,
        diffusion_model=kind(**config, device="meta", operations=operations),
    )


def grid() -> list[dict]:
    import torch
    from comfy.ldm.modules.attention import attention_pytorch

    from frugal.kernels.memory import chunks
    from frugal.kernels.memory.plan import MemoryOptions
    from frugal.kernels.memory.trace import trace
    from frugal.nodes.memory import meta_models
    from frugal.tests.helpers.memory import allocator_peak

    # Tiny sequences have few tiles of the usual size, and a text of the usual length is larger.
    chunks.ROWS, meta_models.TEXT_TOKENS, meta_models.IMAGE_TOKENS = 32, 64, 32
    cpu, rows = torch.device("cpu"), []
    override = {"optimized_attention_override": lambda _, *a, **k: attention_pytorch(*a, **k)}
    for name, (dim, ffn, image) in MODELS.items():
        peaks = meta_models.ForwardPeaks(
            shape_of(dim, ffn, dim // 128, 2, image, torch.float32), torch.device("cpu")
        )
        for memory_options in (MemoryOptions(), MemoryOptions(False, PIECES, PIECES)):
            model = peaks.model(2, memory_options).to_empty(device=cpu)
            for parameter in model.parameters():
                parameter.data.normal_(0, 0.02)
            for latent, batch in GRID:
                make = meta_models.inputs(model, batch, latent, torch.float32, cpu)

                def call(model=model, make=make):
                    return model(**make() | {"transformer_options": dict(override)})

                predicted = peaks.of(batch, latent, memory_options)
                counted = trace(call, decomposed=meta_models.kernels(cpu)[0]).peak
                rows.append(
                    {
                        "model": name, "latent": latent, "batch": batch,
                        "pieces": memory_options.pieces, "predicted": predicted, "counted": counted,
                        "allocator": allocator_peak(call),
                    }
                )  # fmt: skip
    return rows


def whole_runs() -> list[dict]:
    """Latents of a run: what the allocator has out during sampling beyond the forward's peak."""
    import comfy.sample
    import comfy.sd
    import torch
    from comfy.ldm.modules.attention import attention_pytorch

    from frugal.kernels.memory.plan import LATENT_COPIES, MemoryOptions, latent_bytes
    from frugal.nodes.memory import meta_models
    from frugal.tests.helpers import wan as bed
    from frugal.tests.helpers.memory import allocator_peak

    state = {name: value.float() for name, value in bed.weights().items()}
    patcher = comfy.sd.load_diffusion_model_state_dict(
        state, model_options={"dtype": torch.float32}
    )
    options = patcher.model_options["transformer_options"]
    options["optimized_attention_override"] = lambda _, *a, **k: attention_pytorch(*a, **k)
    peaks = meta_models.ForwardPeaks(patcher.model, torch.device("cpu"))
    prompt = [[torch.zeros(1, 512, 4096), {}]]
    rows = []
    for latent in ((3, 24, 24), (3, 40, 40)):
        start = torch.zeros(1, 16, *latent)

        def call(start=start):
            noise = comfy.sample.prepare_noise(start, 1)
            return comfy.sample.sample(
                patcher, noise, 2, 5.0, "euler", "simple", prompt, prompt, start,
                disable_pbar=True, seed=1,
            )  # fmt: skip

        forward = peaks.of(2, latent, MemoryOptions())
        run = allocator_peak(call)
        one = latent_bytes(1, latent) // LATENT_COPIES
        rows.append({"latent": latent, "forward": forward, "run": run, "one_latent": one})
    return rows


def real_sizes() -> list[dict]:
    import torch

    from frugal.kernels.memory.plan import Job, MemoryOptions
    from frugal.nodes.memory import meta_models

    rows = []
    for name, shape in REAL.items():
        model = shape_of(*shape, torch.bfloat16)
        for label, size in SIZES.items():
            peaks = meta_models.ForwardPeaks(model, torch.device("cpu"))
            row = {"model": name, "size": label, "peaks": {}, "cpu_seconds": []}
            for text, memory_options in (
                ("both conditions", MemoryOptions()),
                ("one condition", MemoryOptions(True)),
                ("in 4 pieces", MemoryOptions(True, 4, 4)),
                ("in 8 pieces", MemoryOptions(True, 8, 8)),
            ):
                started = time.process_time()
                row["peaks"][text] = peaks.of_job(Job(*size, 81), memory_options)
                row["cpu_seconds"].append(round(time.process_time() - started, 3))
            rows.append(row)
    return rows


def example(picture: str, tree: str) -> None:
    harness.enter(tree)
    import comfy.ldm.wan.vae
    import torch
    from PIL import Image

    from frugal.kernels.memory import fit, plan_picture
    from frugal.kernels.memory import plan as memory
    from frugal.nodes.memory import meta_models

    job = memory.Job(*SIZES["480p"], 81)
    peaks = meta_models.ForwardPeaks(
        shape_of(*REAL["14B I2V"], torch.bfloat16), torch.device("cpu")
    )
    with torch.device("meta"):
        model = comfy.ldm.wan.vae.WanVAE(
            dim=96, z_dim=16, temperal_downsample=[False, True, True]
        ).to(torch.bfloat16)
    vae = SimpleNamespace(first_stage_model=model, latent_channels=16, vae_dtype=torch.bfloat16)
    *works, how = meta_models.decoded(vae, job.latent)
    held = sum(parameter.nbytes for parameter in model.parameters())
    encoder = memory.Phase(
        memory.TEXT,
        {memory.WEIGHTS: fit.ENCODER_BYTES["fp8"], memory.WORK: fit.ENCODER_WORK[1]},
    )
    config = fit.WAN["Wan 14B I2V"]
    for form in ("int8", "W4A8"):
        weights = weights_of(config, form)
        plan = memory.make_plan(
            f"Wan 14B I2V {form}", job, weights, lambda s: peaks.of_job(job, s), 12 * 10**9,
            "typed in", encoder, memory.Decoding(held, *works, how),
        )  # fmt: skip
        print(plan.text(), end="\n\n")
        if form == "int8":
            Image.fromarray(plan_picture.picture(plan)).save(picture)


def weights_of(config, form: str):
    from frugal.kernels.memory import fit
    from frugal.kernels.memory.plan import Weights

    size = fit.wan_bytes(config, form)
    layer = int(fit.FORMATS[form][0] * config.dim * config.ffn_dim)
    width = config.dim * config.ffn_dim
    return Weights(size, {form: size}, layer, 2 * width, fit.wan_bytes(config, "W4A8"))


# Name, budget in GB: the card less 1 GB for the context and for what kernels and screens take.
CARDS = (("8 GB", 7), ("12 GB", 11), ("16 GB", 15), ("24 GB", 23))
CLIPS = {"480 x 832": (480, 832, 81), "480 x 640, 49 frames": (480, 640, 49)}


def cards(tree: str) -> None:
    harness.enter(tree)
    import torch

    from frugal.kernels.memory import fit
    from frugal.kernels.memory import plan as memory
    from frugal.nodes.memory import meta_models

    # Wan 2.2's experts have Wan 2.1's shape without the branch for the CLIP picture.
    config = replace(fit.WAN["Wan 14B I2V"], image=False)
    shape = (config.dim, config.ffn_dim, 40, config.layers, False)
    model = shape_of(*shape, torch.bfloat16, channels=config.in_dim)
    peaks = meta_models.ForwardPeaks(model, torch.device("cpu"))
    for label, size in CLIPS.items():
        job = memory.Job(*size, guided=False)
        for card, budget in CARDS:
            for form in ("fp8", "W4A8"):
                plan = memory.make_plan(
                    card, job, weights_of(config, form), lambda s, job=job: peaks.of_job(job, s),
                    budget * 10**9, "typed in", None, None,
                )  # fmt: skip
                sampling = max(sum(phase.parts.values()) for phase in plan.phases)
                print(
                    f"{label} | {card}, budget {budget} GB | {form} | "
                    f"{'fits' if plan.fits else 'does not fit'} | {plan.memory_options.text()} | "
                    f"peak {sampling / 1e9:.1f} GB | streamed {plan.streamed / 1e9:.1f} GB a step"
                )


def measure(tree: str) -> dict:
    harness.enter(tree)
    import torch

    torch.set_num_threads(1)
    # The grid comes last: it changes what a text and a piece are.
    found = {"torch": torch.__version__, "real": real_sizes(), "runs": whole_runs()}
    return found | {"grid": grid()}


def main() -> None:
    results, *trees = sys.argv[1:]
    for name, found in harness.each_tree(__file__, results, trees).items():
        for row in found["grid"]:
            print(name, row["model"], row["latent"], row["pieces"],
                  f"{row['predicted'] / row['counted'] - 1:+.2%}",
                  f"{row['predicted'] / row['allocator'] - 1:+.2%}")  # fmt: skip


if __name__ == "__main__":
    if sys.argv[1] == "--one":
        print(json.dumps(measure(sys.argv[2])))
    elif sys.argv[1] == "--example":
        example(*sys.argv[2:])
    elif sys.argv[1] == "--cards":
        cards(sys.argv[2])
    else:
        main()
