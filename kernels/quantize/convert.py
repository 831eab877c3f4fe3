"""Converts a Wan file to ComfyUI's own formats, one tensor in memory at a time.

Every linear layer goes one of three ways: its bytes as they are, the tensors of another format made
from its floats, or, where the source is quantised in another format, made from what its bytes stand
for, which rounds twice and is said. Everything else goes over bit by bit.
"""

from __future__ import annotations

import json
import math
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch

from ..checkpoints.header import TensorInfo
from ..checkpoints.layouts import FLOAT8, FLOATS, NATIVE, ONE
from ..errors import FrugalError
from ..formats import codec, table
from ..formats.packed_int import GGUF
from ..report import megabytes
from .weights import Weights, label
from .writer import Group, Writer, arranged

VERSION = "0.1.0"
QUANT_METADATA = "_quantization_metadata"
# Metadata of a quantisation that the new file does not have.
DROPPED = (QUANT_METADATA, "quantization_config", "gptq_checkpoint_format", "gptq_bits")
COPY, KEEP, MAKE = "copied", "kept", "made"


class Merge(Protocol):
    """Changes to weights before they are quantised, such as LoRAs.

    `title` names them for people, `identity` tells them from all others, `names` are the canonical
    tensors that change, `notes` what a user should know; `apply` takes and gives a float32 tensor
    of the same shape and may use up what it takes.
    """

    title: str
    identity: str
    names: frozenset[str]
    notes: tuple[str, ...]

    def apply(self, name: str, weight: torch.Tensor) -> torch.Tensor: ...


class Statistics(Protocol):
    """What the calibration file `path` knows of the layers' inputs; `layer` gives None for one that
    it has not seen.
    """

    @property
    def path(self) -> Path: ...

    def layer(self, name: str) -> Any: ...


Measure = Callable[[str, str, torch.Tensor, Mapping[str, torch.Tensor], Any], Mapping[str, Any]]


@dataclass(frozen=True)
class Step:
    """One unit of the file: what happens to it, the target where it is made, what is written."""

    unit: str
    action: str
    group: Group
    target: str = ""
    declared: Mapping[str, Any] = field(default_factory=dict)
    twice: bool = False


@dataclass(frozen=True)
class ConvertReport:
    """What a conversion did: names and bytes of both files (`payload_bytes`
    without the header), seconds, target -> number and bytes of
    layers, layer -> what was measured of it, notes, and how many tensors an earlier run had left.
    """

    source: str
    source_bytes: int
    target: str
    target_bytes: int
    payload_bytes: int
    seconds: float
    layers: Mapping[str, tuple[int, int]]
    measured: Mapping[str, Any]
    notes: tuple[str, ...]
    resumed: int = 0

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def text(self) -> str:
        lines = [
            f"{self.target}: {megabytes(self.target_bytes)}, "
            f"from {self.source} with {megabytes(self.source_bytes)}"
        ]
        lines += [
            f"{count} layers {name}: {megabytes(size)}"
            for name, (count, size) in self.layers.items()
        ]
        lines.append(f"written in {self.seconds:.1f} s")
        lines += [f"note: {note}" for note in self.notes]
        return "\n".join(lines)


def uniform(weights: Weights, target: str) -> dict[str, str]:
    """The large linear layers of a model, all in one target."""
    return dict.fromkeys(weights.large(), target)


def steps(weights: Weights, choice: Mapping[str, str], merge: Merge | None = None) -> list[Step]:
    """What becomes of every unit when the layers of `choice` get their targets.

    Raises FrugalError for a layer that the model lacks and a width that does not suit.
    """
    unknown = sorted(set(choice) - set(weights.shapes))
    if unknown:
        raise FrugalError(
            f"a format is asked for {unknown[0]} and {len(unknown) - 1} more layers that "
            f"{weights.plan.file} lacks",
            "its linear layers",
            "use a choice made for this model",
        )
    changed = merge.names if merge is not None else frozenset()
    return [_step(weights, unit, choice.get(unit), changed) for unit in weights.units()]


