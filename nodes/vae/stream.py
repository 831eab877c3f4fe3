"""A clip through one half of a VAE, piece by piece, in whole frames or tiles; what happens when
memory runs out.

The state between pieces is all that the past leaves behind, and a piece replaces it only when it is
through. So a piece that ran out of memory is simply done again, with more room: first with other
models unloaded and the state waiting in main memory, then in tiles, whose states are cut out of the
state of the whole.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import comfy.model_management
import torch

from ...kernels.errors import FrugalError
from ...kernels.report import megabytes
from ...kernels.retry import NothingLeftError, retry
from ...kernels.video.cadence import Call
from ...kernels.video.tiles import Tile, cut, grid, join
from .._memory import is_out_of_memory
from .halves import Half, on_device

OVERLAP = 8
SMALLEST_TILE = 8


class VaeStream:
    """The state of one clip. height, width: of the whole, in latent pixels. tile: side of the tiles
    in latent pixels, 0 for none; overlap: what neighbours share at least.

    notes: what was done about memory, in words.
    """

    def __init__(
        self, vae: Any, half: Half, height: int, width: int, tile: int = 0, overlap: int = OVERLAP
    ):
        self.vae, self.half, self.height, self.width = vae, half, height, width
        self.overlap, self.tile = overlap, (tile or height, tile or width)
        self.tiles = grid(height, width, self.tile, overlap)
        self.states = [half.fresh_state() for _ in self.tiles]
        self.parked = len(self.tiles) > 1
        self.notes: list[str] = []
        self.asked = len(self.tiles)
        self.difference: tuple[float, float] | None = None

    def load(self) -> None:
        """Bring the VAE to its device and make room for one piece."""
        largest = max(tile.height * tile.width for tile in self.tiles)
        share = largest / (self.height * self.width)
        comfy.model_management.load_models_gpu(
            [self.vae.patcher],
            memory_required=int(self.half.memory * share),
            force_full_load=self.vae.disable_offload,
        )

    def feed(self, piece: torch.Tensor, call: Call) -> torch.Tensor | None:
        """The next piece [1, C, t, H, W] through the network -> [1, C', t', H', W'] on the output
        device, None where it waits for more. Raises FrugalError when no tile is small enough.
        """
        first = call.start == 0
        try:
            made, states = retry(
                lambda: self._run(piece, call, self.tiles, self.states),
                is_out_of_memory,
                self._remedies(call),
            )
        except NothingLeftError:
            rows, columns = self.tile
            raise FrugalError(
                f"out of memory at {self.half.takes} {call.start + 1}, even in tiles of "
                f"{columns * self.half.scale} x {rows * self.half.scale} pixels",
                f"{megabytes(self.half.memory)} for a whole piece, by ComfyUI's estimate",
                "close other programs that use the card",
            ) from None
        self.states = states
        if first and len(self.tiles) > 1:
            self._compare(piece, call, made)
        return made

    def rest(self) -> None:
        """Let the state wait in main memory: another model needs the device for a while."""
        self.states = [_moved(state, self.vae.patcher.offload_device) for state in self.states]

    def state_bytes(self) -> int:
        """Bytes kept between pieces."""
        kept = [entry for state in self.states for entry in state or ()]
        return sum(entry.nbytes for entry in kept if isinstance(entry, torch.Tensor))

    def seams(self, what: str, unit: str) -> list[str]:
        """A note on what the tiles that were asked for change in the first piece, called `what`."""
        if self.asked == 1:
            return []
        if self.difference is None:
            return [f"{self.asked} tiles: {what} does not fit in one, the seams are not measured"]
        largest, mean = self.difference
        change = f"by at most {largest:.4f}, on average {mean:.5f}"
        return [f"{self.asked} tiles change {what} {change}, {unit}"]

    def _run(
        self, piece: torch.Tensor, call: Call, tiles: list[Tile], states: list[Any]
    ) -> tuple[torch.Tensor | None, list[Any]]:
        vae, parts, after = self.vae, [], []
        waiting = vae.patcher.offload_device if self.parked else vae.device
        with on_device(vae):
            for tile, state in zip(tiles, states, strict=True):
                given = cut(piece, tile, self.height).to(device=vae.device, dtype=vae.vae_dtype)
                # A list of its own: what is put in its place must not reach the kept state.
                working = _moved(state, vae.device)
                made = self.half.run(given, working, call)
                after.append(_moved(working, waiting))
                parts.append(None if made is None else made.to(vae.output_device))
        if parts[0] is None:
            return None, after
        return join(parts, tiles, self.height, self.width), after

    def _compare(self, piece: torch.Tensor, call: Call, made: torch.Tensor | None) -> None:
        # Drivers that spill into main memory would take minutes for it instead of failing.
        free = comfy.model_management.get_free_memory(self.vae.device)
        if made is None or free < self.half.first_memory:
            return
        whole = [Tile(0, 0, self.height, self.width)]
        try:
            exact, _ = retry(
                lambda: self._run(piece, call, whole, [self.half.fresh_state()]),
                is_out_of_memory,
                iter(()),
            )
        except NothingLeftError:
            comfy.model_management.soft_empty_cache()
            return
        off = (self.half.seen(made).float() - self.half.seen(exact).float()).abs()
        self.difference = float(off.max()), float(off.mean())

    def _remedies(self, call: Call) -> Iterator[None]:
        """What can be given up when a piece ran out of memory, at most as far as the smallest
        tile.
        """
        where = f"out of memory at {self.half.takes} {call.start + 1}"
        if not self.parked:
            self.parked = True
            self.rest()
            self.notes.append(f"{where}: the state was moved to main memory; same result")
            yield self._reload()
        while self._smaller_tiles():
            rows, columns = self.tile
            self.notes.append(
                f"{where}: continued in {len(self.tiles)} tiles of "
                f"{columns * self.half.scale} x {rows * self.half.scale} pixels, seams not measured"
            )
            yield self._reload()

    def _reload(self) -> None:
        _free_device(self.vae)
        self.load()

    def _smaller_tiles(self) -> bool:
        """Half the longer side, if that is not too small."""
        rows, columns = self.tile
        shared = min(self.overlap, max(rows, columns) // 4)
        longer = -(-max(rows, columns) // 2) + shared // 2
        tile = (longer, columns) if rows >= columns else (rows, longer)
        if longer < min(SMALLEST_TILE, max(rows, columns)):
            return False
        finer = grid(self.height, self.width, tile, shared)
        if self.half.cadence.slots:
            whole = [self._joined(list(slot)) for slot in zip(*self.states, strict=True)]
            self.states = [[self._cut(entry, each) for entry in whole] for each in finer]
        else:
            self.states = [None for _ in finer]
        self.tiles, self.tile, self.overlap = finer, tile, shared
        return True

    def _joined(self, entries: list[Any]) -> Any:
        tensors = isinstance(entries[0], torch.Tensor)
        return join(entries, self.tiles, self.height, self.width) if tensors else entries[0]

    def _cut(self, entry: Any, tile: Tile) -> Any:
        # A copy, or the whole would live on behind each of its parts.
        tensor = isinstance(entry, torch.Tensor)
        return cut(entry, tile, self.height).clone() if tensor else entry


def _free_device(vae: Any) -> None:
    management = comfy.model_management
    if vae.device.type != "cpu":
        management.free_memory(1e30, vae.device)
    management.soft_empty_cache()


def _moved(state: Any, device: torch.device) -> Any:
    """The state with its tensors on a device; always another list."""
    if state is None:
        return None
    return [entry.to(device) if isinstance(entry, torch.Tensor) else entry for entry in state]
