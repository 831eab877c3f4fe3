"""Attention that reads pages where they lie, through a block table.

The kernels for it (`paged_kernels.py`) take one tensor of keys, so these pages are cut out of one,
the slab: [pages, B, rows, heads, width], with as many rows as the kernel wants for a frame's
tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from ..attention import check
from ..log import LOG
from ..report import megabytes
from . import paged_kernels
from .offload import sent, to_device
from .paged_kernels import Kernel
from .storage import Page, PageFormat
from .strategies import joined, with_lse

TABLES = 128


def choose(
    fmt: PageFormat, device: torch.device, relative: bool, pages: int
) -> tuple[Kernel | None, str]:
    """(The kernel to attend with to so many pages where they lie, or None; why none can)."""
    reason = paged_kernels.why_none(fmt, relative)
    if reason:
        return None, reason
    reasons = paged_kernels.refusals(fmt, device, pages)
    for kernel in paged_kernels.KERNELS:
        if not reasons[kernel.name]:
            return kernel, ""
    return None, "; ".join(f"{name}: {reason}" for name, reason in reasons.items())


def forecast(fmt: PageFormat, device: torch.device, relative: bool) -> str:
    """What will read such pages where they lie, or why nothing will; their number aside."""
    kernel, reason = choose(fmt, device, relative, 1)
    return f"by {kernel.name}" if kernel else f"not possible, {reason}"


class Slab:
    """`pages` pages of a format in one tensor for K and one for V, handed out one by one; a page
    has rows(tokens) rows.
    """

    def __init__(
        self, fmt: PageFormat, pages: int, device: torch.device, rows: Callable[[int], int]
    ):
        samples, self.tokens, heads, width = fmt.shape
        self.rows, self.samples = rows(self.tokens), samples
        shape = (pages, samples, self.rows, heads, width)
        # Zeros: what a mask leaves out is multiplied by 0 all the same.
        self.k = torch.zeros(shape, dtype=fmt.dtype, device=device)
        self.v = torch.zeros_like(self.k)
        self.used = 0

    def page(self) -> Page | None:
        """The next page, None when all are handed out."""
        if self.used == self.k.shape[0]:
            return None
        at, self.used = self.used, self.used + 1
        return Page(self.k[at, :, : self.tokens], self.v[at, :, : self.tokens], slab=self, place=at)


class PagedAttention:
    """The slab of a pool's pages, and attention over those that are kept beside a block's own.

    kernel: the one that is used, None before the slab is made. calls: attended through the
    block table. loose: calls some of whose pages lie outside of the slab, as those do that were
    made when it was full.
    reason: why it is not used any more, "" while it is.
    """

    def __init__(self, fmt: PageFormat, device: torch.device, relative: bool, budget: int = 0):
        self.fmt, self.device, self.relative, self.budget = fmt, device, relative, budget
        self.calls = self.loose = 0
        self.reason = ""
        self.slab: Slab | None = None
        self.kernel: Kernel | None = None
        self._tables: dict[tuple[tuple[tuple[int, ...], ...], int], Any] = {}

    def reserve(self, pages: int) -> None:
        """Have a slab of `pages` pages, where it can be used and fits the budget."""
        if self.slab is not None or self.reason:
            return
        kernel, self.reason = choose(self.fmt, self.device, self.relative, pages)
        if kernel is None:
            return
        size = paged_kernels.slab_bytes(self.fmt, pages, kernel.rows)
        if self.budget and size > self.budget:
            self.reason = f"a slab for {kernel.name} takes {megabytes(size)}, more than the budget"
            return
        self.kernel = kernel
        self.slab = Slab(self.fmt, pages, self.device, kernel.rows)

    def make(self) -> Page:
        """A page of the slab, or one by itself when there is none left."""
        page = None if self.slab is None else self.slab.page()
        return page or self.fmt.empty(self.device)

    def bring(self, page: Page) -> Page:
        """A page from main memory, copied into the slab; without one, onto the device."""
        if self.slab is None:
            return to_device(page, self.device)
        place = self.make()
        for name, tensor in place.tensors().items():
            tensor.copy_(page.tensors()[name])
        return place

    def drop(self) -> None:
        """Let the slab go: none of its pages is in use."""
        self.slab, self._tables = None, {}

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
        slab, kernel = self.slab, self.kernel
        if self.reason or slab is None or kernel is None:
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
            kept = kernel.attend(q, slab, self._prepared(kernel, slab, table, q.shape[1]))
            own = with_lse(*(each.transpose(1, 2) for each in (q, k, v)))
            out = joined([kept, own]).to(q.dtype)
        except Exception as error:
            if self.calls:
                raise
            said = ascii(str(error))[1:-1].partition("\\n")[0][:120]
            self._give_up(f"{kernel.name} raised {type(error).__name__}: {said}")
            return None
        if not self.calls:
            k_all, v_all = (each.transpose(1, 2) for each in gathered())
            off = check.error(out, q.transpose(1, 2), k_all, v_all, None, q.shape[-1] ** -0.5)
            if not off <= check.limit(q.dtype, exact=True):
                self._give_up(
                    f"the first result of {kernel.name} was off by {off:.2g} from the gathered "
                    f"pages"
                )
                return None
        self.calls += 1
        return out.transpose(1, 2)

    def _give_up(self, reason: str) -> None:
        self.reason = reason
        LOG.warning("[Frugal] %s", self.text())

    def _prepared(
        self, kernel: Kernel, slab: Slab, table: tuple[tuple[int, ...], ...], queries: int
    ) -> Any:
        """The same for every step of a block, so it is made once for each layer."""
        key = table, queries
        if key not in self._tables:
            if len(self._tables) >= TABLES:
                self._tables.clear()
            numbers = sent(table, self.device)
            self._tables[key] = kernel.prepare(slab, numbers, queries)
        return self._tables[key]

    def text(self) -> str:
        """What was done, in words."""
        if self.reason:
            return f"paged attention not used: {self.reason}; gathered instead"
        loose = f", {self.loose} gathered because their pages lie apart" if self.loose else ""
        by = f" by {self.kernel.name}" if self.kernel else ""
        return f"paged{by}: {self.calls} calls{loose}"
