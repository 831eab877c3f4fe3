"""Train the demo try-on model: `python -m demo.train_unet LATENT_FOLDER --out unet.pt --minutes
80`.

v-prediction on SD 1.5's schedule, 8 % empty garments for CFG, the masked part of the person
weighted most. Shards that appear in the folder while it runs are picked up, so encoding can go on
beside it.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import numpy as np
import torch

from .muon import Muon, schedule
from .tryon_net import alphas_cumprod, build, canvas


def load(folder: Path, known: dict[str, tuple]) -> dict[str, tuple]:
    for path in sorted(folder.glob("*.npz")):
        if path.name not in known and not path.name.endswith(".tmp.npz"):
            with np.load(path) as shard:
                known[path.name] = (shard["latents"], shard["mask"])
    return known


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("latents", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--init", type=Path)
    parser.add_argument("--minutes", type=float, default=80)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--lr", type=float, default=0.015)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    rng = np.random.default_rng(0)
    net = build()
    trained = [p for k, p in net.named_parameters() if "attn2" not in k]
    if args.init:
        net.load_state_dict(torch.load(args.init, weights_only=True))
    average = {k: v.clone() for k, v in net.state_dict().items()}
    optimizer, abar = Muon(trained, lr=args.lr, adam_lr=args.lr / 10), alphas_cumprod()
    shards, step, shown, start = load(args.latents, {}), 0, [], time.time()
    while (progress := (time.time() - start) / (60 * args.minutes)) < 1:
        schedule(optimizer, progress)
        if step % 200 == 0:
            shards = load(args.latents, shards)
            latents = np.concatenate([s[0] for s in shards.values()])
            masks = np.concatenate([s[1] for s in shards.values()])
        pick = rng.integers(len(latents), size=args.batch)
        z, m = torch.from_numpy(latents[pick]).float(), torch.from_numpy(masks[pick]).float()
        x0, condition = canvas(z, m, (torch.rand(args.batch) > 0.08).float())
        t = (1000 * torch.rand(args.batch).pow(0.6)).long().clamp(max=999)
        a, s = abar[t].sqrt()[:, None, None, None], (1 - abar[t]).sqrt()[:, None, None, None]
        eps = torch.randn_like(x0)
        inputs = torch.cat([a * x0 + s * eps, condition], 1).to(memory_format=torch.channels_last)
        v = net(inputs, t, torch.zeros(args.batch, 1, 8)).sample
        weight = torch.cat([0.3 + 1.7 * m, torch.full_like(m, 0.15)], 1)[:, None]
        error = (v - (a * eps - s * x0)).square()
        optimizer.zero_grad()
        (error * weight).mean().backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        keep = min(0.998, step / (step + 50))
        with torch.no_grad():
            for k, value in net.state_dict().items():
                average[k].lerp_(value, 1 - keep)
            late = t > 500
            hole = torch.cat([m, torch.zeros_like(m)], 1)[:, None].bool().expand_as(error)
            if late.any():
                shown.append(error[late][hole[late]].mean().item())
        step += 1
        if step % 50 == 0:
            print(
                f"step {step} progress {progress:.3f} pairs {len(latents)} "
                f"masked mse t>500 {np.mean(shown[-50:]):.4f}",
                flush=True,
            )
        if step % 250 == 0:
            torch.save(average, args.out)
    torch.save(average, args.out)


if __name__ == "__main__":
    main()
