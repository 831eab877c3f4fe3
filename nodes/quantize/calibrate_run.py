"""Records what the linear layers of a MODEL get as inputs while it samples, and writes it down when
the run has ended.

One run covers all layers at all its steps: each distinct input keeps its second moments whole or as
a sketch, whichever the memory allows (kernels.quantize.moments), so nothing has to be queued twice.
Layers only look on: module hooks exist while the model runs and return nothing, so the outputs are
the same to the bit. Layers that get the same rows (q, k and v of a block; k and v of all blocks,
which read the text) are told by those rows, not by their names. Rows that come again, such as the
padding of a text or the text at the next step, count once: how many different ones there were says
how far H can be trusted.
"""

from __future__ import annotations

import re
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import comfy.model_base
import comfy.utils
import torch
from comfy.patcher_extension import WrappersMP

from ...kernels.errors import FrugalError
from ...kernels.log import LOG
from ...kernels.quantize.calibration import Calibration, Shares, read_calibration, write_calibration
from ...kernels.quantize.moments import Directions, Gatherer, Moment, columns_within, merged
from ...kernels.report import LoadReport, megabytes
from .._comfy import REPORT_KEY
from ..lora.unmerged_run import KEY as SIDE_KEY
from ..lora.unmerged_run import fuses
from . import sensitivity as shares
from .cropped_calls import options_of
from .reference_calls import Keeper, joined
from .token_sampler import TokenPositions, TokenSampler, distinct, mark_of

KEY = "frugal.calibrate"
COMPILE_KEY = "torch.compile"
# Layers that have one input in Wan: only to foresee the memory, what counts is what they get.
SHARED = (
    (re.compile(r"(.*\.self_attn)\.[qkv]"), r"\1"),
    (re.compile(r".*\.cross_attn\.[kv]"), "text"),
    (re.compile(r".*\.cross_attn\.[kv]_img"), "image"),
)
Say = Callable[[str], None]


@dataclass(frozen=True)
class Settings:
    """path: the file to write. add: go on with it if it exists. memory: bytes of main memory for
    the sums. rows: largest number of inputs counted at each call of the model. seed: which those
    are. say: shows a text to the user. shares: also measure the layers' shares of the output.
    calls: also keep a few calls for the quality check.
    """

    path: Path
    add: bool
    memory: int
    rows: int
    seed: int
    say: Say = field(default=lambda text: None)
    shares: bool = False
    calls: bool = True


def wrap(model: Any, settings: Settings) -> Any:
    """A clone of `model`, a ModelPatcher of a Wan model, whose runs are recorded."""
    if not isinstance(model.model, comfy.model_base.WAN21):
        raise FrugalError(
            f"a {type(model.model).__name__} model", "a Wan model", "connect a Wan model"
        )
    if KEY in model.wrappers.get(WrappersMP.OUTER_SAMPLE, {}):
        raise FrugalError("the model is recorded already", "one such node", "remove one of them")
    model = model.clone()
    capture = Capture(settings)
    model.add_wrapper_with_key(WrappersMP.OUTER_SAMPLE, KEY, capture.run)
    model.add_wrapper_with_key(WrappersMP.DIFFUSION_MODEL, KEY, capture.call)
    return model


class Capture:
    """The two wrappers. Between runs it holds nothing but the settings."""

    def __init__(self, settings: Settings):
        self.settings = settings
        self._recording: Recording | None = None

    def run(self, executor: Any, *args: Any, **kwargs: Any) -> Any:
        """An OUTER_SAMPLE wrapper: one recording for each run, no file if the run is cut short."""
        if self._recording is not None:
            return executor(*args, **kwargs)
        guider = executor.class_obj
        self._recording = Recording(guider.model_patcher, self.settings)
        try:
            out = executor(*args, **kwargs)
            text = self._recording.write()
        finally:
            self._recording = None
        LOG.info("[Frugal] %s", text)
        self.settings.say(text)
        return out

    def call(self, executor: Any, *args: Any, **kwargs: Any) -> Any:
        """A DIFFUSION_MODEL wrapper: looks on while the model computes once."""
        if self._recording is None:
            return executor(*args, **kwargs)
        self._recording.look(executor, args, kwargs)
        with self._recording.watching(executor.class_obj):
            return executor(*args, **kwargs)


