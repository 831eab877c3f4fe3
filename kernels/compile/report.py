"""What compiling did in a sampling run: data first, then text."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any


@dataclass
class CompileReport:
    """calls: of compiled blocks. graphs: made in this run; seconds: what the calls took in which
    they were made. uncompiled: reason -> calls of blocks that ran as they are.
    """

    calls: int = 0
    graphs: int = 0
    seconds: float = 0.0
    uncompiled: dict[str, int] = field(default_factory=dict)

    def computed(self, graphs: int, seconds: float) -> None:
        self.calls += 1
        self.graphs += graphs
        self.seconds += seconds

    def left(self, reason: str) -> None:
        self.uncompiled[reason] = self.uncompiled.get(reason, 0) + 1

    def text(self) -> str:
        if not self.calls and not self.uncompiled:
            return "compiled blocks: no block ran in this run"
        made = f"{self.graphs} graphs made in {self.seconds:.1f} s" if self.graphs else "none new"
        lines = [f"compiled blocks: {self.calls} calls, {made}"]
        lines += [
            f"{count} calls of blocks ran uncompiled because of {reason}"
            for reason, count in self.uncompiled.items()
        ]
        return "\n".join(lines)

    def data(self) -> dict[str, Any]:
        return asdict(self)
