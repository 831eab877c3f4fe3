"""Kernels that read keys and values from pages through a block table, the first usable one taken.

All take one tensor of pages, the slab (`paged.Slab`), and give their output with its log of the sum
of exponentials, so that the block's own keys can be joined to it. What differs is how many rows a
page must have, and what a table has to be made into.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import torch

from ..attention.backends import NAMED, importable
from ..attention.call import Call, capability_of, device_kind
from .storage import MODEL, PageFormat

if TYPE_CHECKING:
    from .paged_attention import Slab

BLOCK = 128
# Triton's kernel computes indices in 32 bits.
LARGEST = 1 << 31
# Of torch.compile; "" runs flex_attention as it is written, which computes every score.
BACKEND = "inductor"


@dataclass(frozen=True)
class Kernel:
    """rows: of a page of so many tokens. why_not: "" or why it cannot run for pages of a format on
    a device, so many of them. prepare(slab, table int64 [N, n] of page * B + sample, queries): what
    attend needs of a table. attend(q [N, Lq, H, D], slab, prepared): (softmax attention over the
    pages of the table [N, H, Lq, D], lse float32 [N, H, Lq]).
    """

    name: str
    rows: Callable[[int], int]
    why_not: Callable[[PageFormat, torch.device, int], str]
    prepare: Callable[[Slab, torch.Tensor, int], Any]
    attend: Callable[[torch.Tensor, Slab, Any], tuple[torch.Tensor, torch.Tensor]]


def why_none(fmt: PageFormat, relative: bool) -> str:
    """Why no kernel can attend to such pages where they lie, "" if one might."""
    if fmt.kind != MODEL:
        return f"{fmt.kind} pages have to be read out first"
    return "relative positions turn the keys that are kept" if relative else ""


def refusals(fmt: PageFormat, device: torch.device, pages: int) -> dict[str, str]:
    """Every kernel, in the order of choice, and why it cannot be used, "" if it can."""
    return {kernel.name: kernel.why_not(fmt, device, pages) for kernel in KERNELS}


def elements(fmt: PageFormat, pages: int, rows: Callable[[int], int]) -> int:
    """Numbers in so many pages of K, or of V."""
    samples, tokens, heads, width = fmt.shape
    return pages * samples * rows(tokens) * heads * width


def slab_bytes(fmt: PageFormat, pages: int, rows: Callable[[int], int]) -> int:
    """Of K and V together."""
    return 2 * elements(fmt, pages, rows) * fmt.dtype.itemsize


def widest_page(fmt: PageFormat, relative: bool) -> int:
    """Bytes of a page for paged attention, with the rows of the kernel that wants the most."""
    if why_none(fmt, relative):
        return fmt.page_bytes
    return max(slab_bytes(fmt, 1, kernel.rows) for kernel in KERNELS)


def _refused_as(name: str, fmt: PageFormat, device: torch.device) -> str:
    """Why the kernel of that name in `kernels/attention` does not serve such keys, of which this is
    another entry; "" if it does. Whether its package is there is not asked.
    """
    backend = NAMED[name]
    kind = device_kind(device)
    if kind not in backend.devices:
        return f"runs on {' and '.join(backend.devices)}, not on {kind}"
    samples, tokens, heads, width = fmt.shape
    capability = capability_of(device)
    lengths = samples, heads, heads, tokens, tokens
    return backend.refusal(Call(kind, capability, fmt.dtype, *lengths, width, width)) or ""


def _as_pages(slab: Slab) -> tuple[torch.Tensor, torch.Tensor]:
    return slab.k.flatten(0, 1), slab.v.flatten(0, 1)


def _counted(slab: Slab, table: torch.Tensor, queries: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The table and how many keys it stands for: every page is full."""
    keys = table.shape[1] * slab.tokens
    return table.int(), torch.full((len(table),), keys, dtype=torch.int32, device=table.device)


def flash_3() -> Callable[..., Any]:
    """FlashAttention-3's function for caches in pages. Raises ImportError without the package."""
    from flash_attn_interface import (  # pyright: ignore[reportMissingImports]
        flash_attn_with_kvcache,
    )

    return flash_attn_with_kvcache


def _why_not_flash_3(fmt: PageFormat, device: torch.device, pages: int) -> str:
    if not importable("flash_attn_interface"):
        return "flash_attn_interface (FlashAttention 3) is not installed"
    # On a card that it has no code for it ends the process instead of raising.
    reason = _refused_as("flash-attn-3", fmt, device)
    if reason:
        return reason
    try:
        flash_3()
    # A package of that name on PyPI is empty; one for another torch fails in its library.
    except (ImportError, OSError) as error:
        return f"flash_attn_interface cannot be imported ({type(error).__name__})"
    return ""


def _attend_flash_3(q, slab, prepared):
    table, keys = prepared
    k, v = _as_pages(slab)
    out, lse, *_ = flash_3()(q, k, v, cache_seqlens=keys, page_table=table, return_softmax_lse=True)
    return out.transpose(1, 2), lse


def varlen() -> Callable[..., Any]:
    """PyTorch's attention over sequences of different lengths. Raises ImportError without it."""
    from torch.nn.attention.varlen import varlen_attn

    return varlen_attn