class Recording:
    """What one run gathers."""

    def __init__(self, patcher: Any, settings: Settings):
        self.settings, self.device = settings, patcher.load_device
        self.model = _description(patcher)
        layers = linear_layers(patcher.model.diffusion_model)
        _refuse_compiled(patcher, patcher.model.diffusion_model)
        if settings.shares:
            model = patcher.model.diffusion_model
            shares.refuse(model, _computed_inside(model, layers))
        self.earlier = _earlier(settings, layers)
        self.shares: dict[str, float] = {}
        self._measuring = settings.shares
        self.keeper = None
        if settings.calls:
            self.keeper = Keeper(self.model, patcher.model.diffusion_model)
        self.columns = columns_within(list(_foreseen(layers).values()), settings.memory)
        self.directions = Directions(settings.seed)
        self.inputs: dict[str, int] = {}
        self.gatherers: dict[int, Gatherer] = {}
        self.owners: dict[int, str] = {}
        self.calls = self.parted = 0
        self.places = TokenPositions()
        self._lengths: dict[int, int] = {}
        self._began: dict[int, int] = {}
        self._known: dict[int, set[Any]] = {}
        self._lock = threading.Lock()

    def look(self, executor: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Keep this call, and measure the layers' shares with its inputs, if it is time for it."""
        options = options_of(args, kwargs)
        with self._lock:
            keep = self.keeper is not None and self.keeper.due(options)
            now = self._measuring and shares.due(options)
            self._measuring = self._measuring and not now
        if self.keeper is not None and keep:
            self.keeper.take(executor, args, kwargs)
        if now:
            layers = linear_layers(executor.class_obj)
            self.shares = shares.measure(executor, args, kwargs, layers, self.settings.seed)

    @contextmanager
    def watching(self, model: torch.nn.Module) -> Iterator[None]:
        """Hooks on the linear layers of `model`, for one call of it."""
        with self._lock:
            number, self.calls = self.calls, self.calls + 1
        seen = TokenSampler(number, self.settings.rows, self.settings.seed, self.places)
        handles = []
        layers = linear_layers(model)
        inside = _computed_inside(model, layers)
        try:
            for name, module in layers.items():
                if name in inside:
                    hook = self._after(seen, name)
                    handles.append(layers[inside[name]].register_forward_hook(hook))
                else:
                    handles.append(module.register_forward_pre_hook(self._before(seen, name)))
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _before(self, seen: TokenSampler, name: str) -> Callable[..., None]:
        def hook(module: torch.nn.Module, arguments: tuple[Any, ...]) -> None:
            self._record(seen, name, *seen.rows(arguments[0]))

        return hook

    def _after(self, seen: TokenSampler, name: str) -> Callable[..., None]:
        def hook(module: torch.nn.Module, arguments: tuple[Any, ...], out: torch.Tensor) -> None:
            rows, length = seen.rows(out)
            rows = torch.nn.functional.gelu(rows, approximate="tanh")
            self._record(seen, name, rows, length)

        return hook

    @torch.no_grad()
    def _record(self, seen: TokenSampler, name: str, rows: torch.Tensor, length: int) -> None:
        rows = distinct(rows)
        mark = mark_of(rows)
        with self._lock:
            index = self._input_of(seen, name, mark, rows.shape[1])
            seen.counted.setdefault(index, set()).add(mark)
            self._lengths[index] = max(length, self._lengths.get(index, 0))
            known = self._known[index]
            if mark not in known:
                known.add(mark)
                self.gatherers[index].add(rows)
            seen.called.add(name)

    def _input_of(self, seen: TokenSampler, name: str, mark: Any, width: int) -> int:
        """The number of the input that this layer gets, a new one where it gets one of its own."""
        index = self.inputs.get(name)
        if index is None:
            same = (i for i, marks in seen.counted.items() if mark in marks)
            index = next((i for i in same if self._began[i] == seen.number), None)
        elif name not in seen.called and mark not in seen.counted.get(index, {mark}):
            # It shared an input until now; the rows counted before stay with the others.
            index, self.parted = None, self.parted + 1
        if index is None:
            index = len(self.gatherers)
            self.gatherers[index] = Gatherer(width, self.columns, self.directions)
            self._began[index], self.owners[index] = seen.number, name
            self._known[index] = set()
        self.inputs[name] = index
        return index

    def write(self) -> str:
        """Solve the sketches and write the file; a text about it."""
        if not self.gatherers:
            raise FrugalError(
                "no call of the model was seen",
                "a sampler that runs the model",
                "connect the sampler to this node, without nodes in between that replace the model",
            )
        used = sorted({*self.inputs.values()})
        place = {index: number for number, index in enumerate(used)}
        progress = comfy.utils.ProgressBar(len(used))
        device = self.device if self.device.type == "cuda" else torch.device("cpu")
        moments = {}
        for index in used:
            found = self.gatherers.pop(index).moment(self.owners[index], device)
            alone = self.places.independent(self._lengths[index], found.rows)
            moments[place[index]] = replace(found, independent=alone)
            progress.update(1)
        inputs = {name: place[index] for name, index in self.inputs.items()}
        meta = {
            "runs": 1,
            "calls": self.calls,
            "rows_per_call": self.settings.rows,
            "seed": self.settings.seed,
            "columns": self.columns,
            "models": [self.model],
        }
        if self.earlier is not None:
            inputs, moments, meta = _joined(self.earlier, inputs, moments, meta)
        measured = Shares(self.shares, 1 if self.shares else 0)
        if self.earlier is not None:
            measured = self.earlier.shares.joined(measured)
        calls = self.keeper.calls if self.keeper is not None else []
        if self.earlier is not None:
            calls = joined(self.earlier.calls(), calls)
        self.settings.path.parent.mkdir(parents=True, exist_ok=True)
        write_calibration(self.settings.path, inputs, moments, meta, measured, calls)
        return self._text(inputs, moments, meta, len(calls))

    def _text(
        self, inputs: dict[str, int], moments: dict[int, Moment], meta: dict[str, Any], calls: int
    ) -> str:
        whole = sum(moment.factor is None for moment in moments.values())
        lines = [
            f"calibration {self.settings.path.name}: "
            f"{megabytes(self.settings.path.stat().st_size)}",
            f"{len(inputs)} layers with {len(moments)} different inputs, {whole} kept whole, "
            f"{len(moments) - whole} as {int(self.columns / 2)} directions",
            f"{meta['calls']} calls of the model in {meta['runs']} runs",
        ]
        fewest = min(moments.values(), key=lambda moment: moment.independent / moment.width)
        if fewest.independent < fewest.width:
            lines.append(
                f"note: some layers saw fewer rows ({fewest.independent}) than they have inputs "
                f"({fewest.width}); those are solved more conservatively"
            )
        if self.shares:
            lines.append(f"sensitivity measured for {len(self.shares)} layers")
        elif self.settings.shares:
            lines.append(
                "note: no call came in the second half of the run: sensitivity not measured"
            )
        if calls:
            lines.append(f"{calls} calls saved for the quality check")
        if self.keeper is not None and self.keeper.why_not:
            lines.append(f"note: no calls saved for the quality check: {self.keeper.why_not}")
        if self.parted:
            lines.append(f"note: {self.parted} layers stopped sharing an input during the run")
        return "\n".join(lines)


def linear_layers(model: torch.nn.Module) -> dict[str, Any]:
    """Canonical name -> linear layer of a diffusion model."""
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(getattr(module, "in_features", None), int)
        and isinstance(getattr(module, "out_features", None), int)
    }


