"""Measure the demo try-on model on held-out swaps: `python -m demo.evaluate --out FILE`.

Person k wears the garment of another pair; the renderer gives the truth. Two figures, both inside
the mask only:

retrieval: among 16 garments drawn on the same person, the one nearest to the result by colour and
texture statistics (mean, deviation, mean absolute horizontal and vertical difference of each
channel) must be the right one.

PSNR against the truth, beside two plain answers: the garment's mean colour over the whole mask,
and, told the true outline of the garment (which no model is), that mean colour inside it and the
truth elsewhere. "codec" is the truth after the codec alone: the ceiling of this model.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from .codec import Codec
from .data import held_out_swap
from .encode import encode_pairs
from .export import read
from .figures import render_garment, render_person
from .layout import MODELS
from .sheet import psnr
from .tryon_net import canvas, sample

CANDIDATES = 16


def features(picture: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """Twelve colour and texture statistics of uint8 [H, W, 3] inside mask [H, W] > 0."""
    x, hole = picture.astype(np.float32) / 255, mask > 0
    across = np.abs(np.diff(x, axis=1))[hole[:, 1:] & hole[:, :-1]]
    down = np.abs(np.diff(x, axis=0))[hole[1:] & hole[:-1]]
    return np.concatenate([x[hole].mean(0), x[hole].std(0), 2 * across.mean(0), 2 * down.mean(0)])


def mean_color(flat: np.ndarray) -> np.ndarray:
    cloth = np.abs(flat.astype(int) - 250).sum(-1) > 12
    return flat[cloth].mean(0)


@torch.no_grad()
def evaluate(
    codec: Codec, net, swaps: int, steps: int, seed: int = 0
) -> tuple[dict, list[np.ndarray]]:
    people, own, garments = zip(*(held_out_swap(k) for k in range(swaps)), strict=True)
    worn = [render_person(p, g) for p, g in zip(people, garments, strict=True)]
    before = [render_person(p, g)[0] for p, g in zip(people, own, strict=True)]
    flats = [render_garment(g) for g in garments]
    masks = np.stack([m for _, m in worn])
    right, scores, rows = (
        0,
        {"result": [], "mean_color": [], "mean_color_true_outline": [], "codec": []},
        [],
    )
    generator = torch.Generator().manual_seed(seed)
    for k in range(swaps):
        shard = encode_pairs(codec, before[k][None], flats[k][None], masks[k][None])
        z, m = torch.from_numpy(shard["latents"]).float(), torch.from_numpy(shard["mask"]).float()
        x0, condition = canvas(z, m, torch.ones(1))
        out = sample(net, condition, torch.randn(x0.shape, generator=generator), steps)[
            :, :, : m.shape[1]
        ]
        picture = codec.decode(out).clamp(0, 1)[0].permute(1, 2, 0).mul(255).round().byte().numpy()
        result = np.where(masks[k][..., None] > 0, picture, before[k])
        truth = worn[k][0]
        candidates = [(k + j) % swaps for j in range(CANDIDATES)]
        table = np.stack(
            [features(render_person(people[k], garments[j])[0], masks[k]) for j in candidates]
        )
        right += int(np.argmin(np.square(table - features(result, masks[k])).sum(1)) == 0)
        color = mean_color(flats[k])
        inks = [
            replace(garments[k], pattern="plain", colors=(ink, ink))
            for ink in ((255, 0, 255), (0, 255, 0))
        ]
        first, second = (render_person(people[k], g)[0].astype(int) for g in inks)
        outline = np.abs(first - second).sum(-1) > 6
        told = np.where(outline[..., None], color, truth)
        truth_codec = codec.decode(
            codec.encode(torch.from_numpy(truth).permute(2, 0, 1)[None].float() / 255)
        )
        back = truth_codec.clamp(0, 1)[0].permute(1, 2, 0).mul(255).numpy()
        answers = {
            "result": result,
            "mean_color": np.broadcast_to(color, truth.shape),
            "mean_color_true_outline": told,
            "codec": back,
        }
        for name, answer in answers.items():
            scores[name].append(psnr(answer, truth, masks[k]))
        if len(rows) < 16:
            grey = np.where(masks[k][..., None] > 0, 127, before[k]).astype(np.uint8)
            rows.append(np.concatenate([before[k], grey, flats[k], result, truth], 1))
    mean = {name: round(float(np.mean(values)), 2) for name, values in scores.items()}
    return {
        "swaps": swaps,
        "steps": steps,
        "retrieval_of_16": right / swaps,
        "masked_psnr_db": mean,
    }, rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", type=Path, default=MODELS)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--sheet", type=Path)
    parser.add_argument("--swaps", type=int, default=64)
    parser.add_argument("--steps", type=int, default=10)
    args = parser.parse_args()
    torch.set_num_threads(1)
    figures, rows = evaluate(*read(args.models), args.swaps, args.steps)
    print(json.dumps(figures, indent=1))
    if args.out:
        args.out.write_text(json.dumps(figures, indent=1) + "\n")
    if args.sheet:
        half = (len(rows) + 1) // 2
        Image.fromarray(
            np.concatenate([np.concatenate(rows[:half], 0), np.concatenate(rows[half:], 0)], 1)
        ).save(args.sheet)


if __name__ == "__main__":
    main()
