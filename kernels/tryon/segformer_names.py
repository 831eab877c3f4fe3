"""Names of Segformer's tensors: files keep the published ones, newer transformers use their own."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping

# Published name -> module name in transformers 5, applied in this order.
RENAMED = (
    (r"segformer\.encoder\.patch_embeddings\.(\d+)\.", r"segformer.stages.\1.patch_embeddings."),
    (r"segformer\.encoder\.block\.(\d+)\.", r"segformer.stages.\1.blocks."),
    (r"segformer\.encoder\.layer_norm\.(\d+)\.", r"segformer.stages.\1.layer_norm."),
    (r"\.attention\.self\.query\.", ".attention.q_proj."),
    (r"\.attention\.self\.key\.", ".attention.k_proj."),
    (r"\.attention\.self\.value\.", ".attention.v_proj."),
    (r"\.attention\.self\.sr\.", ".attention.sequence_reduction.sequence_reduction."),
    (r"\.attention\.self\.layer_norm\.", ".attention.sequence_reduction.layer_norm."),
    (r"\.attention\.output\.dense\.", ".attention.o_proj."),
    (r"\.mlp\.dense(\d)\.", r".mlp.fc\1."),
    (r"\.layer_norm_1\.", ".layernorm_before."),
    (r"\.layer_norm_2\.", ".layernorm_after."),
    (r"decode_head\.linear_c\.", "decode_head.linear_projections."),
)


def module_names(stored: Collection[str], wanted: Collection[str]) -> Mapping[str, str]:
    """Stored name -> name of the module's tensor. A name that is wanted as it is stays; whether
    all fit is for the caller to check.
    """
    found, there = {}, set(wanted)
    for name in stored:
        new = name
        if name not in there:
            for pattern, replacement in RENAMED:
                new = re.sub(pattern, replacement, new)
        found[name] = new
    return found