def _why_not_varlen(fmt: PageFormat, device: torch.device, pages: int) -> str:
    try:
        known = inspect.signature(varlen()).parameters
    except ImportError:
        return f"torch {torch.__version__} has no varlen_attn"
    if not {"block_table", "seqused_k"} <= set(known):
        return f"varlen_attn of torch {torch.__version__} has no block_table"
    # FlashAttention 2 behind it loads 256 keys at a time, all from one page.
    tokens = fmt.shape[1]
    if tokens % 256:
        return f"{tokens} tokens per page, not a multiple of 256"
    return _refused_as("flash-attn-2", fmt, device)


def _prepare_varlen(slab, table, queries):
    starts = torch.arange(len(table) + 1, dtype=torch.int32, device=table.device) * queries
    return *_counted(slab, table, queries), starts, queries


def _attend_varlen(q, slab, prepared):
    from torch.nn.attention.varlen import AuxRequest

    table, keys, starts, queries = prepared
    out, lse = varlen()(
        q.flatten(0, 1), *_as_pages(slab), starts, None, queries, table.shape[1] * slab.tokens,
        return_aux=AuxRequest(lse=True), seqused_k=keys, block_table=table,
    )  # fmt: skip
    count, _, heads = q.shape[:3]
    return (
        out.unflatten(0, (count, queries)).transpose(1, 2),
        lse.view(heads, count, queries).transpose(0, 1),
    )


def _why_not_flex(fmt: PageFormat, device: torch.device, pages: int) -> str:
    if device.type != "cuda":
        return f"flex_attention has no compiled kernel for {device.type} here"
    if not torch.cuda.is_available() or not _has_triton():
        return "Triton is not there, and without it flex_attention computes every score"
    if elements(fmt, pages, blocks_of) >= LARGEST:
        return f"{pages} pages are more numbers than the kernel can count"
    return _refused_as("flex", fmt, device)


def _has_triton() -> bool:
    try:
        from torch.utils._triton import has_triton
    except ImportError:
        return False
    return has_triton()


def blocks_of(tokens: int) -> int:
    """Rows of whole blocks of flex_attention (arXiv 2412.05496), which visits those of the pages in
    the table and no others; where a page's last block is partly empty, the mask says so.
    """
    return -(-tokens // BLOCK) * BLOCK


def block_mask(slab: Slab, table: torch.Tensor, queries: int) -> Any:
    """The BlockMask for N times `queries` rows of q. table: int64 [N, n], for each of the N the
    pages as page * B + sample.
    """
    from torch.nn.attention.flex_attention import BlockMask

    rows, tokens = slab.rows, slab.tokens
    per, whole = rows // BLOCK, tokens // BLOCK
    total, batch = slab.k.shape[0] * slab.samples, table.shape[0]
    member = torch.zeros(batch, total, dtype=torch.bool, device=table.device)
    member.scatter_(1, table, True)

    def seen(b, h, q, kv):
        return member[b, kv // rows] & (kv % rows < tokens)

    def blocks(first: int, count: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Blocks first to first + count of every page, as (how many, which)."""
        offsets = torch.arange(first, first + count, device=table.device)
        which = (table[:, :, None] * per + offsets).flatten(1)
        padded = torch.nn.functional.pad(which, (0, total * per - which.shape[1])).int()
        number = torch.full((batch, 1, 1), which.shape[1], device=table.device)
        return number.int(), padded[:, None, None]

    # All rows of q see the same pages, so they are one block: a list of pages for each 128 of them
    # takes 0.7 GB over 30 layers with guidance, window 21 and sink 3 at 832 x 480.
    return BlockMask.from_kv_blocks(
        *blocks(whole, per - whole), *blocks(0, whole), BLOCK_SIZE=(blocks_of(queries), BLOCK),
        mask_mod=seen, seq_lengths=(queries, total * rows),
    )  # fmt: skip


def _attend_flex(q, slab, mask):
    k, v = (
        each.flatten(0, 2).transpose(0, 1)[None].expand(q.shape[0], -1, -1, -1)
        for each in (slab.k, slab.v)
    )
    return _flex(BACKEND)(q.transpose(1, 2), k, v, mask)


@lru_cache(maxsize=2)
def _flex(backend: str) -> Any:
    from torch.nn.attention import flex_attention as module

    from ..compile.graphs import Graphs

    function: Any = module.flex_attention
    request = getattr(module, "AuxRequest", None)

    def call(q, k, v, mask):
        if request is None:
            return function(q, k, v, block_mask=mask, return_lse=True)
        out, extra = function(q, k, v, block_mask=mask, return_aux=request(lse=True))
        return out, extra.lse

    if not backend:
        return call
    # By itself torch.compile computes every score from the ninth size of a slab on.
    graphs = Graphs(backend, dynamic=False)
    return lambda *tensors: graphs(call, *tensors)[0]


def _as_many(tokens: int) -> int:
    return tokens


FLASH_3 = Kernel("FlashAttention 3", _as_many, _why_not_flash_3, _counted, _attend_flash_3)
VARLEN = Kernel("varlen_attn", _as_many, _why_not_varlen, _prepare_varlen, _attend_varlen)
FLEX = Kernel("flex_attention", blocks_of, _why_not_flex, block_mask, _attend_flex)
KERNELS = (FLASH_3, VARLEN, FLEX)
