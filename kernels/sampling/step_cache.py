"""Replaces model calls by a forecast while the forecast's own error estimate stays small.

One object serves one run. Nothing is calibrated beforehand: a condition's forecast is trusted once
it has been checked against a computed value, and no further than the check allows.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field

import torch

from .forecast import VelocityForecast
from .step_report import StepCacheReport

# Conditions that were not asked for since so many noise levels are forgotten: context windows that
# move with every step would otherwise pile up, and their history is stale anyway.
FORGOTTEN_AFTER = 4


@dataclass(frozen=True)
class StepCacheSettings:
    """threshold: largest relative L2 error of a sample's velocity to accept, 0: never skip.
    start_sigma >= sigma > end_sigma: where calls may be skipped. max_skips: most noise levels in
    a row without a model call.
    """

    threshold: float
    start_sigma: float = float("inf")
    end_sigma: float = 0.0
    max_skips: int = 3


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
                torch.zeros_like(x)
                if track is None
                else (x - sigma * track.forecast.velocity(sigma)).to(x.dtype)
                for track in tracks
            ]
        outputs = compute()
        self._computed += 1
        for track, output in zip(tracks, outputs, strict=False):
            if track is not None:
                velocity = (x.float() - output.float()) / sigma
                miss = track.forecast.learn(sigma, velocity)
                track.skips = 0
                if miss is not None:
                    self._unread.append((track.forecast, miss))
        return outputs

    def report(self, notes: Sequence[str] = ()) -> StepCacheReport:
        """What happened until now; it stays what it is after `clear`."""
        self._read()
        return StepCacheReport(
            self._computed, tuple(self._expected), tuple(self._checked), tuple(notes)
        )

    def clear(self) -> None:
        """Drop every tensor."""
        self._tracks.clear()
        self._unread.clear()

    def _tracks_of(self, keys, sigma: float, x: torch.Tensor) -> list[_Track | None]:
        """The track of each condition; empty where nothing is kept."""
        if self._settings.threshold <= 0 or sigma <= 0:
            return []
        if sigma != self._sigma:
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
        known = [miss for miss in misses if miss is not None and miss < limits.threshold]
        if len(known) < len(used):
            return False
        if any(track.skips >= limits.max_skips for track in used):
            return False
        for track in used:
            track.skips += 1
        self._expected.append(max(known))
        return True