def _step(weights: Weights, unit: str, target: str | None, changed: frozenset[str]) -> Step:
    shape = weights.shapes.get(unit)
    if shape is None:
        return Step(unit, COPY, _infos(weights, unit))
    layout = weights.layout(unit)
    touched = f"{unit}.weight" in changed
    if target is not None:
        reason = table.suits(target, shape)
        if reason:
            raise FrugalError(
                f"{weights.plan.file}: {unit} as {target}: {reason}",
                "a width that suits the format",
                f"choose {table.FP8} for it",
            )
    if layout is None:
        kind = _infos(weights, unit)[f"{unit}.weight"].dtype
        if target is None or (target == table.BF16 and kind == table.half(kind)):
            return Step(unit, COPY, _infos(weights, unit), str(kind).removeprefix("torch."))
        return _made(unit, target, shape, torch.float32 if touched else kind, kind)
    same = label(layout, shape)
    native = layout.format in NATIVE and layout.grid == ONE
    if native and not touched and target in (None, same):
        return _kept(weights, unit)
    # What ComfyUI cannot read as it is becomes 16-bit floats where nothing else is asked for.
    chosen = target or same or table.BF16
    # GGUF's scales are float16: no block needs more range, and all need its precision.
    blocks = layout.packed is not None and layout.packed.order == GGUF
    half = torch.float16 if blocks else torch.float32
    return _made(unit, chosen, shape, torch.float32, half, twice=chosen != table.BF16)


def _made(
    unit: str,
    target: str,
    shape: tuple[int, int],
    kind: torch.dtype,
    stored: torch.dtype,
    twice: bool = False,
) -> Step:
    kind = table.half(stored) if target == table.BF16 else kind
    group = {
        f"{unit}.{suffix}": TensorInfo(dtype, size)
        for suffix, (dtype, size) in table.tensor_specs(target, shape, dtype=kind).items()
    }
    return Step(unit, MAKE, group, target, table.options(target, shape), twice)


def _kept(weights: Weights, unit: str) -> Step:
    layout = weights.layout(unit)
    assert layout is not None
    declared: dict[str, Any] = {"format": layout.format, **layout.options}
    if layout.format in FLOAT8.values():
        declared["full_precision_matrix_mult"] = True
    held = sorted(weights.stored(unit).items(), key=lambda item: -item[1].dtype.itemsize)
    group = {name: TensorInfo(tensor.dtype, tuple(tensor.shape)) for name, tensor in held}
    size = len(table.declaration_bytes(declared, sum(i.nbytes for i in group.values())))
    group[f"{unit}.{table.DECLARATION}"] = TensorInfo(torch.uint8, (size,))
    target = label(layout, weights.shapes[unit]) or layout.format
    return Step(unit, KEEP, group, target, declared)


def _infos(weights: Weights, unit: str) -> dict[str, TensorInfo]:
    return {name: TensorInfo(info.dtype, info.shape) for name, info in weights.infos(unit).items()}


