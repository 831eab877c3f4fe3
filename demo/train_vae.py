"""Train the demo's picture codec: `python -m demo.train_vae DATA_FOLDER... --out codec.pt --minutes
15`.

`--decoder-only` keeps the encoder, and so every latent already stored, and improves the pictures
alone. Loss: L1 + 2 MSE + 0.3 gradient L1 (pictures in -1..1), and a pull of the latents to mean 0
and deviation 1.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import numpy as np
import torch

from .codec import Codec, start_from_block_means
from .muon import Muon, schedule


def to_tensor(pictures: np.ndarray) -> torch.Tensor:
    """uint8 [N, H, W, 3] -> float32 [N, 3, H, W] in 0..1, channels last in memory."""
    x = torch.from_numpy(np.ascontiguousarray(pictures)).permute(0, 3, 1, 2).float().div_(255)
    return x.to(memory_format=torch.channels_last)


def crops(
    sources: list[tuple[np.ndarray, np.ndarray, np.ndarray]], n: int, size: int, rng
) -> torch.Tensor:
    """Random crops: half persons, a fifth masked persons (grey inside), the rest garments."""
    out = np.empty((n, size, size, 3), np.uint8)
    for i in range(n):
        person, garment, mask = sources[rng.integers(len(sources))]
        k, kind = rng.integers(len(person)), rng.random()
        y, x = rng.integers(person.shape[1] - size + 1), rng.integers(person.shape[2] - size + 1)
        if kind >= 0.7:
            y = min(max(y, 40), 80)
        window = np.s_[k, y : y + size, x : x + size]
        out[i] = garment[window] if kind >= 0.7 else person[window]
        if 0.5 <= kind < 0.7:
            out[i][mask[window] > 0] = 127
        if rng.random() < 0.5:
            out[i] = out[i][:, ::-1]
    return to_tensor(out)


def picture_loss(y: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    d = 2 * (y - x)
    return (
        d.abs().mean()
        + 2 * d.square().mean()
        + 0.3 * (d.diff(dim=2).abs().mean() + d.diff(dim=3).abs().mean())
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("data", type=Path, nargs="+")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--minutes", type=float, default=15)
    parser.add_argument("--init", type=Path)
    parser.add_argument("--decoder-only", action="store_true")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--crop", type=int, default=64)
    parser.add_argument("--lr", type=float, default=0.004)
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    rng = np.random.default_rng(1 if args.decoder_only else 0)
    names = ("person.npy", "garment.npy", "mask.npy")
    sources = [tuple(np.load(d / n, mmap_mode="r") for n in names) for d in args.data]
    codec = Codec().to(memory_format=torch.channels_last)
    if args.init:
        codec.load_state_dict(torch.load(args.init, weights_only=True))
    else:
        blocks = torch.nn.functional.avg_pool2d(crops(sources, 200, args.crop, rng), 8)
        start_from_block_means(codec, blocks.permute(0, 2, 3, 1).reshape(-1, 3))
    trained = list((codec.taesd_decoder if args.decoder_only else codec).parameters())
    optimizer = Muon(trained, lr=args.lr, adam_lr=args.lr / 4)
    start, step, shown = time.time(), 0, []
    while (progress := (time.time() - start) / (60 * args.minutes)) < 1:
        schedule(optimizer, progress)
        x = crops(sources, args.batch, args.crop, rng)
        with torch.set_grad_enabled(not args.decoder_only):
            z = codec.encode(x)
        y = codec.decode(z + 0.04 * torch.randn_like(z))
        loss = picture_loss(y, x)
        if not args.decoder_only:
            loss = loss + 0.02 * (
                z.mean((0, 2, 3)).square().mean() + (z.std((0, 2, 3)) - 1).square().mean()
            )
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        shown.append((y.detach() - x).square().mean().item())
        step += 1
        if step % 50 == 1:
            psnr = -10 * np.log10(np.mean(shown[-50:]))
            print(
                f"step {step} progress {progress:.3f} psnr {psnr:.2f} "
                f"z {z.std((0, 2, 3)).tolist()}",
                flush=True,
            )
            torch.save(codec.state_dict(), args.out)
    torch.save(codec.state_dict(), args.out)


if __name__ == "__main__":
    main()
