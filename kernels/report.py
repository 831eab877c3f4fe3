"""What a loader did, as data first, then as text."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True)
class LoadReport:
    """Facts of one load: `files` name -> bytes on disk, `formats` name -> bytes of weights held in
    it, seconds, notes; `folder`: the last folders that the files are in.
    """

    title: str
    files: dict[str, int]
    formats: dict[str, int]
    seconds: float
    notes: tuple[str, ...] = field(default=())
    licence: str = ""
    folder: str = ""

    def text(self) -> str:
        lines = [self.title]
        lines += [f"file {name}: {megabytes(size)}" for name, size in self.files.items()]
        lines += [f"weights {name}: {megabytes(size)}" for name, size in self.formats.items()]
        lines.append(f"loaded in {self.seconds:.2f} s")
        lines += [f"note: {note}" for note in self.notes]
        if self.licence:
            lines.append(f"licence: {self.licence}")
        return "\n".join(lines)


def megabytes(size: int) -> str:
    """Bytes as text in MB (10^6 bytes), GB from 1000 MB up."""
    return f"{size / 1e9:.2f} GB" if size >= 1e9 else f"{size / 1e6:.1f} MB"
