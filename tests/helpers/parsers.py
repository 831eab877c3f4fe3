"""A human parser of a few thousand weights, in a folder as transformers saves it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

TINY = {
    "num_encoder_blocks": 4, "depths": [1, 1, 1, 1], "hidden_sizes": [8, 8, 16, 16],
    "num_attention_heads": [1, 1, 2, 2], "decoder_hidden_size": 16, "sr_ratios": [8, 4, 2, 1],
}  # fmt: skip


def save_parser(folder: Path, names: Sequence[str]):
    """Write a Segformer with random weights and these label names to `folder`; returns it."""
    import torch
    from transformers import SegformerConfig, SegformerForSemanticSegmentation

    torch.manual_seed(0)
    config = SegformerConfig(**TINY, id2label=dict(enumerate(names)))
    network = SegformerForSemanticSegmentation(config).eval()
    network.save_pretrained(folder)
    settings = {
        "size": {"height": 64, "width": 48},
        "image_mean": [0.5] * 3,
        "image_std": [0.2] * 3,
    }
    (folder / "preprocessor_config.json").write_text(json.dumps(settings))
    return network
