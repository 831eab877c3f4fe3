"""Encode drawn pairs once: `python -m demo.encode DATA_FOLDER codec.pt OUT --start 0 --stop 2000`.

Writes shards of 250 pairs: latents float16 [N, 3, 4, 24, 16] (person, masked person, garment) and
the mask at latent size uint8 [N, 24, 16] (nearest, as the conditioning node takes it). The masked
person is grey (0.5) inside the mask.
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path

import numpy as np
import torch

from .codec import Codec
from .train_vae import to_tensor

SHARD = 250


@torch.no_grad()
def encode_pairs(
    codec: Codec, person: np.ndarray, garment: np.ndarray, mask: np.ndarray
) -> dict[str, np.ndarray]:
    """uint8 pictures [N, H, W, 3] and masks [N, H, W] -> one shard."""
    x, hole = to_tensor(person), torch.from_numpy(mask[:, None] > 127)
    parts = [codec.encode(p) for p in (x, torch.where(hole, 0.5, x), to_tensor(garment))]
    return {
        "latents": torch.stack(parts, 1).half().numpy(),
        "mask": (mask[:, ::8, ::8] > 127).astype(np.uint8),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("data", type=Path)
    parser.add_argument("codec", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--start", type=int, default=0)
    parser.add_argument("--stop", type=int, default=2000)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    args.out.mkdir(parents=True, exist_ok=True)
    codec = Codec().to(memory_format=torch.channels_last)
    codec.load_state_dict(torch.load(args.codec, weights_only=True))
    arrays = [np.load(args.data / f"{n}.npy", mmap_mode="r") for n in ("person", "garment", "mask")]
    for first in range(args.start, args.stop, SHARD):
        pieces = [
            encode_pairs(codec, *(np.array(a[i : i + 10]) for a in arrays))
            for i in range(first, min(first + SHARD, args.stop), 10)
        ]
        target = args.out / f"{args.data.name}-{first:06d}.npz"
        np.savez(
            target.with_suffix(".tmp.npz"),
            **{k: np.concatenate([p[k] for p in pieces]) for k in pieces[0]},
        )
        os.replace(target.with_suffix(".tmp.npz"), target)


if __name__ == "__main__":
    main()
