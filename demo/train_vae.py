"""Train the demo's picture codec: SD's AutoencoderKL at a tenth of its width (factor 8, 4 channels).

`python demo/train_vae.py DATA_FOLDER... --out vae.pt --minutes 15` trains encoder and decoder together;
`--decoder-only` keeps the encoder (and so every stored latent) and improves the pictures alone.
Needs diffusers. Loss: L1 + 2 MSE + 0.3 gradient L1, and a pull of the latents to mean 0 and standard deviation 1;
the latents are divided by SD's 0.18215 on export, so that the stock latent format gives unit scale.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL
from muon import Muon, schedule

CHANNELS = (32, 32, 64, 128)


def build() -> AutoencoderKL:
    return AutoencoderKL(
        3, 3, ["DownEncoderBlock2D"] * 4, ["UpDecoderBlock2D"] * 4, CHANNELS, layers_per_block=1, latent_channels=4
    ).to(memory_format=torch.channels_last)


def to_tensor(pictures: np.ndarray) -> torch.Tensor:
    """uint8 [N, H, W, 3] -> float32 [N, 3, H, W] in -1..1."""
    return torch.from_numpy(pictures).permute(0, 3, 1, 2).float().div_(127.5).sub_(1.0)


def crops(sources: list[tuple[np.ndarray, np.ndarray, np.ndarray]], n: int, size: int, rng) -> torch.Tensor:
    """Random crops: half persons, a quarter masked persons (grey inside), a quarter garments."""
    out = np.empty((n, size, size, 3), np.uint8)
    for i in range(n):
        person, garment, mask = sources[rng.integers(len(sources))]
        k, kind = rng.integers(len(person)), rng.random()
        y, x = rng.integers(person.shape[1] - size + 1), rng.integers(person.shape[2] - size + 1)
        if kind >= 0.75:
            y = min(max(y, 40), 80)
        window = np.s_[k, y : y + size, x : x + size]
        out[i] = garment[window] if kind >= 0.75 else person[window]
        if 0.5 <= kind < 0.75:
            out[i][mask[window] > 0] = 127
        if rng.random() < 0.5:
            out[i] = out[i][:, ::-1]
    return to_tensor(out).to(memory_format=torch.channels_last)


def picture_loss(y: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    dy, dx = (y - x).diff(dim=2), (y - x).diff(dim=3)
    return (y - x).abs().mean() + 2 * (y - x).square().mean() + 0.3 * (dy.abs().mean() + dx.abs().mean())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("data", type=Path, nargs="+")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--minutes", type=float, default=15)
    parser.add_argument("--init", type=Path)
    parser.add_argument("--decoder-only", action="store_true")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--crop", type=int, default=64)
    parser.add_argument("--lr", type=float, default=0.02)
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    rng = np.random.default_rng(1 if args.decoder_only else 0)
    names = ("person.npy", "garment.npy", "mask.npy")
    sources = [tuple(np.load(d / n, mmap_mode="r") for n in names) for d in args.data]
    vae = build()
    if args.init:
        vae.load_state_dict(torch.load(args.init, weights_only=True))
    trained = list(vae.decoder.parameters()) + list(vae.post_quant_conv.parameters())
    if not args.decoder_only:
        trained += list(vae.encoder.parameters()) + list(vae.quant_conv.parameters())
    optimizer = Muon(trained, lr=args.lr, adam_lr=1.5e-3)
    start, step, shown = time.time(), 0, []
    while (progress := (time.time() - start) / (60 * args.minutes)) < 1:
        schedule(optimizer, progress)
        x = crops(sources, args.batch, args.crop, rng)
        with torch.set_grad_enabled(not args.decoder_only):
            z = vae.encode(x).latent_dist.mean
        y = vae.decode(z + 0.04 * torch.randn_like(z)).sample
        loss = picture_loss(y, x)
        if not args.decoder_only:
            loss = loss + 0.02 * (z.mean((0, 2, 3)).square().mean() + (z.std((0, 2, 3)) - 1).square().mean())
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        shown.append((y.detach() - x).square().mean().item())
        step += 1
        if step % 100 == 0:
            psnr = 10 * np.log10(4 / np.mean(shown[-100:]))
            print(f"step {step} progress {progress:.3f} loss {loss.item():.4f} psnr {psnr:.2f} z std {z.std().item():.2f}", flush=True)
            torch.save(vae.state_dict(), args.out)
    torch.save(vae.state_dict(), args.out)


if __name__ == "__main__":
    main()
