"""CatVTON checkpoints: the layout of an SD 1.5 inpainting UNet and of the index-keyed attention
file.

Only names and shapes are looked at here; a "shapes" argument is a mapping of tensor name to shape.
The canonical names are the LDM ones without prefix ("input_blocks.0.0.weight"). References:
CatVTON (arXiv 2407.15886) trains the self-attention of every transformer block and skips
cross-attention.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

from ..errors import FrugalError

Shape = tuple[int, ...]

UNET_PREFIX = "model.diffusion_model."
TENSORS = ("to_q.weight", "to_k.weight", "to_v.weight", "to_out.0.weight", "to_out.0.bias")
INPAINT_CHANNELS, MASK_FREE_CHANNELS, PLAIN_CHANNELS = 9, 8, 4
MASKED, MASK_FREE = "masked", "mask-free"
GET_BASE = (
    "take sd-v1-5-inpainting.safetensors (models/checkpoints), or the diffusers folder "
    "stable-diffusion-inpainting (models/CatVTON)"
)


def unet_names(names: Iterable[str], file: str) -> tuple[str, dict[str, str]]:
    """Find the UNet in a file: ("ldm" or "diffusers", name in the file -> name without prefix).

    A whole checkpoint is cut down to its UNet; in a file of one UNet every name counts, so that
    nothing unknown is dropped. Raises FrugalError for any other file.
    """
    names = list(names)
    inside = {name: name[len(UNET_PREFIX) :] for name in names if name.startswith(UNET_PREFIX)}
    inside = inside or {name: name for name in names}
    canonical = set(inside.values())
    if "input_blocks.0.0.weight" in canonical:
        return "ldm", inside
    if "conv_in.weight" in canonical and any(n.startswith("down_blocks.") for n in canonical):
        return "diffusers", inside
    raise FrugalError(
        f"{file} has {len(names)} tensors and no Stable Diffusion 1.5 UNet among them",
        "'input_blocks.0.0.weight' (LDM names) or 'conv_in.weight' (diffusers names)",
        GET_BASE,
    )


def variant(in_channels: int, file: str) -> str:
    """MASKED for 9 input channels [noisy latent 4, mask 1, masked picture 4], MASK_FREE for 8
    [noisy latent 4, picture 4]; FrugalError for any other number.
    """
    found = {INPAINT_CHANNELS: MASKED, MASK_FREE_CHANNELS: MASK_FREE}.get(in_channels)
    if found is not None:
        return found
    kind = " (a plain text-to-image model)" if in_channels == PLAIN_CHANNELS else ""
    raise FrugalError(
        f"{file} has {in_channels} input channels{kind}",
        f"the {INPAINT_CHANNELS} channels of an SD 1.5 inpainting UNet, or the "
        f"{MASK_FREE_CHANNELS} of instruct-pix2pix for mask-free weights",
        GET_BASE,
    )


def unet_config(shapes: Mapping[str, Shape], file: str) -> dict[str, Any]:
    """Block structure of a UNet in diffusers names, in the terms of LDM's UNetModel.

    Gives `num_res_blocks` and `channel_mult` per level, `transformer_depth` per down block in
    order, `transformer_depth_output` per up block from the last to the first,
    `transformer_depth_middle`, `in_channels` and `model_channels`. Raises FrugalError when levels,
    widths or blocks do not agree.
    """

    def count(pattern: str) -> int:
        found = {
            int(m.group(1)) for m in (re.match(pattern, name) for name in shapes) if m is not None
        }
        if found != set(range(len(found))):
            raise FrugalError(
                f"{file} has gaps in the numbering {sorted(found)} of '{pattern}'",
                "blocks numbered from 0 without gaps",
                GET_BASE,
            )
        return len(found)

    def depth(attention: str) -> int:
        return count(re.escape(attention) + r"\.transformer_blocks\.(\d+)\.")

    width = shapes["conv_in.weight"][0]
    levels = count(r"down_blocks\.(\d+)\.")
    res, mult, down, up = [], [], [], []
    for level in range(levels):
        blocks = count(rf"down_blocks\.{level}\.resnets\.(\d+)\.")
        channels = shapes.get(f"down_blocks.{level}.resnets.0.conv1.weight", (0,))[0]
        if blocks == 0 or channels % width or channels == 0:
            raise FrugalError(
                f"{file} has {blocks} residual blocks of {channels} channels at level {level}",
                f"at least one block, its width a multiple of {width}",
                GET_BASE,
            )
        res.append(blocks)
        mult.append(channels // width)
        down += [depth(f"down_blocks.{level}.attentions.{i}") for i in range(blocks)]
    if count(r"up_blocks\.(\d+)\.") != levels:
        raise FrugalError(
            f"{file} has unequal numbers of down and up blocks", str(levels), GET_BASE
        )
    for level, blocks in enumerate(reversed(res)):
        found = count(rf"up_blocks\.{level}\.resnets\.(\d+)\.")
        if found != blocks + 1:
            raise FrugalError(
                f"{file} has {found} residual blocks in up block {level}", str(blocks + 1), GET_BASE
            )
        up += [depth(f"up_blocks.{level}.attentions.{i}") for i in range(found)]
    middle = depth("mid_block.attentions.0")
    if middle == 0:
        raise FrugalError(f"{file} has no attention in the middle block", "one", GET_BASE)
    return {
        "in_channels": shapes["conv_in.weight"][1],
        "model_channels": width,
        "num_res_blocks": res,
        "channel_mult": mult,
        "transformer_depth": down,
        "transformer_depth_output": up[::-1],
        "transformer_depth_middle": middle,
    }


def attention_order(diffusers_to_ldm: Mapping[str, str]) -> list[str]:
    """Self-attention modules ("input_blocks.1.1.transformer_blocks.0.attn1") in CatVTON's file
    order.

    The order is that of the diffusers module tree: down blocks, up blocks, then the middle block.
    `diffusers_to_ldm` maps tensor names of one UNet.
    """
    suffix = ".attn1.to_q.weight"
    part = {"down_blocks": 0, "up_blocks": 1, "mid_block": 2}

    def key(name: str) -> tuple[int, ...]:
        return part[name.partition(".")[0]], *map(int, re.findall(r"\d+", name[: -len(suffix)]))

    found = sorted((name for name in diffusers_to_ldm if name.endswith(suffix)), key=key)
    return [diffusers_to_ldm[name].removesuffix(".to_q.weight") for name in found]


def attention_groups(shapes: Mapping[str, Shape], file: str) -> list[tuple[int, int]]:
    """(index, width) of every block in a CatVTON attention file, in index order.

    A block i owns exactly `i.to_q.weight`, `i.to_k.weight`, `i.to_v.weight`, `i.to_out.0.weight`,
    all (C, C), and `i.to_out.0.bias`, (C,). Indices run from 0 with one constant stride: 8 in the
    published files, 7 where the attention processor is no module. Anything else raises
    FrugalError.
    """
    need = "an attention file with '0.to_q.weight', '8.to_q.weight' and so on, five tensors a block"
    do = "take <version>/attention/model.safetensors from the CatVTON weights unchanged"
    groups: dict[int, dict[str, Shape]] = {}
    for name, shape in shapes.items():
        index, _, tensor = name.partition(".")
        if not index.isdecimal() or tensor not in TENSORS:
            raise FrugalError(f"{file} has the tensor '{name}'", need, do)
        groups.setdefault(int(index), {})[tensor] = tuple(shape)
    if not groups:
        raise FrugalError(f"{file} is empty", need, do)
    found = []
    for index in sorted(groups):
        missing = [tensor for tensor in TENSORS if tensor not in groups[index]]
        if missing:
            raise FrugalError(f"{file} lacks '{index}.{missing[0]}'", need, do)
        width = groups[index]["to_q.weight"][0]
        for tensor in TENSORS:
            want = (width,) if tensor.endswith("bias") else (width, width)
            if groups[index][tensor] != want:
                raise FrugalError(
                    f"{file} has '{index}.{tensor}' of shape {groups[index][tensor]}", str(want), do
                )
        found.append((index, width))
    indices = [index for index, _ in found]
    stride = indices[1] if len(indices) > 1 else 1
    if indices != list(range(0, stride * len(indices), max(stride, 1))):
        raise FrugalError(
            f"{file} has the block indices {indices}", "0, then one constant step", do
        )
    return found


def attention_map(
    attention: Mapping[str, Shape], unet: Mapping[str, Shape], order: list[str], file: str
) -> dict[str, str]:
    """Name in the attention file -> canonical UNet name, all of them.

    `unet` gives the shapes of the UNet in canonical names, `order` comes from `attention_order`.
    The number of blocks and the sequence of widths must both agree: that is what tells a file
    indexed in another order (down, middle, up) from the right one. Raises FrugalError otherwise.
    """
    groups = attention_groups(attention, file)
    want = [unet.get(f"{module}.to_q.weight", (0,))[0] for module in order]
    have = [width for _, width in groups]
    if have != want:
        raise FrugalError(
            f"{file} has {len(have)} attention blocks of widths {have}",
            f"{len(want)} blocks of widths {want} (down, up, middle) as in the chosen base",
            "choose the base and the attention file that belong together",
        )
    return {
        f"{index}.{tensor}": f"{module}.{tensor}"
        for (index, _), module in zip(groups, order, strict=True)
        for tensor in TENSORS
    }


def prediction_type(metadata: Mapping[str, str], names: Iterable[str], file: str) -> str:
    """ "epsilon" or "v".

    From the safetensors key `modelspec.prediction_type`, else from the marker tensor `v_pred` that
    ComfyUI writes into saved checkpoints, else epsilon. Raises FrugalError for any other word.
    """
    fallback = "v" if "v_pred" in names else "epsilon"
    named = metadata.get("modelspec.prediction_type", fallback).lower()
    known = {"epsilon": "epsilon", "eps": "epsilon", "v": "v", "v_prediction": "v"}
    if named not in known:
        raise FrugalError(
            f"{file} says modelspec.prediction_type '{named}'",
            "'epsilon' or 'v'",
            "take the base from its publisher again, or correct that metadata key",
        )
    return known[named]


def head_count(metadata: Mapping[str, str], widths: Iterable[int], file: str) -> int:
    """Attention heads from the safetensors key `num_heads`, else SD 1.5's 8; shapes cannot tell.

    Raises FrugalError when the number is none or does not divide every attention width.
    """
    text = metadata.get("num_heads", "8")
    heads = int(text) if text.isdecimal() and len(text) < 6 else 0
    bad = [width for width in widths if heads == 0 or width % heads]
    if bad:
        raise FrugalError(
            f"{file} is read with num_heads '{text}', which does not divide the width {bad[0]}",
            "a number of heads that divides every attention width",
            "set the safetensors metadata key num_heads",
        )
    return heads
