"""Tiny Wan models in every layout: what a file holds, and the weights that its bytes stand for."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from frugal.kernels.checkpoints.wan_shapes import WanConfig, parameters
from frugal.tests.helpers.blocks import fp8_runs, fp8_squares
from frugal.tests.helpers.native_formats import NATIVE, native_file
from frugal.tests.helpers.packed import gptq_or_awq_layer, w4a16_layer

T2V = WanConfig(dim=256, ffn_dim=512, layers=2, in_dim=16, out_dim=16)
I2V = WanConfig(dim=256, ffn_dim=512, layers=2, in_dim=36, out_dim=16, image=True)
VACE = WanConfig(
    dim=256, ffn_dim=512, layers=2, in_dim=16, out_dim=16, vace_layers=1, vace_in_dim=96
)
Weights = dict[str, torch.Tensor]
File = tuple[Weights, dict[str, str], Weights]


def weights(config: WanConfig = T2V, seed: int = 1) -> Weights:
    """Seeded fp32 weights; linear layers have heavy tails, as trained ones do, and uneven rows."""
    make = torch.Generator().manual_seed(seed)
    out: Weights = {}
    for name, parameter in parameters(config).items():
        shape = parameter.shape
        noise = torch.randn(shape, generator=make)
        if "norm" in name or name.startswith("img_emb.proj.0") or name.startswith("img_emb.proj.4"):
            out[name] = 1 + 0.1 * noise if name.endswith("weight") else 0.05 * noise
        elif "modulation" in name:
            out[name] = noise / config.dim**0.5
        elif name.endswith("bias") or "emb_pos" in name:
            out[name] = 0.02 * noise
        else:
            fan_in = noise[0].numel()
            out[name] = noise / fan_in**0.5
            if parameter.linear:
                rare = torch.rand(shape, generator=make) < 0.002
                rows = torch.exp(0.5 * torch.randn(shape[0], 1, generator=make))
                out[name] = torch.where(rare, 5 * out[name], out[name]) * rows.clamp(0.3, 3)
    return out


def block_linears(source: Weights, config: WanConfig = T2V) -> list[str]:
    table = parameters(config)
    return [
        name.removesuffix(".weight")
        for name in source
        if "blocks." in name and name in table and table[name].linear
    ]


def fp8(weight: torch.Tensor, dtype: torch.dtype, rows: bool, target: float | None = None):
    """(float8 weight, float32 scale [] or [rows, 1], dequantised float32), scaled to `target`."""
    largest = target or torch.finfo(dtype).max
    amax = weight.abs().amax(dim=1, keepdim=True) if rows else weight.abs().amax()
    scale = (amax / largest).float()
    stored = (weight / scale).clamp(-largest, largest).to(dtype)
    return stored, scale, stored.float() * scale


def scaled(
    source: Weights,
    dtype: torch.dtype,
    *,
    rows: bool = False,
    target: float | None = None,
    scale_name: str = "scale_weight",
    marker: torch.Tensor | None = None,
    scale_shape: Callable[[torch.Tensor], torch.Tensor] = lambda scale: scale,
    extras: Callable[[str, torch.Tensor], Weights] = lambda layer, scale: {},
    metadata: dict[str, str] | None = None,
    config: WanConfig = T2V,
    blocks: Callable[..., Any] | None = None,
) -> File:
    held, meant = base(source)
    for layer in block_linears(source, config):
        weight = source[f"{layer}.weight"]
        made = blocks(weight, dtype) if blocks else fp8(weight, dtype, rows, target)
        stored, scale, exact = made
        held[f"{layer}.weight"], meant[f"{layer}.weight"] = stored, exact
        held[f"{layer}.{scale_name}"] = scale_shape(scale)
        held.update(extras(layer, scale))
    if marker is not None:
        held["scaled_fp8"] = marker
    return held, metadata or {}, meant


def base(source: Weights, dtype: torch.dtype = torch.bfloat16) -> tuple[Weights, Weights]:
    """Everything in `dtype`, and the same as float32."""
    held = {name: tensor.to(dtype) for name, tensor in source.items()}
    return held, {name: tensor.float() for name, tensor in held.items()}


def declare(layer: str, **entry: Any) -> Weights:
    raw = json.dumps(entry).encode()
    return {f"{layer}.comfy_quant": torch.tensor(list(raw), dtype=torch.uint8)}


def header_metadata(source: Weights, config: WanConfig = T2V, **entry: Any) -> dict[str, str]:
    layers = dict.fromkeys(block_linears(source, config), entry)
    return {"_quantization_metadata": json.dumps({"format_version": "1.0", "layers": layers})}


def plain_fp8(
    source: Weights, dtype: torch.dtype, everything: bool = False, config: WanConfig = T2V
) -> File:
    held, meant = base(source)
    linears = {f"{layer}.weight" for layer in block_linears(source, config)}
    for name in held:
        if everything or name in linears:
            held[name] = source[name].to(dtype)
            meant[name] = held[name].float()
    return held, {}, meant


def int8_rows(
    source: Weights,
    shape: tuple[int, ...] = (-1, 1),
    declared: bool = False,
    config: WanConfig = T2V,
) -> File:
    held, meant = base(source)
    for layer in block_linears(source, config):
        weight = source[f"{layer}.weight"]
        scale = weight.abs().amax(dim=1, keepdim=True) / 127
        stored = (weight / scale).round().clamp(-127, 127).to(torch.int8)
        held[f"{layer}.weight"], meant[f"{layer}.weight"] = stored, stored.float() * scale
        held[f"{layer}.weight_scale"] = scale.reshape(shape)
        if declared:
            held.update(declare(layer, format="int8_tensorwise"))
    return held, {}, meant


E4, E5 = torch.float8_e4m3fn, torch.float8_e5m2
ONE_STEP = {"scale_name": "weight_scale"}


def fp8_layouts(source: Weights, config: WanConfig = T2V) -> dict[str, Callable[[], File]]:
    """Layouts that load on every supported ComfyUI: label -> maker of (tensors, metadata,
    meaning).
    """

    make = partial(scaled, config=config)
    cast = partial(plain_fp8, config=config)
    header = partial(header_metadata, config=config)

    def plain(dtype: torch.dtype) -> Callable[[], File]:
        return lambda: (base(source, dtype)[0], {}, base(source, dtype)[1])

    def mark(*shape: int, dtype: torch.dtype = E4) -> torch.Tensor:
        return torch.zeros(shape, dtype=dtype)

    return {
        "fp32": plain(torch.float32),
        "fp16": plain(torch.float16),
        "bf16": plain(torch.bfloat16),
        "e4m3 cast": lambda: cast(source, E4),
        "e5m2 cast": lambda: cast(source, E5),
        "e4m3 cast of everything": lambda: cast(source, E4, everything=True),
        "e4m3 scale_weight, marker of 2": lambda: make(source, E4, marker=mark(2)),
        "e4m3 scale_weight, marker of 0": lambda: make(source, E4, marker=mark(0)),
        "e4m3 scale_weight, bf16 marker of 1": lambda: make(
            source, E4, marker=mark(1, dtype=torch.bfloat16)
        ),
        "e4m3 scale_weight and scale_input, fp32 marker": lambda: make(
            source,
            E4,
            marker=mark(1, dtype=torch.float32),
            extras=lambda layer, scale: {f"{layer}.scale_input": torch.tensor(0.37)},
        ),
        "e4m3 scale_weight, no marker": lambda: make(source, E4),
        "e4m3 weight_scale, no marker": lambda: make(source, E4, **ONE_STEP),
        "e4m3 weight_scale with marker": lambda: make(source, E4, marker=mark(2), **ONE_STEP),
        "e4m3 weight_scale of shape [1], no marker": lambda: make(
            source,
            E4,
            scale_shape=lambda scale: scale.reshape(1),
            **ONE_STEP,
        ),
        "e5m2 scale_weight to 57344, e5m2 marker": lambda: make(
            source, E5, marker=mark(2, dtype=E5)
        ),
        "e5m2 scale_weight to 448, e5m2 marker": lambda: make(
            source, E5, marker=mark(2, dtype=E5), target=448
        ),
        "e4m3 weight_scale, header": lambda: make(
            source, E4, metadata=header(source, format="float8_e4m3fn"), **ONE_STEP
        ),
        "e5m2 weight_scale, header": lambda: make(
            source, E5, metadata=header(source, format="float8_e5m2"), **ONE_STEP
        ),
        "e5m2 weight_scale, header says e4m3": lambda: make(
            source, E5, metadata=header(source, format="float8_e4m3fn"), **ONE_STEP
        ),
        "e4m3 weight_scale, comfy_quant": lambda: make(
            source, E4, extras=lambda layer, _: declare(layer, format="float8_e4m3fn"), **ONE_STEP
        ),
        "e5m2 weight_scale, comfy_quant": lambda: make(
            source, E5, extras=lambda layer, _: declare(layer, format="float8_e5m2"), **ONE_STEP
        ),
        "e4m3 weight_scale [rows,1], no marker (LightX2V)": lambda: make(
            source, E4, rows=True, **ONE_STEP
        ),
        "e4m3 scale_weight [rows], marker": lambda: make(
            source, E4, rows=True, marker=mark(2), scale_shape=lambda scale: scale.flatten()
        ),
        "e5m2 weight_scale [rows,1], no marker": lambda: make(source, E5, rows=True, **ONE_STEP),
        "e4m3 scale_weight per row and 64 inputs, marker (musubi)": lambda: make(
            source, E4, blocks=partial(fp8_runs, run=64), marker=mark(0)
        ),
        "e5m2 weight_scale per row and 128 inputs": lambda: make(
            source, E5, blocks=partial(fp8_runs, run=128), **ONE_STEP
        ),
        "e4m3 weight_scale_inv per square of 128": lambda: make(
            source, E4, blocks=fp8_squares, scale_name="weight_scale_inv"
        ),
    }


def gptq_or_awq(source: Weights, config: WanConfig = T2V, **options: Any) -> File:
    held, meant = base(source)
    for layer in block_linears(source, config):
        tensors, meant[f"{layer}.weight"] = gptq_or_awq_layer(
            held.pop(f"{layer}.weight"), **options
        )
        held.update({f"{layer}.{suffix}": tensor for suffix, tensor in tensors.items()})
    metadata = {}
    if options.get("version") == 2:
        metadata = {"quantization_config": json.dumps({"checkpoint_format": "gptq_v2"})}
    return held, metadata, meant


PACKED_LAYOUTS: dict[str, dict[str, Any]] = {
    "GPTQ 4 bits, asymmetric": {},
    "GPTQ 4 bits, symmetric": {"symmetric": True},
    "GPTQ 4 bits, act-order": {"act_order": True},
    "GPTQ 4 bits, version 2": {"version": 2},
    "GPTQ 8 bits": {"bits": 8, "group": 128},
    "AWQ 4 bits": {"kind": "awq"},
}


def w4a16(source: Weights, group: int = 64, config: WanConfig = T2V) -> File:
    """awq_w4a16 as newer ComfyUI versions store it."""
    held, meant = base(source)
    for layer in block_linears(source, config):
        tensors, meant[f"{layer}.weight"] = w4a16_layer(source[f"{layer}.weight"], group)
        held.update({f"{layer}.{suffix}": tensor for suffix, tensor in tensors.items()})
        held.update(declare(layer, format="awq_w4a16", group_size=group))
    return held, {}, meant


def lightx2v_nvfp4(source: Weights, older: bool = False, config: WanConfig = T2V) -> File:
    """NVFP4 as LightX2V writes it, from comfy-kitchen's quantiser: even input in the low half
    byte, outer scales inverted; `older` files carry input_absmax in place of alpha.
    """
    import comfy_kitchen

    held, meant = base(source)
    for layer in block_linears(source, config):
        weight = source[f"{layer}.weight"]
        inverse = 2688.0 / weight.abs().amax()
        stored, blocks = comfy_kitchen.quantize_nvfp4(weight, 1 / inverse)
        meant[f"{layer}.weight"] = comfy_kitchen.dequantize_nvfp4(
            stored, 1 / inverse, blocks, torch.float32
        )
        low, high = stored & 15, stored // 16
        absmax = torch.tensor(5.0)
        own = {
            "weight": low * 16 + high,
            "weight_scale": blocks,
            **(
                {"weight_global_scale": inverse, "input_absmax": absmax}
                if older
                else {"alpha": 1 / (2688.0 / absmax * inverse), "input_global_scale": 2688 / absmax}
            ),
        }
        held.update({f"{layer}.{suffix}": value for suffix, value in own.items()})
    return held, {}, meant


def write(path: Path, tensors: Weights, metadata: dict[str, str] | None = None) -> Path:
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path, metadata)
    return path


def inputs(config: WanConfig = T2V, seed: int = 3, tokens: int = 12) -> dict[str, torch.Tensor]:
    """Arguments of one forward of a tiny model: 2 latent frames of 8 x 8."""
    make = torch.Generator().manual_seed(seed)
    found = {
        "x": torch.randn(1, config.in_dim, 2, 8, 8, generator=make),
        "timestep": torch.tensor([600.0]),
        "context": torch.randn(1, tokens, config.text_dim, generator=make),
    }
    if config.image:
        found["clip_fea"] = torch.randn(1, 257, 1280, generator=make)
    if config.vace_layers:
        found["vace_context"] = torch.randn(1, 1, config.vace_in_dim, 2, 8, 8, generator=make)
        found["vace_strength"] = [1.0]  # type: ignore[assignment]
    return found


def lora_of(meant: Weights, config: WanConfig = T2V) -> tuple[Weights, Weights]:
    """A LoRA file of rank 8 on every block linear, and the weights with it."""
    make = torch.Generator().manual_seed(2)
    lora, wanted = {}, dict(meant)
    for name in block_linears(meant, config):
        rows, width = meant[f"{name}.weight"].shape
        up, down = (torch.randn(s, generator=make) / 16 for s in ((rows, 8), (8, width)))
        lora |= {
            f"diffusion_model.{name}.lora_B.weight": up,
            f"diffusion_model.{name}.lora_A.weight": down,
        }
        wanted[f"{name}.weight"] = meant[f"{name}.weight"] + up @ down
    return lora, wanted


def peak_memory(work: Callable[[], Any]) -> tuple[int, Any]:
    """Bytes by which the resident memory of this process rises at most while `work` runs, and its
    result (Linux: the kernel's own high-water mark, reset before).
    """

    def mark(key: str) -> int:
        lines = Path("/proc/self/status").read_text().splitlines()
        return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(key))

    Path("/proc/self/clear_refs").write_text("5")
    before = mark("VmRSS")
    result = work()
    return mark("VmHWM") - before, result


def relative(out: torch.Tensor, reference: torch.Tensor) -> float:
    """||out - reference|| / ||reference||."""
    return float((out.double() - reference.double()).norm() / reference.double().norm())


def correlation(out: torch.Tensor, reference: torch.Tensor) -> float:
    return float(torch.corrcoef(torch.stack([out.flatten(), reference.flatten()]).double())[0, 1])


def fake_native(layer: str, form: str, rows: int, width: int) -> Weights:
    """Tensors of the right shapes and types for a native format, without meaning."""
    byte, one = torch.uint8, torch.float32
    held = {
        "int8_tensorwise": {"weight": (torch.int8, rows, width), "weight_scale": (one, rows, 1)},
        "convrot_w4a4": {"weight": (torch.int8, rows, width // 2), "weight_scale": (one, rows)},
        "asym_w4a8_int8": {
            "weight": (torch.int8, rows, width // 2),
            "weight_s_rel": (E4, rows, width // 16),
            "weight_s_channel": (one, rows),
        },
        "nvfp4": {
            "weight": (byte, rows, width // 2),
            "weight_scale": (E4, rows, width // 16),
            "weight_scale_2": (one,),
        },
        "mxfp8": {"weight": (E4, rows, width), "weight_scale": (byte, rows, width // 32)},
    }[form]
    tensors = {
        f"{layer}.{suffix}": torch.ones(shape).to(dtype) for suffix, (dtype, *shape) in held.items()
    }
    return tensors | declare(layer, format=form)


def variant(config: WanConfig, **changes: Any) -> WanConfig:
    return replace(config, **changes)


def layout_files(folder: Path) -> dict[str, tuple[Path, Weights]]:
    """One file per layout in `folder`: label -> (path, weights that its bytes stand for)."""
    from frugal.tests.helpers import gguf

    source = weights()
    found: dict[str, tuple[Path, Weights]] = {}
    made = dict(fp8_layouts(source))
    made["int8 weight_scale [rows,1], no marker (LightX2V)"] = lambda: int8_rows(source)
    made["int8 weight_scale [rows], comfy_quant"] = lambda: int8_rows(source, (-1,), declared=True)
    for label, options in PACKED_LAYOUTS.items():
        made[label] = lambda options=options: gptq_or_awq(source, **options)
    native = partial(native_file, source=source, layers=block_linears(source))
    made |= {f"{name}, comfy_quant": partial(native, name, header=False) for name in NATIVE}
    made["int8 ConvRot, header"] = partial(native, "int8 ConvRot", header=True)
    made["awq_w4a16, groups of 64"] = lambda: w4a16(source)
    made["NVFP4, LightX2V, alpha"] = lambda: lightx2v_nvfp4(source)
    made["NVFP4, LightX2V, input_absmax"] = lambda: lightx2v_nvfp4(source, older=True)
    plain, exact = base(source)
    for prefix in (
        "model.diffusion_model.",
        "model.",
        "diffusion_model.",
        "generator_ema.model.",
        "model._fsdp_wrapped_module.",
    ):
        renamed = {prefix + name: tensor for name, tensor in plain.items()}
        made[f"bf16, prefix {prefix}"] = lambda renamed=renamed: (renamed, {}, exact)
    theirs = {to_diffusers(name): tensor for name, tensor in plain.items()}
    made["bf16, diffusers names"] = lambda: (theirs, {}, exact)
    broken = {
        "one weight missing": {k: v for k, v in plain.items() if k != "blocks.1.ffn.0.bias"},
        "one unknown tensor": plain | {"blocks.1.extra.weight": torch.ones(4, 4)},
        "e4m3 scale_weight, one scale missing": {
            k: v
            for k, v in scaled(source, E4, marker=torch.zeros(2).to(E4))[0].items()
            if k != "blocks.1.ffn.0.scale_weight"
        },
        "e4m3 scales that fit no block": scaled(
            source, E4, scale_shape=lambda scale: scale.expand(256, 3), **ONE_STEP
        )[0],
    }
    for label, tensors in broken.items():
        made[label] = lambda tensors=tensors: (tensors, {}, exact)
    for index, (label, make) in enumerate(made.items()):
        tensors, metadata, meant = make()
        found[label] = (write(folder / f"{index}.safetensors", tensors, metadata), meant)
    torch.save({"generator_ema": {f"model.{k}": v for k, v in plain.items()}}, folder / "g.pt")
    found["bf16, .pt with generator_ema.model."] = (folder / "g.pt", exact)
    found |= gguf.layout_files(folder, source)
    found["bf16, two parts and an index"] = (split(folder, plain), exact)
    return found


def split(folder: Path, tensors: Weights) -> Path:
    names = list(tensors)
    weight_map = {}
    for number, chosen in enumerate((names[::2], names[1::2]), 1):
        file = f"m-{number:05}-of-00002.safetensors"
        write(folder / file, {name: tensors[name] for name in chosen})
        weight_map |= dict.fromkeys(chosen, file)
    index = folder / "m.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return index


def to_diffusers(name: str) -> str:
    """The name that diffusers gives a canonical T2V tensor."""
    pairs = (
        ("time_embedding.0", "condition_embedder.time_embedder.linear_1"),
        ("time_embedding.2", "condition_embedder.time_embedder.linear_2"),
        ("text_embedding.0", "condition_embedder.text_embedder.linear_1"),
        ("text_embedding.2", "condition_embedder.text_embedder.linear_2"),
        ("time_projection.1", "condition_embedder.time_proj"),
        ("head.modulation", "scale_shift_table"),
        ("head.head", "proj_out"),
        (".modulation", ".scale_shift_table"),
        ("self_attn.", "attn1."),
        ("cross_attn.", "attn2."),
        (".norm3.", ".norm2."),
        (".ffn.0.", ".ffn.net.0.proj."),
        (".ffn.2.", ".ffn.net.2."),
    )
    for ours, theirs in pairs:
        name = name.replace(ours, theirs)
    for part in "qkv":
        for attention in ("attn1", "attn2"):
            name = name.replace(f"{attention}.{part}.", f"{attention}.to_{part}.")
    return name.replace("attn1.o.", "attn1.to_out.0.").replace("attn2.o.", "attn2.to_out.0.")
