"""Muon for small convolutional nets: orthogonalised momentum for matrices, AdamW for everything
else.

Used by the training scripts only. On these few-thousand-step runs it needs about half the steps of
AdamW, which matters because the demo models are meant to be trained on two CPU cores. Formula:
Jordan et al., "Muon: An optimizer for hidden layers in neural networks" (2024); quintic
Newton-Schulz iteration.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch


def orthogonalize(g: torch.Tensor, steps: int = 5) -> torch.Tensor:
    """Nearest semi-orthogonal matrix of g [rows, cols], approximately (singular values in about
    0.7..1.2).
    """
    a, b, c = 3.4445, -4.7750, 2.0315
    x = g / (g.norm() + 1e-7)
    tall = x.shape[0] > x.shape[1]
    if tall:
        x = x.T
    for _ in range(steps):
        s = x @ x.T
        x = a * x + (b * s + c * (s @ s)) @ x
    return x.T if tall else x


class Muon(torch.optim.Optimizer):
    """Muon on tensors of two or more dimensions whose smaller matrix side is at least 16; AdamW on
    the rest.
    """

    def __init__(
        self,
        params: Iterable[torch.nn.Parameter],
        lr: float = 0.02,
        adam_lr: float = 1e-3,
        momentum: float = 0.95,
    ):
        params = list(params)
        wide = [p for p in params if p.ndim >= 2 and min(p.shape[0], p[0].numel()) >= 16]
        rest = [p for p in params if not any(p is w for w in wide)]
        groups = [
            {"params": wide, "lr": lr, "muon": True},
            {"params": rest, "lr": adam_lr, "muon": False},
        ]
        super().__init__([g for g in groups if g["params"]], {"momentum": momentum})
        for group in self.param_groups:
            group["base"] = group["lr"]

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                (self._muon if group["muon"] else self._adam)(p, group)

    def _muon(self, p: torch.Tensor, group: dict) -> None:
        state = self.state[p]
        m = state.setdefault("m", torch.zeros_like(p))
        m.lerp_(p.grad, 1 - group["momentum"])
        g = p.grad.lerp(m, group["momentum"]).reshape(p.shape[0], -1)
        scale = max(1.0, g.shape[0] / g.shape[1]) ** 0.5
        p.add_(orthogonalize(g).reshape(p.shape), alpha=-group["lr"] * scale)

    def _adam(self, p: torch.Tensor, group: dict) -> None:
        state = self.state[p]
        m, v = (
            state.setdefault("m", torch.zeros_like(p)),
            state.setdefault("v", torch.zeros_like(p)),
        )
        state["t"] = state.get("t", 0) + 1
        m.lerp_(p.grad, 0.1)
        v.lerp_(p.grad.square(), 0.02)
        m_hat, v_hat = m / (1 - 0.9 ** state["t"]), v / (1 - 0.98 ** state["t"])
        p.addcdiv_(m_hat, v_hat.sqrt_().add_(1e-8), value=-group["lr"])


def schedule(
    optimizer: torch.optim.Optimizer, progress: float, warmup: float = 0.03, floor: float = 0.02
) -> None:
    """Set every group's rate for progress in 0..1: linear warm-up, then linear decay to `floor`."""
    factor = (
        min(1.0, progress / warmup)
        if progress < warmup
        else floor + (1 - floor) * (1 - progress) / (1 - warmup)
    )
    for group in optimizer.param_groups:
        group["lr"] = group["base"] * factor
