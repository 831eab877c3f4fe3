"""Where the velocity of a sampling run is going: a damped line through its last two values.

Samplers of diffusion and flow models integrate dx/dsigma = v(x, sigma) = (x - x0) / sigma, x0 being
the model's denoised estimate (Karras et al. 2022, eq. 4; for flow matching v is the velocity field
itself). Between two steps v changes smoothly, so

    v(s) ~ v1 + b * (v1 - v0) * (s - s1) / (s1 - s0),    0 <= b <= 1.

b is the least-squares fit of the last change that was seen to the line that had predicted it: 1
where v runs straight, 0 (hold v) where the line predicted nothing. What a line leaves over grows as
|s - s1| * |s - s0| (the remainder of linear interpolation), so the miss that was measured last
predicts the next one.
"""

from __future__ import annotations

import itertools

import torch

TINY = torch.finfo(torch.float32).tiny


class VelocityForecast:
    """The last two velocities of one condition, float32 [B, ...], and how well the line fitted.

    Each sample of the batch has a damping of its own; errors are those of the worst sample.
    """

    def __init__(self) -> None:
        self._points: list[tuple[float, torch.Tensor]] = []
        self._damping: torch.Tensor | float = 1.0
        self._miss_per_gap: float | None = None
        self._checked_gap = 0.0

    def expected_miss(self, sigma: float) -> float | None:
        """Relative L2 error to expect of `velocity(sigma)`; None while it cannot be told, which is
        until a forecast was checked once, and where sigma turns back.
        """
        if self._miss_per_gap is None or not self._ahead(sigma):
            return None
        return self._miss_per_gap * self._gap(sigma)

    def doubt(self) -> None:
        """What was checked so far says nothing of what comes."""
        self._miss_per_gap = None

    def velocity(self, sigma: float) -> torch.Tensor:
        """The forecast, a new float32 tensor; only where `expected_miss` is not None."""
        (_, before), (_, last) = self._points
        return last + self._damping * self._reach(sigma) * (last - before)

    def learn(self, sigma: float, velocity: torch.Tensor) -> torch.Tensor | None:
        """Take in a computed velocity (float32, owned by this object from now on). Returns the
        relative L2 error [] that a forecast for it would have had, or None without one. Reading it
        makes the host wait, so that is left to the caller, who hands it back to `checked` before
        anything else is asked.
        """
        if not self._ahead(sigma):
            self._points = [(sigma, velocity)]
            self._miss_per_gap = None
            return None
        miss = self._check(sigma, velocity) if len(self._points) == 2 else None
        self._points = [self._points[-1], (sigma, velocity)]
        return miss

    def checked(self, miss: float) -> None:
        """What the last `learn` returned."""
        # One lucky forecast is no promise: the rate falls by half at most.
        self._miss_per_gap = max(miss / self._checked_gap, 0.5 * (self._miss_per_gap or 0.0))

    def _check(self, sigma: float, velocity: torch.Tensor) -> torch.Tensor:
        (_, before), (_, last) = self._points
        line, change = (last - before) * self._reach(sigma), velocity - last
        missed = _norms(change - self._damping * line) / _norms(velocity).clamp_min(TINY)
        self._checked_gap = self._gap(sigma)
        along = (line * change).flatten(1).sum(1)
        fit = along / _norms(line).square().clamp_min(TINY)
        self._damping = fit.clamp(0, 1).reshape(-1, *[1] * (velocity.ndim - 1))
        return missed.max()

    def _ahead(self, sigma: float) -> bool:
        """Whether sigma goes on in the direction of the points."""
        sigmas = [at for at, _ in self._points] + [sigma]
        steps = [after - before for before, after in itertools.pairwise(sigmas)]
        return bool(steps) and (all(s > 0 for s in steps) or all(s < 0 for s in steps))

    def _reach(self, sigma: float) -> float:
        (first, _), (last, _) = self._points
        return (sigma - last) / (last - first)

    def _gap(self, sigma: float) -> float:
        (first, _), (last, _) = self._points
        return abs((sigma - last) * (sigma - first))


def _norms(values: torch.Tensor) -> torch.Tensor:
    """L2 norm of each sample, [B]."""
    return torch.linalg.vector_norm(values.flatten(1), dim=1)
