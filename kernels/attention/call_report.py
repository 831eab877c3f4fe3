"""What attention cost in a run: one row per kind of call, as data, then as text."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass

from .selector import DEFAULT, KernelSelector, Route

OWN = "ComfyUI's own"


@dataclass(frozen=True)
class Row:
    """One kind of call. shape: (batch, heads, query tokens, key tokens, head width). calls: how
    often in this run. ms: of one call, as measured when the kernel was chosen; None if it was not.
    tflops: 10^12 multiplications and additions a second at that. default_ms: the same call by
    ComfyUI's own attention. source: measured, remembered or handed on. refused: kernel -> why not.
    """

    shape: tuple[int, int, int, int, int]
    dtype: str
    mask: str
    calls: int
    backend: str
    ms: float | None
    tflops: float | None
    default_ms: float | None
    estimated: bool
    source: str
    refused: dict[str, str]


@dataclass(frozen=True)
class Table:
    """The rows of a run, busiest first. broken: kernels that failed in the middle of it. handed_on:
    calls that a named kernel left to an attention node before it.
    """

    device: str
    rows: tuple[Row, ...]
    broken: dict[str, str]
    handed_on: int = 0

    def json(self) -> str:
        return json.dumps(asdict(self))

    def text(self) -> str:
        """One line per row, then the kernels that were turned down and why."""
        if not self.rows:
            return "attention: no calls reached this node"
        lines = [f"attention on {self.device}"]
        lines += [_line(row) for row in self.rows]
        lines += [f"failed during the run: {name} {why}" for name, why in self.broken.items()]
        turned_down: dict[str, list[str]] = {}
        for row in self.rows:
            for name, why in row.refused.items():
                names = turned_down.setdefault(why, [])
                names += [] if name in names else [name]
        return "\n".join(
            [*lines, *(f"not used: {', '.join(n)}: {why}" for why, n in turned_down.items())]
        )


def table(kernel_selector: KernelSelector) -> Table:
    """What the selector saw and chose so far."""
    rows = [_row(kernel_selector, route) for route in kernel_selector.routes.values()]
    rows.sort(key=lambda row: -(row.ms or 0.0) * row.calls)
    device = kernel_selector.place.split(" | ")[0]
    return Table(device, tuple(rows), dict(kernel_selector.broken), kernel_selector.handed_on)


def _row(kernel_selector: KernelSelector, route: Route) -> Row:
    call, times = route.call, dict(route.decision.ranking)
    used = next((name for name in route.names if name not in kernel_selector.broken), DEFAULT)
    seconds = times.get(used)
    default = times.get(DEFAULT)
    return Row(
        shape=(call.batch, call.heads, call.q_len, call.k_len, call.width),
        dtype=str(call.dtype).removeprefix("torch."),
        mask=call.mask,
        calls=route.calls,
        backend=used,
        ms=None if seconds is None else seconds * 1e3,
        tflops=None if not seconds else call.flops / seconds / 1e12,
        default_ms=None if default is None else default * 1e3,
        estimated=route.decision.scaled,
        source=route.source,
        refused={name: why for name, why in route.reasons.items() if name != used},
    )


def _line(row: Row) -> str:
    batch, heads, q_len, k_len, width = row.shape
    text = f"{batch}x{heads} heads x {q_len} on {k_len} tokens x {width} {row.dtype}"
    text += "" if row.mask == "none" else f", {row.mask} mask"
    text += f": {OWN if row.backend == DEFAULT else row.backend}, {row.calls} calls"
    if row.ms is not None and row.tflops is not None:
        about = "about " if row.estimated else ""
        text += f", {about}{row.ms:.3g} ms, {row.tflops:.3g} TFLOP/s ({row.source})"
        if row.default_ms is not None and row.backend != DEFAULT:
            text += f", {OWN} {about}{row.default_ms:.3g} ms"
    return text
