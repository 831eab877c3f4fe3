"""Attention that reads pages where they lie, through a block table, by torch's flex_attention.

flex_attention (arXiv 2412.05496) takes one tensor of keys, so these pages are cut out of one, the
slab: [pages, B, rows, heads, width], rows being the tokens rounded up to whole blocks of 128. Of it
a call visits the blocks of the pages in its table and no others; where a page's last block is
partly empty, the mask says so.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any

import torch

from ..attention import check
from ..report import megabytes
from .attend import joined, with_lse
from .storage import MODEL, Page, PageFormat

BLOCK = 128
# Triton's kernel reckons places in 32 bits.
LARGEST = 1 << 31
MASKS = 128
# Tests on the CPU run flex_attention as it is written, which computes every score.
COMPILED = True


def why_not(fmt: PageFormat, device: torch.device, relative: bool, pages: int) -> str:
    """Why the pages of a video cannot be attended in place, "" if they can."""
    if fmt.kind != MODEL:
        return f"{fmt.kind} pages have to be read out first"
    if relative:
        return "relative positions turn the keys that are kept"
    if device.type != "cuda":
        return f"flex_attention has no compiled kernel for {device.type} here"
    if not torch.cuda.is_available() or not _has_triton():
        return "Triton is not there, and without it flex_attention computes every score"
    if Slab.elements(fmt, pages) >= LARGEST:
        return f"{pages} pages are more numbers than the kernel can count"
    return ""


def _has_triton() -> bool:
    try:
        from torch.utils._triton import has_triton
    except ImportError:
        return False
    return has_triton()


class Slab:
    """`pages` pages of a format in one tensor for K and one for V, handed out one by one."""

    def __init__(self, fmt: PageFormat, pages: int, device: torch.device):
        samples, self.tokens, heads, width = fmt.shape
        self.rows, self.samples = rows_of(self.tokens), samples
        shape = (pages, samples, self.rows, heads, width)
        # Zeros: what the mask leaves out is multiplied by 0 all the same.
        self.k = torch.zeros(shape, dtype=fmt.dtype, device=device)
        self.v = torch.zeros_like(self.k)
        self.used = 0

    @staticmethod
    def elements(fmt: PageFormat, pages: int) -> int:
        """Of K, or of V."""
        samples, tokens, heads, width = fmt.shape
        return pages * samples * rows_of(tokens) * heads * width

    def page(self) -> Page | None:
        """The next page, None when all are handed out."""
        if self.used == self.k.shape[0]:
            return None
        at, self.used = self.used, self.used + 1
        return Page(self.k[at, :, : self.tokens], self.v[at, :, : self.tokens], slab=self, place=at)


class InPlace:
    """The slab of a pool's pages, and attention over those that are kept beside a block's own.

    calls: attended in place. loose: calls some of whose pages lie outside of the slab, as pages do
    that came back from main memory. reason: why it is not used any more, "" while it is.
    """

    def __init__(self, fmt: PageFormat, device: torch.device, relative: bool, budget: int = 0):
        self.fmt, self.device, self.relative, self.budget = fmt, device, relative, budget
        self.calls = self.loose = 0
        self.reason = ""
        self.slab: Slab | None = None
        self._masks: dict[tuple[int, int], Any] = {}

    def reserve(self, pages: int) -> None:
        """Have a slab of `pages` pages, where it can be used and fits the budget."""
        if self.slab is not None or self.reason:
            return
        self.reason = why_not(self.fmt, self.device, self.relative, pages)
        size = 2 * Slab.elements(self.fmt, pages) * self.fmt.dtype.itemsize
        if not self.reason and self.budget and size > self.budget:
            self.reason = f"a slab of whole blocks takes {megabytes(size)}, more than the budget"
        if not self.reason:
            self.slab = Slab(self.fmt, pages, self.device)

    def make(self) -> Page:
        """A page of the slab, or one by itself when there is none left."""
        page = None if self.slab is None else self.slab.page()
        return page or self.fmt.empty(self.device)

    def drop(self) -> None:
        """Let the slab go: none of its pages is in use."""
        self.slab, self._masks = None, {}

    def attend(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        streams: Sequence[Sequence[Page]],
        gathered: Callable[[], tuple[torch.Tensor, torch.Tensor]],
    ) -> torch.Tensor | None:
        """softmax attention of q [N, Lq, H, D] over the pages of each stream and the block's own
        k, v, of q's shape and type; None where another way has to be taken.

        N: B rows for each of `streams`. gathered: the keys and values of all, which the first call
        is checked against on 256 rows.
        """
        slab = self.slab
        if self.reason or slab is None:
            return None
        if any(page.slab is not slab for pages in streams for page in pages):
            self.loose += 1
            return None
        table = tuple(
            tuple(page.place * slab.samples + sample for page in pages)
            for pages in streams
            for sample in range(slab.samples)
        )
        try:
            kept = attend(q, slab, self._mask(table, q.shape[1]), COMPILED)
            own = with_lse(*(each.transpose(1, 2) for each in (q, k, v)))
            out = joined([kept, own]).to(q.dtype)
        except Exception as error:
            if self.calls:
                raise
            said = ascii(str(error))[1:-1].partition("\\n")[0][:120]
            self.reason = f"flex_attention raised {type(error).__name__}: {said}"
            return None
        if not self.calls:
            k_all, v_all = (each.transpose(1, 2) for each in gathered())
            off = check.error(out, q.transpose(1, 2), k_all, v_all, None, q.shape[-1] ** -0.5)
            if not off <= check.limit(q.dtype, exact=True):
                self.reason = f"its first result was off by {off:.2g} from the gathered pages"
                return None
        self.calls += 1
        return out.transpose(1, 2)

    def _mask(self, table: tuple[tuple[int, ...], ...], queries: int) -> Any:
        """The same for every step of a block, so it is made once for each layer."""
        assert self.slab is not None
        key = hash((table, queries)), queries
        if key not in self._masks:
            if len(self._masks) >= MASKS:
                self._masks.clear()
            numbers = torch.tensor(table, device=self.device)
            self._masks[key] = block_mask(self.slab, numbers, queries)
        return self._masks[key]

    def text(self) -> str:
        """What was done, in words."""
        if self.reason:
            return f"in place not used: {self.reason}; gathered instead"
        loose = f", {self.loose} gathered because their pages lie apart" if self.loose else ""
        return f"in place by flex_attention: {self.calls} calls{loose}"


def rows_of(tokens: int) -> int:
    return -(-tokens // BLOCK) * BLOCK


def attend(
    q: torch.Tensor, slab: Slab, mask: Any, compiled: bool = True
) -> tuple[torch.Tensor, torch.Tensor]:
    """(softmax attention of q [N, Lq, H, D] over the pages of the mask, [N, H, Lq, D]; its log of
    the sum of exponentials, float32 [N, H, Lq]). Raises whatever flex_attention raises.
    """
    k, v = (
        each.flatten(0, 2).transpose(0, 1)[None].expand(q.shape[0], -1, -1, -1)
        for each in (slab.k, slab.v)
    )
    return _flex(compiled)(q.transpose(1, 2), k, v, mask)


def block_mask(slab: Slab, table: torch.Tensor, queries: int) -> Any:
    """The BlockMask for N times `queries` rows of q. table: int64 [N, n], for each of the N the
    pages as page * B + sample.
    """
    from torch.nn.attention.flex_attention import BlockMask

    rows, tokens = slab.rows, slab.tokens
    per, whole = rows // BLOCK, tokens // BLOCK
    total = slab.k.shape[0] * slab.samples
    batch, across = table.shape[0], -(-queries // BLOCK)
    member = torch.zeros(batch, total, dtype=torch.bool, device=table.device)
    member.scatter_(1, table, True)

    def seen(b, h, q, kv):
        return member[b, kv // rows] & (kv % rows < tokens)

    def blocks(first: int, count: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Blocks first to first + count of every page, as (how many, which)."""
        offsets = torch.arange(first, first + count, device=table.device)
        which = (table[:, :, None] * per + offsets).flatten(1)
        padded = torch.nn.functional.pad(which, (0, total * per - which.shape[1])).int()
        number = torch.full((batch, 1, across), which.shape[1], device=table.device)
        return number.int(), padded[:, None, None].expand(-1, 1, across, -1).contiguous()

    return BlockMask.from_kv_blocks(
        *blocks(whole, per - whole), *blocks(0, whole), BLOCK_SIZE=BLOCK, mask_mod=seen,
        seq_lengths=(queries, total * rows),
    )  # fmt: skip


@lru_cache(maxsize=2)
def _flex(compiled: bool) -> Any:
    from torch.nn.attention import flex_attention as module

    function: Any = module.flex_attention
    request = getattr(module, "AuxRequest", None)

    def call(q, k, v, mask):
        if request is None:
            return function(q, k, v, block_mask=mask, return_lse=True)
        out, extra = function(q, k, v, block_mask=mask, return_aux=request(lse=True))
        return out, extra.lse

    return torch.compile(call, dynamic=False) if compiled else call
