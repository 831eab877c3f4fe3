"""What a causal video run keeps beside its weights, and which setting makes it fit.

A causal run works on one block of frames at a time, so its activations do not grow with the video;
what grows, up to window + sink, are the keys and values of the frames in the window, for each side
of the guidance.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import torch

from ..causal.cache import CachedFrame, VideoCache
from ..causal.options import CacheOptions
from ..causal.staging import STAGED_LAYERS
from ..causal.storage import FP8, INT8, MODEL, PageFormat
from ..causal.strategies import CHUNKED, GATHERED
from ..report import megabytes

META = torch.device("meta")
# fp32 tensors of the shape of the run's latent, and of a block of it, that ComfyUI and the sampler
# hold around a forward; counted on runs (docs/memory.md).
RUN_COPIES, BLOCK_COPIES = 4, 10


@dataclass(frozen=True)
class Needs:
    """What a sampler knows of a run before it starts: frames per block, frames that a session or a
    start brings, sides of the guidance that run. held: bytes of pages that have their place
    already.
    """

    block: int
    known: int
    sides: int
    held: int = 0


@dataclass(frozen=True)
class CausalMemory:
    """options, page: of the cache, for one side. layers: of the model. frames: latent frames that
    the run makes.
    """

    options: CacheOptions
    page: PageFormat
    layers: int
    needs: Needs
    frames: int

    @property
    def seen(self) -> int:
        """Most frames in the window at a time, the block included."""
        made = self.needs.known + self.frames
        most = self.options.window + self.options.sink
        return min(made, most) if self.options.window else made

    @property
    def kept(self) -> int:
        """Most frames whose keys and values are read from pages."""
        return max(0, self.seen - self.needs.block)

    @property
    def cache(self) -> int:
        """Bytes of all pages at the most, wherever they lie."""
        page = self.options.page_bytes(self.page)
        return self.needs.sides * self.layers * self.seen * page

    @property
    def pages(self) -> int:
        """Bytes of pages on the device at the most: all of them or, where they lie in main memory,
        those of a layer that is computed and of the one that comes next.
        """
        if not self.options.on_host:
            return self.cache
        return STAGED_LAYERS * self.needs.sides * self.kept * self.page.page_bytes

    def latents(self, height: int, width: int) -> int:
        """Bytes of the fp32 latents around a forward, of such a size in latent pixels: of the run,
        of a block, and the clean one of each frame in the window.
        """
        frame = 4 * 16 * self.page.shape[0] * height * width
        copies = RUN_COPIES * self.frames + BLOCK_COPIES * self.needs.block + self.seen
        return frame * copies

    def notes(self) -> list[str]:
        """What the run will keep, and what is not counted of it."""
        options = self.options
        sides = "for each of cond and uncond" if self.needs.sides > 1 else "for one condition"
        said = [
            f"causal: {self.seen} latent frames in the attention window, {sides}, {options.kind} "
            f"pages of {megabytes(options.page_bytes(self.page))}: {megabytes(self.cache)} in "
            f"{'main' if options.on_host else 'device'} memory"
        ]
        if not options.window:
            said.append("window 0 keeps every frame; the frames of a session come on top")
        return said

    def filled(self, layers: int, streams: int) -> VideoCache:
        """A cache without memory, of so many layers, as full as it gets before a block is made."""
        # Pages from main memory are read from the device as well, and counted apart. What the cache
        # may take is for the run to refuse.
        options = replace(self.options, on_host=False, budget=0)
        cache = VideoCache(self.page, layers, META, options)
        # In relative time the frames of a window that has moved are turned as they are read.
        moved = 1 if self.options.relative and self.options.window else 0
        cache.kept = [CachedFrame(frame, frame + moved, frame) for frame in range(self.kept)]
        for number in range(streams):
            cache.streams[number] = {
                frame: cache.pool.take(layers) for frame in range(len(cache.kept))
            }
        cache.next_frame = self.kept
        return cache


def remedies(
    options: CacheOptions, block: int, needed: Callable[[CacheOptions], int], room: int
) -> list[str]:
    """Sentences on the settings of the causal model that change the least and fit into `room`.

    needed: bytes of pages and forward with other options. At most one setting of each kind: one
    that keeps the video as it is, one that rounds, one that sees less.
    """
    said = []
    for changes in (_same_video(options), _rounded(options)):
        for name, other in changes:
            size = needed(other)
            if size <= room:
                said.append(f"{name}: {megabytes(size)} for cache and forward, which fits")
                break
    window = _largest_window(options, block, needed, room)
    if window:
        size = megabytes(needed(replace(options, window=window)))
        said.append(
            f"window {window} (a different video, since each block sees less): {size} for cache "
            "and forward, which fits"
        )
    return [f"Causal Model with {line}" for line in said] or [
        "no setting of Causal Model makes cache and forward fit together with the weights: "
        "use fewer frames per block, a smaller size, or smaller weights"
    ]


def _same_video(options: CacheOptions) -> Iterator[tuple[str, CacheOptions]]:
    merge, host = replace(options, way=CHUNKED), replace(options, on_host=True)
    if options.way == GATHERED:
        yield "attention 'chunked' (the same video up to rounding)", merge
    if not options.on_host:
        yield "kv_location 'main memory' (the same video, slower)", host
        if options.way == GATHERED:
            yield (
                "kv_location 'main memory' and attention 'chunked' (the same video up to "
                "rounding, slower)",
                replace(merge, on_host=True),
            )


def _rounded(options: CacheOptions) -> Iterator[tuple[str, CacheOptions]]:
    if options.kind != MODEL:
        return
    for kind in (INT8, FP8):
        yield f"kv_dtype '{kind}' (keys and values rounded)", replace(options, kind=kind)


def _largest_window(
    options: CacheOptions, block: int, needed: Callable[[CacheOptions], int], room: int
) -> int:
    """The largest smaller window that fits, 0 if none does; the need grows with the window."""
    low, high = block, options.window
    if not high or low >= high or needed(replace(options, window=low)) > room:
        return 0
    while high - low > 1:
        middle = (low + high) // 2
        if needed(replace(options, window=middle)) <= room:
            low = middle
        else:
            high = middle
    return low