def _computed_inside(model: torch.nn.Module, layers: dict[str, Any]) -> dict[str, str]:
    """Layers that ComfyUI computes without calling them (the int8 output layer of a feed-forward),
    with the layer whose output, through a tanh GELU, is their input.
    """
    found = {}
    for name, module in layers.items():
        kind = getattr(getattr(module, "weight", None), "_layout_cls", None)
        path, _, place = name.rpartition(".")
        if kind == "TensorWiseINT8Layout" and place == "2" and f"{path}.0" in layers:
            parent = model.get_submodule(path)
            if fuses(parent) and "forward" not in vars(parent):
                found[name] = f"{path}.0"
    return found


def _foreseen(layers: dict[str, Any]) -> dict[str, int]:
    """The inputs that these layers are expected to have, with their widths."""
    found = {}
    for name, module in layers.items():
        for pattern, label in SHARED:
            match = pattern.fullmatch(name)
            if match:
                found[match.expand(label)] = module.in_features
                break
        else:
            found[name] = module.in_features
    return found


def _description(patcher: Any) -> dict[str, Any]:
    report = patcher.get_attachment(REPORT_KEY)
    files = dict(report.files) if isinstance(report, LoadReport) else {}
    found = {"class": type(patcher.model).__name__, "files": files}
    return found | {"patched": len(patcher.patches), "side_loras": side_loras(patcher)}


