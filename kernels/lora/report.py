"""What became of every key of a LoRA file."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from ..report import megabytes

LISTED = 6


@dataclass(frozen=True)
class LoraReport:
    """Counts of keys: `keys` in the file for this model, `beside` applied without changing a
    loaded weight, `inside` by changing it; `left` key -> reason; `layers` with a branch and the
    `size` in bytes of what they hold; `text_encoder` keys that are not this model's; `scaled`
    layers whose strength the file's metadata state.
    """

    file: str
    strength: float
    keys: int
    beside: int
    inside: int
    left: Mapping[str, str]
    layers: int
    size: int
    text_encoder: int = 0
    scaled: int = 0

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)

    def text(self) -> str:
        applied = self.beside + self.inside
        what = f"{self.file} at {self.strength:g}:"
        lines = []
        if self.left:
            lines.append(f"{what} {len(self.left)} of {self.keys} keys not applied:")
        reasons: dict[str, list[str]] = {}
        for key, reason in self.left.items():
            reasons.setdefault(reason, []).append(key)
        for reason, keys in reasons.items():
            more = f" and {len(keys) - LISTED} more" if len(keys) > LISTED else ""
            lines.append(f"- {', '.join(keys[:LISTED])}{more}: {reason}")
        lines.append(f"{what} {applied} of {self.keys} keys applied")
        if self.scaled:
            lines.append(f"{self.scaled} layers at the alpha that the file's metadata state")
        lines.append(f"{self.layers} layers with an unmerged adapter, {megabytes(self.size)}")
        if self.inside:
            lines.append(
                f"{self.inside} keys change unquantised parameters in place, as ComfyUI's own LoRA "
                "loader does: a new strength reloads the model's weights"
            )
        if self.text_encoder:
            lines.append(f"{self.text_encoder} keys are for a text encoder, not for this model")
        return "\n".join(lines)
