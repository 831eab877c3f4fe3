"""One conversion as a person asks for it: a format or a size, calibration, LoRAs; the same for the
node and for the command line.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from ..checkpoints.resolve import Structure
from ..checkpoints.source import SAFETENSORS
from ..errors import FrugalError
from ..formats import table
from .budget import GB, Allocation, allocate
from .calibration import Calibration, read_calibration
from .convert import VERSION, ConvertReport, Merge, convert, merged, payload, states, steps, uniform
from .curve_cache import CurveFile
from .curves import FormatError, LayerCurve, measure
from .quality import QualityReport, json_path, measured, plan_text, report_of, write_json
from .sensitivity import for_outputs, wiring
from .weights import Weights

Progress = Callable[[str, float, float], None]
ALLOWED = (table.BF16, table.INT8, table.FP8, table.W4A8)


@dataclass(frozen=True)
class Job:
    """What is asked for. `target` is one of formats.TARGETS, for the large layers of the blocks; or
    None, and then `budget` is the size of all weights in bytes and `allowed` the formats to choose
    from for every linear layer. `calibration`: a file of FrugalCalibrate. `device`: where to
    compute. `measured`: compare every layer with its source, for the report.
    """

    source: Path
    output: Path
    target: str | None
    budget: int = 0
    allowed: tuple[str, ...] = ALLOWED
    calibration: Path | None = None
    device: torch.device | str = "cpu"
    overwrite: bool = False
    measured: bool = False


@dataclass(frozen=True)
class Outcome:
    """The report of the conversion; where a budget decided what it bought, as text; where layers
    were measured their quality, which is also in the file `quality_file`.
    """

    report: ConvertReport
    plan: str = ""
    quality: QualityReport | None = None
    quality_file: Path | None = None

    def text(self) -> str:
        parts = [self.report.text(), self.plan]
        if self.quality is not None and self.quality_file is not None:
            parts += [self.quality.text(), f"all figures: {self.quality_file.name}"]
        return "\n\n".join(filter(None, parts))


def run(
    job: Job,
    merge_for: Callable[[Weights], Merge | None] = lambda weights: None,
    progress: Progress = lambda stage, done, total: None,
    structure: Structure | None = None,
) -> Outcome:
    """Do the job. `merge_for` makes the Merge for the opened source, `progress` gets the name of a
    stage and how far it is; an exception it raises stops the work, and the same job goes on later.
    structure: as for plan_wan.

    Raises FrugalError for anything that cannot be done.
    """
    if job.output.suffix.lower() not in SAFETENSORS:
        raise FrugalError(
            f"{job.output.name} has no ending that says what it is",
            f"a name ending in {SAFETENSORS[0]}",
            f"write to {job.output.name}{SAFETENSORS[0]}",
        )
    check_device(job.device)
    if job.output.exists() and not job.overwrite:
        raise FrugalError(
            f"{job.output.name} exists already",
            "a name that is free",
            "choose another name, or ask for it to be overwritten",
        )
    source = Weights(job.source, structure)
    if job.output.exists() and any(job.output.samefile(path) for path in source.source.files):
        raise FrugalError(
            f"{job.output.name} is to be written from itself", "another file", "choose another name"
        )
    merge = merge_for(source)
    known = None if job.calibration is None else read_calibration(job.calibration)
    plan = ""
    if job.target is None:
        allocation, curves = choose(source, job, merge, known, progress)
        choice: Mapping[str, str] = allocation.choice
        plan = plan_text(allocation, curves, job.budget)
        del curves
    else:
        choice = uniform(source, job.target)
    facts: dict[str, Any] = {}
    if job.calibration is not None:
        facts["calibration"] = [job.calibration.name, job.calibration.stat().st_size]
    if plan:
        facts |= {"budget_bytes": job.budget, "allowed": list(job.allowed)}

    def compare(
        layer: str, target: str, weight: torch.Tensor, made: Mapping[str, Any], statistics: Any
    ) -> dict[str, Any]:
        return measured(layer, target, weight, made, statistics, job.device)

    report = convert(
        source,
        job.output,
        choice,
        device=job.device,
        calibration=known,
        merge=merge,
        measure=compare if job.measured else None,
        facts=facts,
        progress=lambda done, total: progress("write", done, total),
        overwrite=job.overwrite,
    )
    if job.target is None:
        _kept_curves(source, job, merge).remove()
    if not report.measured:
        return Outcome(report, plan)
    quality = report_of(
        report.target,
        report.source,
        report.payload_bytes,
        [report.measured[layer] for layer in source.shapes if layer in report.measured],
        notes=report.notes,
    )
    return Outcome(report, plan, quality, write_json(quality, json_path(job.output)))


def check_device(device: torch.device | str) -> None:
    """Raises FrugalError for a device that is not there or cannot compute."""
    try:
        if torch.zeros(1, device=device).add(1).item() == 1:
            return
        reason = "computes wrong"
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
    raise FrugalError(
        f"the device {ascii(str(device))[1:-1][:40]} cannot be used ({ascii(reason)[1:-1][:100]})",
        "cpu, or the name of a device of this PyTorch, such as cuda:0",
        "set the device to cpu",
    )


def choose(
    source: Weights, job: Job, merge: Merge | None, known: Calibration | None, progress: Progress
) -> tuple[Allocation, dict[str, LayerCurve]]:
    """The format of every linear layer that fits the budget of a job, by measured error.

    Raises FrugalError if no choice fits.
    """
    layers = list(source.shapes)
    rest = [step for step in steps(source, {}, merge) if step.unit not in source.shapes]
    _check_budget(source.shapes, payload(rest), job)
    kept = _kept_curves(source, job, merge)
    left = [layer for layer in layers if layer not in kept.held]
    done = iter(range(len(layers) - len(left) + 1, len(layers) + 1))

    def readers() -> Iterable[tuple[str, Callable[[], torch.Tensor]]]:
        for layer in left:
            yield layer, lambda layer=layer: merged(source, layer, merge, torch.device(job.device))
            source.release(layer)

    def step(curve: LayerCurve) -> None:
        kept.keep(curve)
        progress("measure", next(done), len(layers))

    progress("measure", len(layers) - len(left), len(layers))
    measure(
        readers(),
        job.allowed,
        statistics=known.layer if known is not None else lambda name: None,
        device=job.device,
        step=step,
    )
    curves = {layer: kept.held[layer] for layer in layers}
    weights, note = shares_of(layers, known, curves)
    found = allocate(curves, payload(rest), job.budget, job.allowed, weights)
    notes = [note]
    if known is not None:
        notes.append(
            "the predicted error is for inputs like the recorded ones; on tiny models the truth "
            "was up to a third above it, so check the finished file"
        )
    found = replace(found, notes=(*found.notes, *notes))
    planned = payload(steps(source, found.choice, merge))
    # Layers that keep their bytes may hold fewer of the optional tensors.
    if planned > found.bytes:
        raise FrugalError(
            f"a file of {planned} bytes from a choice of {found.bytes}",
            "at most that size",
            "report the file to ComfyUI-Frugal",
        )
    return found, curves


def _check_budget(shapes: Mapping[str, tuple[int, int]], fixed: int, job: Job) -> None:
    """Refuse, before anything is measured, a budget that no choice of formats can keep."""
    curves = {}
    for layer, shape in shapes.items():
        reasons = {target: table.suits(target, shape) for target in job.allowed}
        made = {
            target: FormatError(table.stored_bytes(target, shape), 0.0, 1.0, 1.0)
            for target, reason in reasons.items()
            if reason is None
        }
        refused = {target: reason for target, reason in reasons.items() if reason is not None}
        curves[layer] = LayerCurve(layer, shape, made, refused, False)
    allocate(curves, fixed, job.budget, job.allowed)


def _kept_curves(source: Weights, job: Job, merge: Merge | None) -> CurveFile:
    """What an interrupted run of this job has measured already."""
    files = [*source.source.files, *([job.calibration] if job.calibration is not None else [])]
    device = torch.device(job.device).type
    identity = [VERSION, states(files), merge.identity if merge else "", device, job.allowed]
    return CurveFile(job.output, identity)


def shares_of(
    layers: list[str], known: Calibration | None, curves: Mapping[str, LayerCurve]
) -> tuple[dict[str, float], str]:
    """The shares of the output by which errors of these layers count, measured if the calibration
    holds them for all, else by wiring; and a sentence that says which.
    """
    held = {} if known is None else known.shares.layers
    mine = {name: held[name] for name in layers if name in held}
    if known is not None and len(mine) == len(layers):
        runs = known.shares.runs
        return for_outputs(mine, curves), f"layer sensitivity measured in {runs} runs"
    note = "layer sensitivity estimated from Wan's architecture, not measured"
    if mine:
        note += f": the calibration holds them for {len(mine)} of {len(layers)}"
    return wiring(layers), note


def budget_bytes(gigabytes: float) -> int:
    """A size in GB (10^9 bytes) as bytes. Raises FrugalError for what is no size."""
    if not (math.isfinite(gigabytes) and gigabytes >= 0):
        raise FrugalError(
            f"a budget of {gigabytes:g} GB", "a size in GB (10^9 bytes)", "set the budget to a size"
        )
    return round(gigabytes * GB)
