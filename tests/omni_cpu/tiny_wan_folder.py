"""A Wan 2.1 with random weights as diffusers saves it: `python tiny_wan_folder.py FOLDER [image]`.

Runs in the server's environment, whose own diffusers and transformers write what it reads. Sizes
that Wan's file format fixes (text 4096, image 1280, time 256) are as in the real models, all others
are tiny. What it paints is noise.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from diffusers import (
    AutoencoderKLWan,
    UniPCMultistepScheduler,
    WanImageToVideoPipeline,
    WanPipeline,
    WanTransformer3DModel,
)
from tokenizers import Tokenizer, models, pre_tokenizers, processors, trainers
from transformers import (
    CLIPImageProcessor,
    CLIPVisionConfig,
    CLIPVisionModel,
    PreTrainedTokenizerFast,
    UMT5Config,
    UMT5EncoderModel,
)

WORDS = ["a cat walks through fresh snow", "blurry, static, worst quality", "a person turns"]
DIM, HEADS = 256, 2


def tokenizer() -> PreTrainedTokenizerFast:
    made = Tokenizer(models.Unigram())
    made.pre_tokenizer = pre_tokenizers.Metaspace()
    special = ["<pad>", "</s>", "<unk>"]
    trainer = trainers.UnigramTrainer(vocab_size=200, special_tokens=special, unk_token="<unk>")
    made.train_from_iterator(WORDS, trainer)
    made.post_processor = processors.TemplateProcessing(
        single="$A </s>", special_tokens=[("</s>", 1)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=made,
        pad_token="<pad>",
        eos_token="</s>",
        unk_token="<unk>",
        model_max_length=512,
    )


def main(folder: Path, image: bool) -> None:
    torch.manual_seed(0)
    transformer = WanTransformer3DModel(
        num_attention_heads=HEADS,
        attention_head_dim=DIM // HEADS,
        in_channels=36 if image else 16,
        out_channels=16,
        text_dim=4096,
        freq_dim=256,
        ffn_dim=512,
        num_layers=2,
        image_dim=1280 if image else None,
        added_kv_proj_dim=DIM if image else None,
    )
    vae = AutoencoderKLWan(base_dim=8, z_dim=16, dim_mult=[1, 1, 1, 1], num_res_blocks=1)
    encoder = UMT5EncoderModel(
        UMT5Config(
            d_model=4096, d_kv=8, d_ff=64, num_layers=1, num_heads=4, vocab_size=256,
            feed_forward_proj="gated-gelu",
        )
    )  # fmt: skip
    scheduler = UniPCMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0
    )
    parts = {
        "transformer": transformer.to(torch.bfloat16),
        "vae": vae,
        "text_encoder": encoder.to(torch.bfloat16),
        "tokenizer": tokenizer(),
        "scheduler": scheduler,
    }
    if image:
        vision = CLIPVisionConfig(
            hidden_size=1280, intermediate_size=64, num_hidden_layers=2, num_attention_heads=16,
            image_size=32, patch_size=8,
        )  # fmt: skip
        parts["image_encoder"] = CLIPVisionModel(vision)
        parts["image_processor"] = CLIPImageProcessor(
            size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}
        )
    pipeline = WanImageToVideoPipeline if image else WanPipeline
    pipeline(**parts).save_pretrained(folder)


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:] == ["image"])