def convert(
    source: Weights,
    target: Path,
    choice: Mapping[str, str],
    *,
    device: torch.device | str = "cpu",
    calibration: Statistics | None = None,
    merge: Merge | None = None,
    measure: Measure | None = None,
    facts: Mapping[str, Any] | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
    overwrite: bool = False,
) -> ConvertReport:
    """Write `source` to the safetensors file `target` with the layers of `choice` (layer ->
    target) quantised; see `uniform`. An interrupted call goes on when it is made again.

    `calibration` knows the layers' inputs, `merge` changes weights before, `measure` (layer,
    target, float weight, tensors by suffix, statistics) gives figures for the report, `facts`
    (JSON) are added to the file's metadata and decide with the rest if an unfinished file fits.
    `progress` gets bytes done and in all; an exception that it raises stops the work and leaves
    what is done. Memory beyond one layer's pieces is bounded: one layer as float32 where the source
    is quantised or something is merged.

    Raises FrugalError for what cannot be written.
    """
    started = time.perf_counter()
    device = torch.device(device)
    by_unit = {step.unit: step for step in steps(source, choice, merge)}
    groups = arranged(step.group for step in by_unit.values())
    owner = {next(iter(step.group)): step for step in by_unit.values()}
    plan = [owner[next(iter(group))] for group in groups]
    notes = _notes(source, plan, calibration, merge)
    metadata = _metadata(source, plan, merge, facts)
    # Another device rounds a few values differently.
    files = [*source.source.files, *([calibration.path] if calibration is not None else [])]
    mark = [states(files), merge.identity if merge else "", device.type, measure is None]
    with Writer(target, groups, metadata, json.dumps(mark), overwrite) as out:
        total, state = out.size, [out.size - payload(plan[out.written :])]

        def advance(count: int) -> None:
            state[0] += count
            progress(state[0], total)

        advance(0)
        for step in plan[out.written :]:
            tensors, note = _tensors(source, step, device, calibration, merge, measure)
            out.write(tensors, note, advance)
            source.release(step.unit)
        out.finish()
        resumed, size, measured = out.resumed, out.size, dict(out.notes)
    return ConvertReport(
        source.source.name,
        sum(source.source.sizes().values()),
        target.name,
        size,
        payload(plan),
        time.perf_counter() - started,
        _counts(plan),
        measured,
        notes,
        resumed,
    )


def _tensors(
    source: Weights,
    step: Step,
    device: torch.device,
    calibration: Statistics | None,
    merge: Merge | None,
    measure: Measure | None,
) -> tuple[dict[str, torch.Tensor], dict[str, Any] | None]:
    """What is written for one step, by full name, and a note for the report."""
    changed = merge.names if merge is not None else frozenset()
    if step.action != MAKE:
        held = source.stored(step.unit)
        for name in changed & set(held):
            assert merge is not None
            held[name] = _merged(merge, name, held[name], device).to(held[name].dtype).cpu()
        key = f"{step.unit}.{table.DECLARATION}"
        if key in step.group:
            taken = sum(tensor.nbytes for tensor in held.values())
            raw = table.declaration_bytes(step.declared, taken)
            held[key] = torch.tensor(list(raw), dtype=torch.uint8)
        _check_finite(source.plan.file, held)
        return held, None
    weight = merged(source, step.unit, merge, device)
    known = calibration.layer(step.unit) if calibration is not None else None
    if step.target == table.BF16:
        weight = weight.to(step.group[f"{step.unit}.weight"].dtype)
        _check_finite(source.plan.file, {f"{step.unit}.weight": weight})
    where = f"{source.plan.file}: {step.unit}"
    made = codec.encode(step.target, weight, device, None, known, where=where)
    note = None
    if measure is not None:
        note = {step.unit: dict(measure(step.unit, step.target, weight, made, known))}
    return {f"{step.unit}.{suffix}": tensor for suffix, tensor in made.items()}, note


def _check_finite(file: str, tensors: Mapping[str, torch.Tensor]) -> None:
    for name, tensor in tensors.items():
        if tensor.dtype not in FLOATS or not tensor.numel():
            continue
        # Least and largest are NaN where any value is, and take no memory beside the tensor.
        if not all(math.isfinite(float(end)) for end in torch.aminmax(tensor)):
            raise FrugalError(
                f"{file}: {name} holds a value that is not finite",
                "finite weights that stay so in the type written",
                "download the file again, or choose another file of the same model",
            )


def merged(source: Weights, layer: str, merge: Merge | None, device: torch.device) -> torch.Tensor:
    """The weight [out, in] of a linear layer that is quantised: the source's floats, or float32
    where they are decoded or something is merged.
    """
    name, weight = f"{layer}.weight", source.weight(layer)
    return _merged(merge, name, weight, device) if merge and name in merge.names else weight


