"""The SD-style autoencoder (AutoencoderKL) of any width: structure and canonical names from
shapes.

Canonical names are LDM's ("encoder.down.0.block.0.conv1.weight"). diffusers numbers the decoder's
up blocks in the other direction and keeps the attention matrices as (C, C) where LDM has 1x1
convolutions (C, C, 1, 1). Structure: Rombach et al., arXiv 2112.10752.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ..errors import FrugalError

Shape = tuple[int, ...]

CHECKPOINT_PREFIX = "first_stage_model."
GROUPS = 32  # of every GroupNorm
DO = "take an SD 1.x VAE such as sd-vae-ft-mse (models/vae)"


@dataclass(frozen=True)
class AutoencoderLayout:
    """What the shapes of one AutoencoderKL say; `widths`: channels per level, finest first."""

    widths: tuple[int, ...]
    num_res_blocks: int
    in_channels: int
    out_channels: int
    z_channels: int
    embed_dim: int

    @property
    def factor(self) -> int:
        """Pixels per latent cell along one side."""
        return 2 ** (len(self.widths) - 1)

    def params(self) -> dict[str, Any]:
        """Arguments of LDM's AutoencoderKL."""
        ch = self.widths[0]
        return {
            "embed_dim": self.embed_dim,
            "ddconfig": {
                "double_z": True,
                "z_channels": self.z_channels,
                "resolution": 256,
                "in_channels": self.in_channels,
                "out_ch": self.out_channels,
                "ch": ch,
                "ch_mult": [width // ch for width in self.widths],
                "num_res_blocks": self.num_res_blocks,
                "attn_resolutions": [],
                "dropout": 0.0,
            },
        }

    def shapes(self) -> dict[str, Shape]:
        """Every canonical tensor name with its shape."""
        out: dict[str, Shape] = {}

        def conv(name: str, n_in: int, n_out: int, kernel: int) -> None:
            out[f"{name}.weight"], out[f"{name}.bias"] = (n_out, n_in, kernel, kernel), (n_out,)

        def norm(name: str, n: int) -> None:
            out[f"{name}.weight"] = out[f"{name}.bias"] = (n,)

        def res(name: str, n_in: int, n_out: int) -> None:
            norm(f"{name}.norm1", n_in)
            conv(f"{name}.conv1", n_in, n_out, 3)
            norm(f"{name}.norm2", n_out)
            conv(f"{name}.conv2", n_out, n_out, 3)
            if n_in != n_out:
                conv(f"{name}.nin_shortcut", n_in, n_out, 1)

        def middle(side: str, n: int) -> None:
            res(f"{side}.mid.block_1", n, n)
            norm(f"{side}.mid.attn_1.norm", n)
            for part in ("q", "k", "v", "proj_out"):
                conv(f"{side}.mid.attn_1.{part}", n, n, 1)
            res(f"{side}.mid.block_2", n, n)

        last = len(self.widths) - 1
        conv("encoder.conv_in", self.in_channels, self.widths[0], 3)
        width = self.widths[0]
        for level, n in enumerate(self.widths):
            for block in range(self.num_res_blocks):
                res(f"encoder.down.{level}.block.{block}", width, n)
                width = n
            if level != last:
                conv(f"encoder.down.{level}.downsample.conv", n, n, 3)
        middle("encoder", width)
        norm("encoder.norm_out", width)
        conv("encoder.conv_out", width, 2 * self.z_channels, 3)
        conv("quant_conv", 2 * self.z_channels, 2 * self.embed_dim, 1)
        conv("post_quant_conv", self.embed_dim, self.z_channels, 1)
        conv("decoder.conv_in", self.z_channels, width, 3)
        middle("decoder", width)
        for level in range(last, -1, -1):
            n = self.widths[level]
            for block in range(self.num_res_blocks + 1):
                res(f"decoder.up.{level}.block.{block}", width, n)
                width = n
            if level != 0:
                conv(f"decoder.up.{level}.upsample.conv", n, n, 3)
        norm("decoder.norm_out", width)
        conv("decoder.conv_out", width, self.out_channels, 3)
        return out


def _canonical_name(name: str, levels: int) -> str:
    """LDM name of a diffusers one; any other comes back as it is and fails the check."""
    name = re.sub(r"^encoder\.down_blocks\.(\d+)\.resnets\.", r"encoder.down.\1.block.", name)
    name = re.sub(
        r"^encoder\.down_blocks\.(\d+)\.downsamplers\.0\.", r"encoder.down.\1.downsample.", name
    )
    for old, new in (("resnets.", "block."), ("upsamplers.0.", "upsample.")):
        name = re.sub(
            rf"^decoder\.up_blocks\.(\d+)\.{re.escape(old)}",
            lambda m, new=new: f"decoder.up.{levels - 1 - int(m.group(1))}.{new}",
            name,
        )
    name = re.sub(
        r"\.mid_block\.resnets\.(\d+)\.", lambda m: f".mid.block_{int(m.group(1)) + 1}.", name
    )
    name = name.replace(".conv_shortcut.", ".nin_shortcut.").replace(
        ".conv_norm_out.", ".norm_out."
    )
    if ".mid_block.attentions.0." not in name:
        return name
    head, _, part = name.partition(".mid_block.attentions.0.")
    stem, _, kind = part.rpartition(".")
    ldm = {"group_norm": "norm", "to_out.0": "proj_out", "proj_attn": "proj_out"}
    ldm |= {"to_q": "q", "to_k": "k", "to_v": "v", "query": "q", "key": "k", "value": "v"}
    return f"{head}.mid.attn_1.{ldm.get(stem, stem)}.{kind}"


def _layout(shapes: Mapping[str, Shape], file: str) -> AutoencoderLayout:
    def numbers(pattern: str) -> int:
        return len({m.group(1) for m in (re.match(pattern, name) for name in shapes) if m})

    def shape(name: str) -> Shape:
        if name not in shapes or len(shapes[name]) != 4:
            raise FrugalError(
                f"{file} has {len(shapes)} tensors and no usable '{name}'",
                "the encoder and decoder of an SD-style VAE",
                DO,
            )
        return shapes[name]

    levels = numbers(r"encoder\.down\.(\d+)\.")
    widths = tuple(
        shape(f"encoder.down.{level}.block.0.conv1.weight")[0] for level in range(levels)
    )
    ch = shape("encoder.conv_in.weight")[0]
    if not widths or widths[0] != ch or any(width % ch or width % GROUPS for width in widths):
        raise FrugalError(
            f"{file} has {ch} channels, then {list(widths)} per level",
            f"a first level of the same width and widths in multiples of it and of {GROUPS}",
            DO,
        )
    return AutoencoderLayout(
        widths=widths,
        num_res_blocks=numbers(r"encoder\.down\.0\.block\.(\d+)\."),
        in_channels=shape("encoder.conv_in.weight")[1],
        out_channels=shape("decoder.conv_out.weight")[0],
        z_channels=shape("decoder.conv_in.weight")[1],
        embed_dim=shape("post_quant_conv.weight")[1],
    )


def canonical_autoencoder(
    shapes: Mapping[str, Shape], file: str
) -> tuple[AutoencoderLayout, dict[str, tuple[str, Shape]]]:
    """(layout, name in the file -> (canonical name, canonical shape)) of an SD-style VAE.

    Accepts LDM names, diffusers names (both generations of attention names) and a whole
    checkpoint, whose `first_stage_model.` part is taken. A canonical shape differs from the stored
    one only for attention matrices, by two axes of length 1, so a view is enough. A missing,
    unknown or wrongly shaped tensor raises FrugalError.
    """
    inside = {name: name.removeprefix(CHECKPOINT_PREFIX) for name in shapes}
    if any(name.startswith(CHECKPOINT_PREFIX) for name in shapes):
        inside = {name: short for name, short in inside.items() if name != short}
    levels = len({name.split(".")[2] for name in inside.values() if ".up_blocks." in name})
    renamed = {name: _canonical_name(short, levels) for name, short in inside.items()}
    if len(set(renamed.values())) != len(renamed):
        raise FrugalError(f"{file} names one tensor twice", "one naming throughout", DO)
    layout = _layout({new: tuple(shapes[name]) for name, new in renamed.items()}, file)
    want = layout.shapes()
    missing = sorted(want.keys() - set(renamed.values()))
    unknown = sorted(set(renamed.values()) - want.keys())
    if missing or unknown:
        named = [f"lacks {len(missing)} tensors ('{missing[0]}')"] if missing else []
        named += [f"has {len(unknown)} unknown ones ('{unknown[0]}')"] if unknown else []
        raise FrugalError(
            f"{file} {' and '.join(named)}",
            f"the {len(want)} tensors of an SD-style VAE with levels {list(layout.widths)}",
            DO,
        )
    result = {}
    for name, new in renamed.items():
        have = tuple(shapes[name])
        if have != want[new] and (*have, 1, 1) != want[new]:
            raise FrugalError(f"{file} has '{name}' of shape {have}", str(want[new]), DO)
        result[name] = (new, want[new])
    return layout, result
