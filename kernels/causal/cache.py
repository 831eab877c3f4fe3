"""The attention cache of one video: which frames it keeps, where they stand in time, their pages.

Frame f is kept while a block that ends with frame `last` is made if f > last - window or f < sink
(Wan latent frames; the block itself is inside the window). A window of 0 keeps everything.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import groupby

import torch

from ..device_types import need_float8
from ..errors import FrugalError
from .offload import HOST, HostPages, settle, to_device, to_host
from .options import CacheOptions
from .page_pool import PagePool
from .paged_attention import PagedAttention
from .rotate import shifted
from .staging import Staging
from .storage import FP8, Page, PageFormat, check_finite, relative_error
from .strategies import PAGED

Stream = dict[int, tuple[int, ...]]  # frame -> its page in every layer


@dataclass(frozen=True)
class CachedFrame:
    """A frame in the cache: its number, the place in time its keys were turned to, and the number
    of the first frame of the block it was made in.
    """

    frame: int
    position: int
    block: int


class VideoCache:
    """K and V of the kept frames, one stream per condition of the guidance.

    Streams are numbered as ComfyUI numbers conditions (0 positive, 1 negative). Pages are dropped
    when the object goes. fmt: PageFormat for one stream. layers: of the model. device: where
    attention runs. pool: of an earlier cache to share, else a new one. blocks_made, prompt: what
    the maker of the video wants to find again, blocks sampled and a mark of their prompt. weights:
    `name` and `mark` of the model's weights, empty where that is not known.
    """

    def __init__(
        self,
        fmt: PageFormat,
        layers: int,
        device: torch.device,
        options: CacheOptions,
        pool: PagePool[Page] | None = None,
    ):
        self.fmt, self.layers, self.device, self.options = fmt, layers, device, options
        if fmt.kind == FP8:
            need_float8(device, "the cache is to be in fp8", "keep it in int8 or as computed")
        self.host = HostPages(fmt, device)
        self.paged: PagedAttention | None = None
        if options.way == PAGED and not options.on_host and pool is None:
            self.paged = PagedAttention(fmt, device, options.relative, options.budget)
        self.pool = pool or PagePool(fmt.page_bytes, self._make, options.budget)
        self.kept: list[CachedFrame] = []
        self.streams: dict[int, Stream] = {}
        self.clean: dict[int, torch.Tensor] = {}
        self.next_frame = 0
        self.blocks_made = 0
        self.error = 0.0
        self.prompt = ""
        self.weights: dict[str, str] = {}
        self._block: list[CachedFrame] = []
        self._pending: dict[int, Stream] | None = None
        # Largest magnitude and rounding of the pages being written, on the device until all are.
        self._measured: list[torch.Tensor] = []
        self._written: set[tuple[int, int]] = set()
        self.staging = Staging(fmt, device) if options.on_host else None
        self._staged: dict[int, Page] = {}
        self._follows: dict[tuple[int, ...], tuple[int, ...]] = {}
        self._before: tuple[int, ...] = ()
        weakref.finalize(self, _let_go, self.pool, self.streams).atexit = False

    @property
    def _make(self):
        # Not a bound method: the pool outlives this cache when a branch shares it.
        fmt, device, on_host = self.fmt, self.device, self.options.on_host
        if self.paged is not None:
            return self.paged.make
        if on_host:
            return self.host.make
        return lambda: fmt.empty(device)

    def fork(self, options: CacheOptions | None = None) -> VideoCache:
        """A branch that shares all pages; neither sees what the other adds or lets go.

        options: for the frames to come, default the same. Raises FrugalError if the pages held do
        not fit them.
        """
        options = options or self.options
        for name in ("kind", "relative", "on_host"):
            before, now = getattr(self.options, name), getattr(options, name)
            if before != now:
                raise FrugalError(
                    f"{name} {now} for a video whose cache was made with {name} {before}",
                    "the same for all of a video",
                    f"set {name} as before, or start a new video",
                )
        self.pool.budget = options.budget
        other = VideoCache(self.fmt, self.layers, self.device, options, self.pool)
        for number, stream in self.streams.items():
            for pages in stream.values():
                self.pool.share(pages)
            other.streams[number] = dict(stream)
        other.kept, other.clean = list(self.kept), dict(self.clean)
        other.next_frame, other.blocks_made = self.next_frame, self.blocks_made
        other.error, other.prompt, other.host = self.error, self.prompt, self.host
        other.weights = self.weights
        other.paged = self.paged if options.way == PAGED else None
        return other

    def release(self) -> None:
        """Drop every page, and be empty."""
        _drop_all(self.pool, self.streams)
        self.kept, self.clean = [], {}
        self._unstage()

    def reserve(self, pages: int) -> None:
        """Have room for so many pages at a time. Raises FrugalError, before anything is made, if
        that exceeds the budget.
        """
        self.pool.require(pages)
        if self.paged is not None:
            self.paged.reserve(pages)

    def pages_for(self, frames: int, streams: int) -> int:
        """The most pages that a video of `frames` latent frames has in use at a time."""
        most = self.options.window + self.options.sink
        return streams * self.layers * (min(frames, most) if self.options.window else frames)

    def start_block(self, count: int, frames: Sequence[int] | None = None) -> int:
        """Let the frames go that this block no longer sees; returns the place in time of its first
        frame. count: frames of the block. frames: their numbers, if not the next; only relative
        positions let them be apart. Raises FrugalError if the block is larger than the window.
        """
        options = self.options
        if frames is None:
            frames = range(self.next_frame, self.next_frame + count)
        if options.window and count > options.window:
            raise FrugalError(
                f"a block of {count} frames and a window of {options.window}",
                "a window that holds the block",
                "choose a larger window or smaller blocks",
            )
        if not options.relative and frames[-1] - frames[0] != count - 1:
            raise ValueError(f"frames {list(frames)} at their own numbers in one block")
        first, last = frames[0], frames[-1]
        if options.window:
            self._forget(
                [
                    each
                    for each in self.kept
                    if each.frame <= last - options.window and each.frame >= options.sink
                ]
            )
        place = len(self.kept) if options.relative else first
        self._block = [CachedFrame(frame, place + i, first) for i, frame in enumerate(frames)]
        return place

    def _forget(self, gone: list[CachedFrame]) -> None:
        for each in gone:
            for stream in self.streams.values():
                self.pool.drop(stream.pop(each.frame, ()))
            self.clean.pop(each.frame, None)
            self.kept.remove(each)

    @contextmanager
    def writing(self, clean: torch.Tensor) -> Iterator[None]:
        """Every attention call inside adds its keys and values; at the end the block is part of the
        video, unless the work failed or was cancelled: then nothing has changed.

        clean: latent [B, C, frames, h, w] of the block. Raises FrugalError if a layer or a stream
        was left out.
        """
        pending: dict[int, Stream] = {}
        self._pending, self._written, self._measured = pending, set(), []
        try:
            yield
            self._check_complete(pending)
            self._check_values()
        except BaseException:
            _drop_all(self.pool, pending)
            raise
        finally:
            self._pending, self._measured = None, []
        for number, stream in pending.items():
            self.streams.setdefault(number, {}).update(stream)
        self.note(clean)

    def note(self, clean: torch.Tensor) -> None:
        """The block is part of the video by its clean latents alone: its pages are to be made, with
        those of all kept frames, before anything can see it.
        """
        for index, each in enumerate(self._block):
            self.kept.append(each)
            self.clean[each.frame] = clean[:, :, index : index + 1].clone()
        self.next_frame = max(self.next_frame, self._block[-1].frame + 1)

    def take_back(self) -> None:
        """Forget what the block being written has given so far, so that a failed call on it can be
        made again.
        """
        if self._pending is not None:
            _drop_all(self.pool, self._pending)
            self._written.clear()
            self._measured = []

    def _check_complete(self, pending: dict[int, Stream]) -> None:
        if not pending:
            raise FrugalError(
                "the call on clean frames did not reach the model's attention",
                "every such call to run, for it makes the cache",
                "remove the step cache (such as EasyCache or TeaCache) from this model",
            )
        known = set(self.streams) if self.kept else set(pending)
        if set(pending) != known:
            raise FrugalError(
                f"conditions {sorted(pending)} ran on clean frames, {sorted(known)} before",
                "the same conditions for every block and every noise level",
                "keep cfg on one side of 1, and prompts without start and end percent",
            )
        wanted = {(number, layer) for number in pending for layer in range(self.layers)}
        if self._written != wanted:
            raise FrugalError(
                f"{len(self._written)} of {len(wanted)} layers gave keys and values",
                "all layers",
                "remove the node that skips blocks of this model",
            )

    def _check_values(self) -> None:
        """The one wait for what was written."""
        if self._measured:
            largest, error = torch.stack(self._measured).tolist()
            check_finite(largest)
            self.error = max(self.error, error)
        if self.options.on_host:
            settle(self.device)

    def store(self, layer: int, streams: Sequence[int], k: torch.Tensor, v: torch.Tensor) -> None:
        """Add the block's k, v [len(streams) * B, frames * tokens, heads, width] if it is being
        written; else do nothing.
        """
        pending = self._pending
        if pending is None:
            return
        samples, tokens = self.fmt.shape[0], self.fmt.shape[1]
        for at, number in enumerate(streams):
            if (number, layer) in self._written:
                raise FrugalError(
                    f"layer {layer} ran twice for condition {number} on one block",
                    "one conditioning on each side, without areas",
                    "combine the prompts, or use the prompt schedule",
                )
            if number not in pending:
                pages = self.pool.take(self.layers * len(self._block))
                pending[number] = {
                    each.frame: pages[i * self.layers : (i + 1) * self.layers]
                    for i, each in enumerate(self._block)
                }
            self._written.add((number, layer))
            rows = slice(at * samples, (at + 1) * samples)
            for i, each in enumerate(self._block):
                part = (
                    k[rows, i * tokens : (i + 1) * tokens],
                    v[rows, i * tokens : (i + 1) * tokens],
                )
                number_of_page = pending[number][each.frame][layer]
                self.pool.write(number_of_page, lambda page, part=part: self._put(page, *part))

    def _put(self, page: Page, k: torch.Tensor, v: torch.Tensor) -> None:
        largest = self.fmt.write(page, k, v)
        if largest is None:
            return
        found = [largest, torch.zeros_like(largest)]
        # The error of rounding is that of the first block: one pass over it tells enough.
        if not self.kept:
            found[1] = relative_error(self.fmt, page, k, v)
        if self._measured:
            found = [torch.maximum(*pair) for pair in zip(self._measured, found, strict=True)]
        self._measured = found

    def gathered(
        self, layer: int, streams: Sequence[int], k: torch.Tensor, v: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values of all kept frames and, behind them, of the block: [same batch, all
        tokens, heads, width], in the type and on the device of k.
        """
        self._stage(layer, streams)
        return self._filled(layer, streams, self.kept, k, v, tail=True)

    def runs(
        self, layer: int, streams: Sequence[int], k: torch.Tensor, v: torch.Tensor, frames: int
    ) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """The same in parts of at most `frames` kept frames, and the block as the last."""
        self._stage(layer, streams)
        for start in range(0, len(self.kept), frames):
            yield self._filled(layer, streams, self.kept[start : start + frames], k, v, tail=False)
        yield k, v

    def _filled(self, layer, streams, kept, k, v, tail):
        samples, tokens = self.fmt.shape[0], self.fmt.shape[1]
        before = len(kept) * tokens
        length = before + (k.shape[1] if tail else 0)
        keys, values = (x.new_empty(x.shape[0], length, *x.shape[2:]) for x in (k, v))
        # In relative time a kept frame stands at its rank among the kept.
        rank = {each.frame: i for i, each in enumerate(self.kept)}
        for at, number in enumerate(streams):
            rows = slice(at * samples, (at + 1) * samples)
            for i, each in enumerate(kept):
                span = slice(i * tokens, (i + 1) * tokens)
                place = self.streams[number][each.frame][layer]
                page = self._staged.get(place) or self.pool.read(place)
                self.fmt.read(page, k.device, keys[rows, span], values[rows, span])
                shift = rank[each.frame] - each.position if self.options.relative else 0
                if shift:
                    keys[rows, span] = shifted(keys[rows, span], shift)
        if self.staging is not None:
            self.staging.was_read()
        if tail:
            keys[:, before:], values[:, before:] = k, v
        return keys, values

    def attended_paged(
        self, layer: int, streams: Sequence[int], q: torch.Tensor, k: torch.Tensor, v: torch.Tensor
    ) -> torch.Tensor | None:
        """Attention of the block's q, k, v [N, L, heads, width] over the kept pages where they lie
        and the block itself, of q's shape; None where they have to be gathered.
        """
        if self.paged is None or not self.kept:
            return None
        self._check_streams(streams)
        pages = [
            [self.pool.read(self.streams[number][each.frame][layer]) for each in self.kept]
            for number in streams
        ]
        return self.paged.attend(q, k, v, pages, lambda: self.gathered(layer, streams, k, v))

    def _stage(self, layer: int, streams: Sequence[int]) -> None:
        """Have this layer's pages on the device, and the next one's on their way."""
        self._check_streams(streams)
        if self.staging is None or not self.kept:
            return
        mine = tuple(streams)
        if layer == 0:
            self._follows[self._before] = mine
        self._before = mine
        if layer + 1 < self.layers:
            coming = self._numbers(layer + 1, mine)
        else:
            # The next call of the model starts with layer 0, as the calls before took turns. Behind
            # the last call on a clean block other frames are in the window.
            after = self._follows.get(mine, mine)
            last = self._pending is not None and set(after) <= set(self._pending)
            coming = () if last else self._numbers(0, after)
        self._staged = self.staging.turn(self._numbers(layer, mine), coming, self.pool.read)

    def _numbers(self, layer: int, streams: Sequence[int]) -> tuple[int, ...]:
        return tuple(
            self.streams[number][each.frame][layer] for number in streams for each in self.kept
        )

    def _unstage(self) -> None:
        self._staged = {}
        if self.staging is not None:
            self.staging.release()

    def _check_streams(self, streams: Sequence[int]) -> None:
        if len(set(streams)) != len(streams):
            raise FrugalError(
                f"conditions {list(streams)} in one call",
                "one conditioning on each side, without areas",
                "combine the prompts, or use the prompt schedule",
            )
        missing = [number for number in streams if number not in self.streams]
        if self.kept and missing:
            raise FrugalError(
                f"condition {missing[0]} appears at latent frame {self._block[0].frame}",
                f"only conditions {sorted(self.streams)}, which saw the frames before",
                "keep cfg on one side of 1 for the whole video",
            )

    def blocks(self, size: int = 0) -> list[list[CachedFrame]]:
        """The kept frames, in the groups in which they were made; or, where positions are relative,
        in groups of `size`, however far apart.
        """
        if size and self.options.relative:
            return [self.kept[at : at + size] for at in range(0, len(self.kept), size)]
        return [list(group) for _, group in groupby(self.kept, key=lambda each: each.block)]

    def emptied(self) -> VideoCache:
        """A cache for the same video that holds no frame yet, to compute the kept ones again."""
        other = VideoCache(self.fmt, self.layers, self.device, self.options, self.pool)
        other.next_frame, other.blocks_made = self.next_frame, self.blocks_made
        other.staging, other.paged, other.host = self.staging, self.paged, self.host
        other.weights = self.weights
        return other

    def offload(self) -> None:
        """Move all pages of the pool, those of other branches too, and the clean latents to main
        memory.
        """
        self.clean = {frame: latent.to(HOST) for frame, latent in self.clean.items()}
        self._unstage()
        if not self.options.on_host:
            self.pool.offload_pages(lambda page: to_host(page, self.host))
            settle(self.device)
            if self.paged is not None:
                self.paged.drop()

    def unpark(self) -> None:
        """Bring this video's pages back to where attention needs them; after `reserve`, so that
        those that paged attention reads come back into their slab.
        """
        pages = (
            page
            for stream in self.streams.values()
            for layers in stream.values()
            for page in layers
        )
        device, paged = self.device, self.paged
        self.pool.fetch(pages, paged.bring if paged else lambda page: to_device(page, device))


def _drop_all(pool: PagePool[Page], streams: dict[int, Stream]) -> None:
    for stream in streams.values():
        for pages in stream.values():
            pool.drop(pages)
    streams.clear()


def _let_go(pool: PagePool[Page], streams: dict[int, Stream]) -> None:
    pool.release_later(page for s in streams.values() for pages in s.values() for page in pages)