def _merged(merge: Merge, name: str, weight: torch.Tensor, device: torch.device) -> torch.Tensor:
    whole = weight.to(device=device, dtype=torch.float32, copy=True)
    made = merge.apply(name, whole)
    if made.shape != weight.shape:
        raise FrugalError(
            f"the LoRA turns {name} from {list(weight.shape)} into {list(made.shape)}",
            "a LoRA that keeps shapes",
            "use it with ComfyUI's LoRA loader instead",
        )
    return made


def payload(plan: Iterable[Step]) -> int:
    """Bytes of all tensors of these steps."""
    return sum(info.nbytes for step in plan for info in step.group.values())


def _counts(plan: list[Step]) -> dict[str, tuple[int, int]]:
    counts: Counter[str] = Counter()
    sizes: Counter[str] = Counter()
    for step in plan:
        if step.target:
            counts[step.target] += 1
            sizes[step.target] += payload([step])
    return {name: (counts[name], sizes[name]) for name in counts}


def _notes(
    source: Weights, plan: list[Step], calibration: Statistics | None, merge: Merge | None
) -> tuple[str, ...]:
    notes = [*source.plan.notes]
    twice = [step for step in plan if step.twice]
    if twice:
        layout = source.layout(twice[0].unit)
        form = layout.format if layout else ""
        notes.append(
            f"{len(twice)} layers were quantised already (first {twice[0].unit}, {form}) and are "
            "rounded twice: an unquantised source gives a better file"
        )
    opened = [
        step for step in plan
        if step.action == MAKE and step.target == table.BF16 and source.layout(step.unit)
    ]  # fmt: skip
    if opened:
        kinds = {info.dtype for step in opened for info in step.group.values()}
        named = " and ".join(
            "fp16" if k == torch.float16 else "bf16" for k in sorted(kinds, key=str)
        )
        notes.append(f"{len(opened)} quantised layers become {named} (first {opened[0].unit})")
    small = sum(step.unit not in source.shapes and not source.plain(step.unit) for step in plan)
    if small:
        notes.append(f"{small} small parameters in fp8 become bf16, which holds their values")
    if source.source.blocks:
        notes.append("GGUF blocks are unpacked first, so their weights are rounded twice")
    if calibration is not None:
        made = [s for s in plan if s.action == MAKE and s.target != table.BF16]
        unseen = [step.unit for step in made if calibration.layer(step.unit) is None]
        notes.append(f"{len(made) - len(unseen)} of {len(made)} layers are calibrated")
        if unseen:
            notes[-1] += f", these not: {', '.join(unseen[:3])}" + (
                f" and {len(unseen) - 3} more" if unseen[3:] else ""
            )
    if any(step.target == table.AWQ for step in plan):
        notes.append(
            "AWQ W4A16 layers load in ComfyUI 0.38 and later, or with ComfyUI-Frugal's loader"
        )
    return (*notes, *(merge.notes if merge is not None else ()))


def _metadata(
    source: Weights, plan: list[Step], merge: Merge | None, facts: Mapping[str, Any] | None
) -> dict[str, str]:
    kept = {key: text for key, text in source.source.metadata.items() if key not in DROPPED}
    layers = {step.unit: dict(step.declared) for step in plan if step.declared}
    if layers:
        layers = {name: layers[name] for name in source.shapes if name in layers}
        kept[QUANT_METADATA] = json.dumps({"format_version": "1.0", "layers": layers})
    own = {
        "tool": f"ComfyUI-Frugal {VERSION}",
        "source": source.source.name,
        "source_bytes": sum(source.source.sizes().values()),
        "targets": {name: count for name, (count, _) in sorted(_counts(plan).items())},
        "loras": merge.title if merge is not None else "",
        **(facts or {}),
    }
    return {"format": "pt", **kept, "frugal": json.dumps(own)}


def states(files: Iterable[Path]) -> list[Any]:
    """Name, size and time of files: differs where one was replaced."""
    found = [(path.name, path.stat()) for path in files]
    return [[name, state.st_size, state.st_mtime_ns] for name, state in found]