def side_loras(patcher: Any) -> list[str]:
    """Names of the LoRAs that FrugalLoraSide put beside the layers."""
    return [lora.name for lora in patcher.get_attachment(SIDE_KEY) or ()]


def _refuse_compiled(patcher: Any, model: torch.nn.Module) -> None:
    compiled = COMPILE_KEY in patcher.wrappers.get(WrappersMP.APPLY_MODEL, {})
    if compiled or any(hasattr(module, "_orig_mod") for module in model.modules()):
        raise FrugalError(
            "the model is compiled", "one whose layers can be watched", "bypass the compile node"
        )


def _earlier(settings: Settings, layers: dict[str, Any]) -> Calibration | None:
    """The file to go on with; refused before the run if it is that of another model."""
    if not settings.add or not settings.path.exists():
        return None
    found = read_calibration(settings.path)
    wrong = [
        name
        for name, index in found.inputs.items()
        if name not in layers or layers[name].in_features != found.widths[index]
    ]
    if wrong:
        raise FrugalError(
            f"{settings.path.name} was recorded from another model ({wrong[0]})",
            "one of this model",
            "choose another name, or replace it",
        )
    return found


def _joined(
    earlier: Calibration, inputs: dict[str, int], moments: dict[int, Moment], meta: dict[str, Any]
) -> tuple[dict[str, int], dict[int, Moment], dict[str, Any]]:
    """Both recordings as one. Layers share an input where they did so in both."""
    pairs: dict[tuple[int | None, int | None], int] = {}
    names = {}
    for name in [*inputs, *(name for name in earlier.inputs if name not in inputs)]:
        pair = (earlier.inputs.get(name), inputs.get(name))
        names[name] = pairs.setdefault(pair, len(pairs))
    both = {}
    for (old, new), index in pairs.items():
        held = [earlier.moment(old)] if old is not None else []
        held += [moments[new]] if new is not None else []
        both[index] = merged(*held) if len(held) == 2 else held[0]
    before = earlier.meta
    joined = meta | {key: before.get(key, 0) + meta[key] for key in ("runs", "calls")}
    models = list(before.get("models", []))
    joined["models"] = models + [each for each in meta["models"] if each not in models]
    return names, both, joined
