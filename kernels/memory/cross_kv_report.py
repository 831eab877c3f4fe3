"""What keeping the constant part of cross-attention saves, as data first, then as text."""

from __future__ import annotations

from dataclasses import dataclass

from ..checkpoints.wan_shapes import IMAGE_TOKENS, TEXT_TOKENS
from ..report import megabytes


@dataclass(frozen=True)
class ContextPlan:
    """Before a run. layers: projections of text and image. Bytes: their weights, all weights of
    the blocks, and one row of a prompt or of an image over all layers.
    """

    layers: int
    weight_bytes: int
    block_bytes: int
    text_row_bytes: int
    image_row_bytes: int

    def kept(self, prompts: int, row: int) -> int:
        """Bytes kept at the most in a run with so many prompts and one start image. row: bytes of
        a row of what the projections are given, which is kept to know it again. The image counts
        once; where a matrix kernel rounds its rows otherwise beside another prompt, it is kept
        beside each.
        """
        image = IMAGE_TOKENS * (self.image_row_bytes + prompts * row) if self.image_row_bytes else 0
        return prompts * TEXT_TOKENS * (self.text_row_bytes + row) + image

    @property
    def share(self) -> float:
        """Of the blocks' weights, 0..1."""
        return self.weight_bytes / self.block_bytes

    def text(self) -> str:
        lines = [
            f"{self.layers} cross-attention projections: {megabytes(self.weight_bytes)}, "
            f"{100 * self.share:.1f} % of the blocks' weights, are read once per prompt of a run "
            "instead of in every step",
            f"cached per prompt: up to {megabytes(TEXT_TOKENS * self.text_row_bytes)} "
            f"({TEXT_TOKENS} tokens; less for a short prompt, whose padding is kept once)",
        ]
        if self.image_row_bytes:
            size = megabytes(IMAGE_TOKENS * self.image_row_bytes)
            lines.append(f"cached per start image: {size} ({IMAGE_TOKENS} tokens)")
        return "\n".join(lines)


@dataclass(frozen=True)
class ContextReport:
    """After a run. calls: of the model. computed, reused: layer results made and reused.
    contexts, bytes: kept at the end. dropped: contexts that had to make room. released: bytes of
    weights offloaded from the device. notes: layers that were left alone, and why.
    """

    calls: int
    computed: int
    reused: int
    contexts: int
    bytes: int
    dropped: int
    released: int
    notes: tuple[str, ...] = ()

    def text(self) -> str:
        lines = [
            f"cross-attention cache: {self.reused} layer results reused, {self.computed} computed, "
            f"in {self.calls} calls of the model; {self.contexts} contexts cached, "
            f"{megabytes(self.bytes)}"
        ]
        if self.released:
            lines.append(f"weights offloaded from the device: {megabytes(self.released)}")
        if self.dropped:
            lines.append(
                f"note: {self.dropped} contexts were evicted; a larger 'contexts' may keep them"
            )
        lines += [f"note: {note}" for note in self.notes]
        return "\n".join(lines)
