"""Replaces model calls by a forecast while the forecast's own error estimate stays small.

One object serves one run. Nothing is calibrated beforehand: a condition's forecast is trusted once
it has been checked against a computed value, and no further than the check allows.
"""

from __future__ import annotations

import bisect
import itertools
from collections import Counter
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field

import torch

from .forecast import TINY, VelocityForecast
from .step_report import StepCacheReport

# Conditions that were not asked for since so many noise levels are forgotten: context windows that
# move with every step would otherwise pile up, and their history is stale anyway.
FORGOTTEN_AFTER = 4
# Two evaluations at levels this near to each other, relatively, are at one: some samplers compute
# a level anew for their second evaluation, and it differs in the last bits.
SAME_LEVEL = 1e-4
# A velocity that is wrong by more than so many thresholds, or by so much at all, is not used,
# however short its step.
WORST = 8.0
HOPELESS = 0.5
# Where x lies further from the line that the last velocity drew than that line is long, noise was
# added, or taken away.
NOISE = 1.0


@dataclass(frozen=True)
class StepCacheSettings:
    """threshold: largest relative L2 error of a sample's velocity to accept, on average over the
    path from noise to result, 0: never skip. start_sigma >= sigma > end_sigma: where calls may be
    skipped. max_skips: most noise levels in a row without a model call. sigmas: the run's levels,
    falling; without them every level counts alike.
    """

    threshold: float
    start_sigma: float = float("inf")
    end_sigma: float = 0.0
    max_skips: int = 3
    sigmas: tuple[float, ...] = ()


@dataclass
class _Track:
    """One condition in one place: its forecast, and how long it has lived on it."""

    forecast: VelocityForecast = field(default_factory=VelocityForecast)
    layout: tuple = ()
    skips: int = 0
    last_level: int = 0


