"""The parameters of a Wan model, by name and shape, from its configuration (Wan 2.1 release,
`model.py`).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

from ..errors import FrugalError

FREQ_DIM = 256
TEXT_DIM = 4096
IMAGE_DIM = 1280
# Of a prompt as ComfyUI's umT5 pads it, and of a CLIP image.
TEXT_TOKENS, IMAGE_TOKENS = 512, 257
MAX_LAYERS = 200
CAMERA_DIM = 24 * 64

# Later models built on Wan blocks, by the start of a name: their parameters are not in the table
# below, only in the class that a ComfyUI which knows the model builds.
RELATIVES = {
    "casual_audio_encoder.": "2.2 S2V",
    "audio_proj.": "HuMo",
    "face_adapter.": "Animate",
    "patch_embedding_mask.": "SCAIL 2",
    "patch_embedding_pose.": "SCAIL",
    "patch_embedding_global.": "Dancer",
}


@dataclass(frozen=True)
class Parameter:
    """Shape of a parameter; `linear` marks the weight of a linear layer [out, in], which may be
    quantised.
    """

    shape: tuple[int, ...]
    linear: bool = False


@dataclass(frozen=True)
class WanConfig:
    """What the shapes of a file say about the model. Zero means that the part is absent."""

    dim: int
    ffn_dim: int
    layers: int
    in_dim: int
    out_dim: int
    text_dim: int = TEXT_DIM
    image: bool = False
    flf_tokens: int = 0
    ref_dim: int = 0
    camera: bool = False
    vace_layers: int = 0
    vace_in_dim: int = 0
    # Name of a relative whose parameters are those of ComfyUI's class, not of `parameters`.
    relative: str = ""

    @property
    def variant(self) -> str:
        if self.relative:
            return self.relative
        if self.vace_layers:
            return "VACE"
        if self.camera:
            return "Fun camera"
        if self.flf_tokens:
            return "FLF2V"
        if self.in_dim >= 48 and self.out_dim == 16:
            return "Fun control"
        return "I2V" if self.image or self.in_dim == 36 else "T2V"

    @property
    def size(self) -> str:
        return {1536: "1.3B", 3072: "5B", 5120: "14B"}.get(self.dim, f"width {self.dim}")


def detect_config(
    file: str, shapes: Mapping[str, tuple[int, ...]], text_dim: int = TEXT_DIM
) -> WanConfig:
    """The configuration from canonical names and shapes. Raises FrugalError if a shape it needs
    is not there.
    """

    def shape(name: str, rank: int) -> tuple[int, ...]:
        found = shapes.get(name)
        if found is None or len(found) != rank or 0 in found:
            raise FrugalError(
                f"{file} holds {name} as {list(found) if found is not None else 'nothing'}",
                f"a tensor with {rank} dimensions",
                "download the file again or choose another one",
            )
        return found

    vace = "vace_patch_embedding.weight" in shapes
    return WanConfig(
        dim=shape("head.modulation", 3)[2],
        ffn_dim=shape("blocks.0.ffn.0.bias", 1)[0],
        layers=_count(file, shapes, "blocks"),
        in_dim=shape("patch_embedding.weight", 5)[1],
        out_dim=shape("head.head.bias", 1)[0] // 4,
        text_dim=text_dim,
        image="img_emb.proj.0.bias" in shapes,
        flf_tokens=shape("img_emb.emb_pos", 3)[1] if "img_emb.emb_pos" in shapes else 0,
        ref_dim=shape("ref_conv.weight", 4)[1] if "ref_conv.weight" in shapes else 0,
        camera="control_adapter.conv.weight" in shapes,
        vace_layers=_count(file, shapes, "vace_blocks") if vace else 0,
        vace_in_dim=shape("vace_patch_embedding.weight", 5)[1] if vace else 0,
        relative=next(
            (kind for start, kind in RELATIVES.items() if any(n.startswith(start) for n in shapes)),
            "",
        ),
    )


def _count(file: str, shapes: Mapping[str, tuple[int, ...]], group: str) -> int:
    pattern = re.compile(rf"{group}\.(\d{{1,9}})\.")
    count = 1 + max(
        (int(match.group(1)) for name in shapes if (match := pattern.match(name))), default=-1
    )
    if not 1 <= count <= MAX_LAYERS:
        raise FrugalError(
            f"{file} holds {group} up to number {count - 1}",
            f"1 to {MAX_LAYERS} of them",
            "choose a Wan file",
        )
    return count


def parameters(config: WanConfig) -> dict[str, Parameter]:
    """Every parameter of the model: canonical name -> Parameter."""
    dim, table = config.dim, {}

    def linear(name: str, out: int, inside: int) -> None:
        table[f"{name}.weight"] = Parameter((out, inside), linear=True)
        table[f"{name}.bias"] = Parameter((out,))

    def conv(name: str, out: int, *inside: int) -> None:
        table[f"{name}.weight"] = Parameter((out, *inside))
        table[f"{name}.bias"] = Parameter((out,))

    def norm(name: str, width: int) -> None:
        table[f"{name}.weight"] = Parameter((width,))
        table[f"{name}.bias"] = Parameter((width,))

    def block(name: str, image: bool) -> None:
        table[f"{name}.modulation"] = Parameter((1, 6, dim))
        for attention in ("self_attn", "cross_attn"):
            for part in "qkvo":
                linear(f"{name}.{attention}.{part}", dim, dim)
            for part in ("norm_q", "norm_k"):
                table[f"{name}.{attention}.{part}.weight"] = Parameter((dim,))
        if image:
            linear(f"{name}.cross_attn.k_img", dim, dim)
            linear(f"{name}.cross_attn.v_img", dim, dim)
            table[f"{name}.cross_attn.norm_k_img.weight"] = Parameter((dim,))
        norm(f"{name}.norm3", dim)
        linear(f"{name}.ffn.0", config.ffn_dim, dim)
        linear(f"{name}.ffn.2", dim, config.ffn_dim)

    conv("patch_embedding", dim, config.in_dim, 1, 2, 2)
    linear("text_embedding.0", dim, config.text_dim)
    linear("text_embedding.2", dim, dim)
    linear("time_embedding.0", dim, FREQ_DIM)
    linear("time_embedding.2", dim, dim)
    linear("time_projection.1", 6 * dim, dim)
    for index in range(config.layers):
        block(f"blocks.{index}", config.image)
    linear("head.head", 4 * config.out_dim, dim)
    table["head.modulation"] = Parameter((1, 2, dim))
    if config.image:
        norm("img_emb.proj.0", IMAGE_DIM)
        linear("img_emb.proj.1", IMAGE_DIM, IMAGE_DIM)
        linear("img_emb.proj.3", dim, IMAGE_DIM)
        norm("img_emb.proj.4", dim)
    if config.flf_tokens:
        table["img_emb.emb_pos"] = Parameter((1, config.flf_tokens, IMAGE_DIM))
    if config.ref_dim:
        conv("ref_conv", dim, config.ref_dim, 2, 2)
    if config.camera:
        conv("control_adapter.conv", dim, CAMERA_DIM, 2, 2)
        conv("control_adapter.residual_blocks.0.conv1", dim, dim, 3, 3)
        conv("control_adapter.residual_blocks.0.conv2", dim, dim, 3, 3)
    if config.vace_layers:
        conv("vace_patch_embedding", dim, config.vace_in_dim, 1, 2, 2)
        for index in range(config.vace_layers):
            block(f"vace_blocks.{index}", image=False)
            linear(f"vace_blocks.{index}.after_proj", dim, dim)
        linear("vace_blocks.0.before_proj", dim, dim)
    return table
