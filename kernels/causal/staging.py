"""Pages of the next layer, copied from main memory while this layer computes.

Two places on the device take turns: one is read while the other is filled. On CUDA the copies run
on a stream of their own; elsewhere the same steps run one after the other.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from .storage import Page, PageFormat

STAGED_LAYERS = 2


class Lane:
    """Copies that are done when the call returns. `order` and `done` bracket those of one layer."""

    def order(self, after: Any) -> None:
        """What follows waits for the mark `after`, and with None for all that was computed."""

    def copy(self, out: torch.Tensor, tensor: torch.Tensor) -> None:
        out.copy_(tensor)

    def done(self) -> Any:
        """A mark behind the copies so far."""

    def wait(self, mark: Any) -> None:
        """What is computed from now on waits for the copies before `mark`."""

    def read(self) -> Any:
        """A mark behind what was computed so far."""

    def finish(self) -> None:
        """What is computed, or freed, from now on waits for all copies."""


class CudaLane(Lane):
    """Copies from pinned memory on a stream beside the one that computes."""

    def __init__(self, device: torch.device):
        self.device, self.stream = device, torch.cuda.Stream(device)

    def _now(self) -> torch.cuda.Stream:
        return torch.cuda.current_stream(self.device)

    def order(self, after: torch.cuda.Event | None) -> None:
        if after is None:
            self.stream.wait_stream(self._now())
        else:
            self.stream.wait_event(after)

    def copy(self, out: torch.Tensor, tensor: torch.Tensor) -> None:
        with torch.cuda.stream(self.stream):
            out.copy_(tensor, non_blocking=True)

    def done(self) -> torch.cuda.Event:
        event = torch.cuda.Event()
        self.stream.record_event(event)
        return event

    def wait(self, mark: torch.cuda.Event) -> None:
        self._now().wait_event(mark)

    def read(self) -> torch.cuda.Event:
        event = torch.cuda.Event()
        self._now().record_event(event)
        return event

    def finish(self) -> None:
        self._now().wait_stream(self.stream)


def lane_for(device: torch.device) -> Lane:
    """What copies pages to `device`: beside the computation on CUDA, at once elsewhere."""
    return CudaLane(device) if device.type == "cuda" else Lane()


@dataclass
class _Place:
    pages: list[Page] = field(default_factory=list)
    numbers: tuple[int, ...] = ()
    filled: Any = None
    read: Any = None


class Staging:
    """ahead, late: layers whose pages had been asked for before they were needed, or not.

    Pages are told by number: a number is written once and never given twice, so what was copied
    for a layer that then had other pages is simply not found.
    """

    def __init__(self, fmt: PageFormat, device: torch.device, lane: Lane | None = None):
        self.fmt, self.device = fmt, device
        self.lane = lane or lane_for(device)
        self.ahead = self.late = self.peak_bytes = 0
        self._places = [_Place() for _ in range(STAGED_LAYERS)]
        self._current = self._places[0]

    def turn(
        self, now: Sequence[int], coming: Sequence[int], content: Callable[[int], Page]
    ) -> dict[int, Page]:
        """Pages `now` on the device by number, to be read at once; pages `coming`, if any, are on
        their way first. content: a page by number, in main memory.
        """
        wanted = tuple(now)
        place = next((each for each in self._places if each.numbers == wanted), None)
        if place is None:
            self.late += 1
            place = next(each for each in self._places if each is not self._current)
            self._fill(place, wanted, content)
        else:
            self.ahead += 1
        other = next(each for each in self._places if each is not place)
        if coming and other.numbers != tuple(coming):
            self._fill(other, tuple(coming), content)
        self._current = place
        self.lane.wait(place.filled)
        return dict(zip(wanted, place.pages, strict=False))

    def was_read(self) -> None:
        """What reads the pages of the last turn has been computed, or is in the queue to be."""
        self._current.read = self.lane.read()

    def _fill(self, place: _Place, numbers: tuple[int, ...], content: Callable[[int], Page]):
        # Until the copies are in the queue, the place must not be found under either name.
        place.numbers, after = (), place.read
        if len(place.pages) < len(numbers):
            # New memory may be what the device still computes on.
            after = None
            missing = len(numbers) - len(place.pages)
            place.pages += [self.fmt.empty(self.device) for _ in range(missing)]
            self.peak_bytes = max(self.peak_bytes, self.held_bytes)
        self.lane.order(after)
        for number, out in zip(numbers, place.pages, strict=False):
            held = content(number).tensors()
            for name, tensor in out.tensors().items():
                self.lane.copy(tensor, held[name])
        place.filled, place.numbers = self.lane.done(), numbers

    @property
    def held_bytes(self) -> int:
        return sum(len(place.pages) for place in self._places) * self.fmt.page_bytes

    def release(self) -> None:
        """Give the memory on the device back; the next turn takes it again."""
        self.lane.finish()
        self._places = [_Place() for _ in range(STAGED_LAYERS)]
        self._current = self._places[0]