class StepCache:
    """State of one sampling run; `clear` gives its memory back.

    A sampler that evaluates twice at one sigma (heun) has two tracks: its predictor and its
    corrector look at different x. So limits count noise levels, not evaluations.
    """

    def __init__(self, settings: StepCacheSettings):
        self._settings = settings
        self._tracks: dict[Hashable, _Track] = {}
        self._level, self._sigma = 0, None
        self._asked: Counter[Hashable] = Counter()
        self._computed = 0
        self._expected: list[float] = []
        self._checked: list[float] = []
        self._unread: list[tuple[VelocityForecast, torch.Tensor]] = []
        self._share = _shares(settings.sigmas)
        self._spent = 0.0
        # Of the last evaluation: where it said that x goes to, and how.
        self._line: tuple[torch.Tensor, torch.Tensor, float] | None = None
        self._noisy = False

    def drift(self, x: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor | None:
        """How far x lies from the line of the last velocity, in lengths of the way along it, []
        on the device; None where that cannot be said. To be handed to `moved`.
        """
        if self._line is None or self._line[0].shape != x.shape:
            return None
        denoised, velocity, before = self._line
        off = x.float() - denoised - sigma * velocity
        way = (sigma - before).abs() * torch.linalg.vector_norm(velocity)
        return torch.linalg.vector_norm(off) / way.clamp_min(TINY)

    def moved(self, drift: float, sigma: float) -> None:
        """The value of `drift` for an evaluation at `sigma`. Samplers that begin or cease to add
        noise partway change what a forecast is worth, so it has to be found out anew.
        """
        if self._sigma is None or _same(sigma, self._sigma):
            return
        noisy = not drift < NOISE
        if noisy != self._noisy:
            self._noisy = noisy
            for track in self._tracks.values():
                track.forecast.doubt()

    def unread(self) -> list[torch.Tensor]:
        """Errors [] of forecasts that are on the device still: to be read with whatever else is,
        in one wait, and handed to `settle`. Otherwise the next call of this object reads them.
        """
        return [miss for _, miss in self._unread]

    def settle(self, values: Sequence[float]) -> None:
        """The values of `unread`."""
        for (forecast, _), miss in zip(self._unread, values, strict=True):
            forecast.checked(miss)
            self._checked.append(miss)
        self._unread.clear()

    def _read(self) -> None:
        if self._unread:
            self.settle(torch.stack(self.unread()).tolist())

    def evaluate(
        self,
        keys: Sequence[Hashable | None],
        x: torch.Tensor,
        sigma: float,
        compute: Callable[[], Sequence[torch.Tensor]],
    ) -> Sequence[torch.Tensor]:
        """Denoised estimates, one tensor like x [B, C, ...] for each condition.

        keys: what tells each condition from all others (prompt, context window); None for one that
        is not used, whose estimate is zeros. compute: the model call. Its result is returned as it
        is whenever it is called; a forecast never shares memory with it or with x.
        """
        self._read()
        tracks = self._tracks_of(keys, sigma, x)
        if tracks and self._may_skip(sigma, tracks):
            return [
                torch.zeros_like(x) if track is None else self._forecast(track, x, sigma)
                for track in tracks
            ]
        outputs = compute()
        self._computed += 1
        for track, output in zip(tracks, outputs, strict=False):
            if track is not None:
                velocity = (x.float() - output.float()) / sigma
                self._line = (output.float().clone(), velocity, sigma)
                miss = track.forecast.learn(sigma, velocity)
                track.skips = 0
                if miss is not None:
                    self._unread.append((track.forecast, miss))
        return outputs

    def _forecast(self, track: _Track, x: torch.Tensor, sigma: float) -> torch.Tensor:
        velocity = track.forecast.velocity(sigma)
        denoised = x.float() - sigma * velocity
        self._line = (denoised, velocity, sigma)
        return denoised.to(x.dtype, copy=True)

    def report(self, notes: Sequence[str] = ()) -> StepCacheReport:
        """What happened until now; it stays what it is after `clear`."""
        self._read()
        return StepCacheReport(
            self._computed, tuple(self._expected), tuple(self._checked), tuple(notes), self._spent
        )

    def clear(self) -> None:
        """Drop every tensor."""
        self._tracks.clear()
        self._unread.clear()
        self._line = None

    def _tracks_of(self, keys, sigma: float, x: torch.Tensor) -> list[_Track | None]:
        """The track of each condition; empty where nothing is kept."""
        if self._settings.threshold <= 0 or sigma <= 0:
            return []
        if self._sigma is None or not _same(sigma, self._sigma):
            self._sigma, self._asked = sigma, Counter()
            self._level += 1
            oldest = self._level - FORGOTTEN_AFTER
            self._tracks = {k: t for k, t in self._tracks.items() if t.last_level >= oldest}
        layout = (tuple(x.shape), x.dtype, x.device)
        found: list[_Track | None] = []
        for key in keys:
            if key is None:
                found.append(None)
                continue
            place = (key, self._asked[key])
            self._asked[key] += 1
            track = self._tracks.get(place)
            if track is None or track.layout != layout:
                track = self._tracks[place] = _Track(layout=layout)
            track.last_level = self._level
            found.append(track)
        return found

    def _may_skip(self, sigma: float, tracks: list[_Track | None]) -> bool:
        """Decided for all conditions of a call together: they share one pass of the model."""
        limits, used = self._settings, [track for track in tracks if track is not None]
        if not used or not limits.end_sigma < sigma <= limits.start_sigma:
            return False
        misses = [track.forecast.expected_miss(sigma) for track in used]
        known = [miss for miss in misses if miss is not None]
        if len(known) < len(used) or not max(known) < min(WORST * limits.threshold, HOPELESS):
            return False
        if any(track.skips >= limits.max_skips for track in used):
            return False
        cost = max(known) * self._weight(sigma)
        if not self._spent + cost < limits.threshold * self._allowed():
            return False
        for track in used:
            track.skips += 1
        self._expected.append(max(known))
        self._spent += cost
        return True

    def _weight(self, sigma: float) -> float:
        """The share of the path that the step from `sigma` covers."""
        if not self._share:
            return 1.0
        at = bisect.bisect_left(self._share, -sigma * (1 + SAME_LEVEL), key=lambda each: -each[0])
        return self._share[min(at, len(self._share) - 1)][1]

    def _allowed(self) -> float:
        """The part of the threshold that may be used up to now."""
        return self._level / len(self._share) if self._share else self._level


def _shares(sigmas: Sequence[float]) -> list[tuple[float, float]]:
    """(level, share of the path) of each step. The path is measured in the noise's part of x,
    which is sigma itself for a flow.
    """
    flow = not sigmas or sigmas[0] <= 1 + SAME_LEVEL
    places = [sigma if flow else sigma / (1 + sigma) for sigma in sigmas]
    lengths = [abs(b - a) for a, b in itertools.pairwise(places)]
    whole = sum(lengths)
    return [(s, n / whole) for s, n in zip(sigmas, lengths, strict=False)] if whole else []


def _same(one: float, other: float) -> bool:
    return abs(one - other) <= SAME_LEVEL * max(abs(one), abs(other))
