"""What the user chooses of a video's cache."""

from __future__ import annotations

from dataclasses import dataclass

from ..errors import FrugalError
from .paged_kernels import widest_page
from .storage import MODEL, PageFormat
from .strategies import GATHERED, PAGED


@dataclass(frozen=True)
class CacheOptions:
    """window, sink: latent frames. kind: of storage.KINDS. relative: cached frames are re-indexed
    in time, so positions never exceed window + sink; else each stays at its own number. on_host:
    pages lie in main memory. way: GATHERED, CHUNKED or PAGED of strategies. budget: bytes of pages,
    0 for none.
    """

    window: int = 0
    sink: int = 0
    kind: str = MODEL
    relative: bool = False
    on_host: bool = False
    way: str = GATHERED
    budget: int = 0

    def __post_init__(self):
        if self.window < 0 or self.sink < 0:
            raise FrugalError(
                f"a window of {self.window} and a sink of {self.sink} frames",
                "none below 0",
                "set window and sink to 0 or more",
            )
        if self.window == 0 and self.sink:
            raise FrugalError(
                f"a sink of {self.sink} frames without a window",
                "a window, for without one every frame is kept",
                "set the window, or the sink to 0",
            )

    def page_bytes(self, fmt: PageFormat) -> int:
        """Bytes that a page takes at the most."""
        if self.way == PAGED and not self.on_host:
            return widest_page(fmt, self.relative)
        return fmt.page_bytes
