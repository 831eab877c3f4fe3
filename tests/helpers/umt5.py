"""A tiny umT5 text encoder that ComfyUI builds in place of the 6.7 GB one (in the test process)."""

from __future__ import annotations

import io
from typing import Any

import torch

from frugal.demo.tiny_wan import fill

WIDTH, HEADS, HEAD_WIDTH, FEED_FORWARD, LAYERS, PIECES, BUCKETS = 64, 2, 32, 128, 1, 400, 32
# ComfyUI calls a file umT5-XXL by the shape of this tensor, which a one-layer model does not have.
MARKER, MARKER_SHAPE = "encoder.block.23.layer.1.DenseReluDense.wi_1.weight", (10240, 4096)


def piece_model() -> bytes:
    """A SentencePiece model of 400 pieces, trained on sentences made here."""
    import sentencepiece

    words = [
        "a",
        "red",
        "blue",
        "striped",
        "shirt",
        "person",
        "walks",
        "over",
        "the",
        "old",
        "bridge",
    ]
    sentences = [
        " ".join(words[(i * k + j) % len(words)] + "abcdefghijklmnopqrstuvwxyz"[(i + j) % 26 :][:k]
                 for j in range(6))
        for i in range(300)
        for k in (1, 2, 3)
    ]  # fmt: skip
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(sentences),
        model_writer=model,
        vocab_size=PIECES,
        pad_id=0,
        eos_id=1,
        unk_id=2,
        bos_id=-1,
        minloglevel=2,
    )
    return model.getvalue()


def umt5(seed: int = 0) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """State dict and model_options for comfy.sd.load_text_encoder_state_dicts, type WAN."""
    shapes = {"shared.weight": (PIECES, WIDTH), "encoder.final_layer_norm.weight": (WIDTH,)}
    inner = HEADS * HEAD_WIDTH
    for layer in range(LAYERS):
        attention, feed = (f"encoder.block.{layer}.layer.{part}" for part in (0, 1))
        shapes |= {f"{attention}.SelfAttention.{p}.weight": (inner, WIDTH) for p in "qkv"}
        shapes[f"{attention}.SelfAttention.o.weight"] = (WIDTH, inner)
        shapes[f"{attention}.SelfAttention.relative_attention_bias.weight"] = (BUCKETS, HEADS)
        shapes[f"{attention}.layer_norm.weight"] = shapes[f"{feed}.layer_norm.weight"] = (WIDTH,)
        shapes |= {
            f"{feed}.DenseReluDense.{p}.weight": (FEED_FORWARD, WIDTH) for p in ("wi_0", "wi_1")
        }
        shapes[f"{feed}.DenseReluDense.wo.weight"] = (WIDTH, FEED_FORWARD)
    state = fill(shapes, seed, torch.float32)
    state["spiece_model"] = torch.frombuffer(bytearray(piece_model()), dtype=torch.uint8)
    # On the meta device it costs nothing, and the non-strict load drops it.
    state[MARKER] = torch.empty(MARKER_SHAPE, device="meta")
    config = {
        "d_ff": FEED_FORWARD, "d_kv": HEAD_WIDTH, "d_model": WIDTH, "num_heads": HEADS,
        "dense_act_fn": "gelu_pytorch_tanh", "is_gated_act": True, "model_type": "umt5",
        "num_layers": LAYERS, "vocab_size": PIECES,
    }  # fmt: skip
    return state, {"umt5xxl_model_config": config}
