"""Wan GGUF files by the conventions of the public tools: convert.py, llama-quantize with its patch,
and fix_5d_tensors.py of ComfyUI-GGUF, written with the library `gguf`.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from frugal.kernels.checkpoints.wan_shapes import WanConfig
from frugal.kernels.formats.gguf_blocks import TYPES
from frugal.tests.helpers import wan as bed

# Types without a quantiser in the library: where the float16 numbers of a block are, bytes, and how
# large they are beside each other, so that weights are around 0, as trained ones are. Every other
# bit of a block may be anything.
BLOCKS = {
    "Q2_K": {80: 1, 82: 1.5},
    "Q3_K": {108: 1},
    "Q4_K": {0: 1, 2: 7.5},
    "Q5_K": {0: 1, 2: 15.5},
    "Q6_K": {208: 1},
    "IQ4_NL": {0: 1},
    "IQ4_XS": {0: 1},
    "IQ3_S": {0: 1},
    "IQ2_XXS": {0: 1},
}
WRITTEN = ("Q8_0", "Q5_1", "Q5_0", "Q4_1", "Q4_0")


def write(
    path: Path,
    source: bed.Weights,
    kind: str,
    config: WanConfig = bed.T2V,
    *,
    arch: str | None = "wan",
    prefix: str = "",
    patches: str = "whole",
    others: str = "F32",
    layers: list[str] | None = None,
) -> bed.Weights:
    """A GGUF file of `source`: weights of block linears, or of `layers`, as `kind`, `others` for
    the other tensors of two and more dimensions, vectors and modulations in F32. Returns the
    weights that it stands for, in float32.

    patches: how patch_embedding.weight is there: whole, with its five dimensions; stated, joined
    to two with its shape in the metadata; joined, to two without it; merged, to four as
    stable-diffusion.cpp does; absent, as convert.py leaves it.
    """
    import gguf

    writer = gguf.GGUFWriter(path, arch or "")
    if arch is None:
        writer.kv_data[0].pop("general.architecture", None)
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_Q8_0)
    linears = {f"{layer}.weight" for layer in layers or bed.block_linears(source, config)}
    meant = {}
    for number, (name, tensor) in enumerate(source.items()):
        form = gguf.GGMLQuantizationType.F32
        if name in linears:
            form = gguf.GGMLQuantizationType[kind]
        elif tensor.dim() > 1 and "modulation" not in name:
            form = gguf.GGMLQuantizationType[others]
        values = tensor.float().numpy()
        if tensor.dim() > 4 and patches == "stated":
            writer.add_array(f"comfy.gguf.orig_shape.{prefix}{name}", list(tensor.shape))
        if tensor.dim() > 4 and patches in ("stated", "joined"):
            values = values.reshape(values.shape[0], -1)
        elif tensor.dim() > 4 and patches == "merged":
            values = values.reshape(-1, *values.shape[2:])
        stored = _stored(values, form, number)
        exact = gguf.quants.dequantize(stored, form)
        meant[name] = torch.from_numpy(np.array(exact)).reshape(tensor.shape)
        if tensor.dim() < 5 or patches != "absent":
            writer.add_tensor(prefix + name, stored, raw_dtype=form)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return meant


def _stored(values: np.ndarray, form, seed: int) -> np.ndarray:
    import gguf

    if form.name not in BLOCKS:
        return gguf.quants.quantize(values, form)
    chance = np.random.default_rng(seed)
    count, size = gguf.GGML_QUANT_SIZES[form]
    rows, width = values.shape
    blocks = chance.integers(0, 256, (rows, width // count, size), dtype=np.uint8)
    scales = chance.uniform(2e-4, 1e-3, (rows, width // count, 1))
    for place, share in BLOCKS[form.name].items():
        blocks[..., place : place + 2] = (share * scales).astype(np.float16).view(np.uint8)
    return blocks.reshape(rows, -1)


def layout_files(folder: Path, source: bed.Weights) -> dict[str, tuple[Path, bed.Weights]]:
    """Rows for `wan_bed.layout_files`: types that do not stay packed are rounded to float16."""
    found = {}
    rows = {f"GGUF {kind}": (kind, {}) for kind in (*WRITTEN, *BLOCKS, "F16", "BF16")}
    rows["GGUF Q8_0, other weights F16"] = ("Q8_0", {"others": "F16"})
    rows["GGUF Q4_K, other weights BF16"] = ("Q4_K", {"others": "BF16"})
    rows["GGUF Q8_0, shape of the patches stated"] = ("Q8_0", {"patches": "stated"})
    rows["GGUF Q8_0, no arch, prefix model.diffusion_model."] = (
        "Q8_0",
        {"arch": None, "prefix": "model.diffusion_model.", "patches": "merged"},
    )
    for number, (label, (kind, how)) in enumerate(rows.items()):
        path = folder / f"{number}.gguf"
        meant = write(path, source, kind, **how)
        layers = () if kind in TYPES or "F" in kind else bed.block_linears(source)
        rounded = {f"{layer}.weight" for layer in layers}
        held = {name: t.half().float() if name in rounded else t for name, t in meant.items()}
        found[label] = (path, held)
    return found
