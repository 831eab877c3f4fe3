"""How diffusers calls the layers of a Wan model: one table, read in both directions."""

from __future__ import annotations

import re
from collections.abc import Mapping

BLOCK = re.compile(r"(?:vace_)?blocks\.\d+\.")
_EMBEDDER = "condition_embedder"
# Original name -> that of diffusers, of layers outside and inside of the blocks.
OUTSIDE = {
    "time_embedding.0": f"{_EMBEDDER}.time_embedder.linear_1",
    "time_embedding.2": f"{_EMBEDDER}.time_embedder.linear_2",
    "text_embedding.0": f"{_EMBEDDER}.text_embedder.linear_1",
    "text_embedding.2": f"{_EMBEDDER}.text_embedder.linear_2",
    "time_projection.1": f"{_EMBEDDER}.time_proj",
    "img_emb.proj.0": f"{_EMBEDDER}.image_embedder.norm1",
    "img_emb.proj.1": f"{_EMBEDDER}.image_embedder.ff.net.0.proj",
    "img_emb.proj.3": f"{_EMBEDDER}.image_embedder.ff.net.2",
    "img_emb.proj.4": f"{_EMBEDDER}.image_embedder.norm2",
    "head.head": "proj_out",
}
_ATTENTION = {
    "q": "to_q",
    "k": "to_k",
    "v": "to_v",
    "o": "to_out.0",
    "k_img": "add_k_proj",
    "v_img": "add_v_proj",
    "norm_q": "norm_q",
    "norm_k": "norm_k",
    "norm_k_img": "norm_added_k",
}
INSIDE = {
    **{f"self_attn.{ours}": f"attn1.{theirs}" for ours, theirs in _ATTENTION.items()},
    **{f"cross_attn.{ours}": f"attn2.{theirs}" for ours, theirs in _ATTENTION.items()},
    # Their norm2 is the norm before cross-attention, which the original calls norm3.
    "norm3": "norm2",
    "ffn.0": "ffn.net.0.proj",
    "ffn.2": "ffn.net.2",
    "before_proj": "proj_in",
    "after_proj": "proj_out",
}
# Parameters that belong to no layer.
_BARE_OUTSIDE = {
    "head.modulation": "scale_shift_table",
    "img_emb.emb_pos": f"{_EMBEDDER}.image_embedder.pos_embed",
}
_BARE_INSIDE = {"modulation": "scale_shift_table"}


def _turned(table: Mapping[str, str]) -> dict[str, str]:
    return {theirs: ours for ours, theirs in table.items()}


_BACK_OUTSIDE = _turned(OUTSIDE | _BARE_OUTSIDE)
_BACK_INSIDE = _turned(INSIDE | _BARE_INSIDE)


def to_diffusers(name: str) -> str:
    """The diffusers name of a layer or tensor given by its original name, such as
    blocks.0.self_attn.q, whatever follows the layer's name; a name that is in no table stays.
    """
    return _renamed(name, OUTSIDE | _BARE_OUTSIDE, INSIDE | _BARE_INSIDE)


def to_original(name: str) -> str:
    """The original name of a tensor or layer given by that of diffusers, whatever follows the
    layer's name, such as .weight; a name that is in no table stays.
    """
    return _renamed(name, _BACK_OUTSIDE, _BACK_INSIDE)


def _renamed(name: str, outside: Mapping[str, str], inside: Mapping[str, str]) -> str:
    block = BLOCK.match(name)
    head = block.group() if block else ""
    table = inside if block else outside
    parts = name[len(head) :].split(".")
    for count in range(len(parts), 0, -1):
        found = table.get(".".join(parts[:count]))
        if found is not None:
            return head + ".".join((found, *parts[count:]))
    return name
