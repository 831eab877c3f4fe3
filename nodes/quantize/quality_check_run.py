"""Makes the kept calls of a calibration again with any MODEL, and says what came of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import comfy.model_base
import comfy.model_management
import comfy.model_patcher
import comfy.sampler_helpers
import comfy.samplers
import comfy.utils
import torch
from comfy.patcher_extension import WrapperExecutor, WrappersMP

from ...kernels.errors import FrugalError
from ...kernels.quantize.calibration import Calibration, read_calibration
from ...kernels.quantize.model_error import ModelError, model_error
from ...kernels.quantize.quality import QualityReport, read_json, write_json
from ...kernels.quantize.reference_calls import ReferenceCall
from ...kernels.report import LoadReport
from .._comfy import REPORT_KEY, compute_dtype
from ..lora.unmerged_run import KEY as SIDE_KEY
from .calibrate_run import linear_layers, side_loras
from .cropped_calls import OPTIONS

EXTRAS = ("wrappers", "callbacks")


def check(
    patcher: Any, calibration: Path, quality: Path | None
) -> tuple[ModelError, QualityReport | None]:
    """Run `patcher`, a ModelPatcher of a Wan model, on the calls of a calibration file. With the
    quality file of the model the figures are also written into that, and the whole report comes
    back.

    Raises FrugalError for files without calls, and for a model or quality file of another model.
    """
    known = read_calibration(calibration)
    if not known.entries:
        raise FrugalError(
            f"{calibration.name} holds no calls of the model",
            "a file recorded with keep_calls on",
            "record it again with Calibrate Wan Model",
        )
    calls = known.calls()
    _refuse_other(patcher, known, calls)
    report = None if quality is None else read_json(quality)
    if report is not None:
        _refuse_other_report(patcher, report)
    found = model_error(calibration.name, calls, outputs(patcher, calls), _notes(patcher, calls))
    if report is not None and quality is not None:
        report = replace(report, end_to_end=found)
        write_json(report, quality)
    return found, report


@torch.no_grad()
def outputs(patcher: Any, calls: Sequence[ReferenceCall]) -> list[torch.Tensor]:
    """The model's output for each call, on the CPU. LoRAs act as while sampling, beside the layers
    too; other wrappers do not. Can be cancelled between calls.
    """
    beside = patcher.get_nested_additional_models()
    shape = max((call.arguments["x"].shape for call in calls), key=lambda shape: shape.numel())
    comfy.model_management.load_models_gpu(
        [patcher, *beside], memory_required=patcher.memory_required(list(shape))
    )
    settings = comfy.model_patcher.create_model_options_clone(patcher.model_options)
    device, model = patcher.load_device, patcher.model
    comfy.samplers.cast_to_load_options(settings, device=device, dtype=patcher.model_dtype())
    options = {k: v for k, v in settings.get(OPTIONS, {}).items() if k not in EXTRAS}
    loras = patcher.wrappers.get(WrappersMP.APPLY_MODEL, {}).get(SIDE_KEY, [])
    progress = comfy.utils.ProgressBar(len(calls))
    made = []
    try:
        patcher.pre_run()
        for call in calls:
            comfy.model_management.throw_exception_if_processing_interrupted()
            given = _on_device(call.arguments, device, compute_dtype(model))
            own = dict(options)
            if call.sigma is not None:
                own["sigmas"] = torch.tensor([call.sigma], device=device)

            def run(given: Any = given, own: Any = own) -> torch.Tensor:
                return model.diffusion_model(**given, **{OPTIONS: own})

            executor = WrapperExecutor.new_class_executor(run, model, list(loras))
            made.append(executor.execute().detach().cpu())
            progress.update(1)
    finally:
        patcher.cleanup()
        comfy.sampler_helpers.cleanup_additional_models(beside)
    return made


def _on_device(
    arguments: Mapping[str, Any], device: torch.device, dtype: torch.dtype
) -> dict[str, Any]:
    """As ComfyUI hands them to the diffusion model: all floats but times in the compute type."""

    def moved(name: str, value: Any) -> Any:
        if isinstance(value, list):
            return [moved(name, each) for each in value]
        if not isinstance(value, torch.Tensor):
            return value
        cast = value.is_floating_point() and name != "timestep"
        return value.to(device, dtype if cast else value.dtype)

    return {name: moved(name, value) for name, value in arguments.items()}


def _refuse_other(patcher: Any, known: Calibration, calls: Sequence[ReferenceCall]) -> None:
    """Raise FrugalError unless this model has the layers, widths and kind of the recorded one."""
    model, what = patcher.model, f"one recorded from the model in {known.path.name}"
    if not isinstance(model, comfy.model_base.WAN21):
        raise FrugalError(f"a {type(model).__name__} model", "a Wan model", "connect a Wan model")
    layers = linear_layers(model.diffusion_model)
    choose = "connect the quantised form of that model, or choose the calibration of this one"
    if any("_orig_mod" in name for name in layers):
        raise FrugalError("a compiled model", "one as it was loaded", "bypass the compile node")
    kinds = {call.model.get("class") for call in calls}
    if kinds != {type(model).__name__}:
        found = f"a {type(model).__name__}, not a {'/'.join(sorted(map(str, kinds)))}"
        raise FrugalError(found, what, choose)
    for name, index in known.inputs.items():
        width = known.widths[index]
        here = layers[name].in_features if name in layers else 0
        if here != width:
            raise FrugalError(f"a model with {here} inputs in {name}, not {width}", what, choose)
    channels = model.diffusion_model.patch_embedding.in_channels
    kept = {call.arguments["x"].shape[1] for call in calls}
    if kept != {channels}:
        raise FrugalError(f"a model of {channels} latent channels, not {kept.pop()}", what, choose)


def _refuse_other_report(patcher: Any, report: QualityReport) -> None:
    loaded = patcher.get_attachment(REPORT_KEY)
    if isinstance(loaded, LoadReport) and report.file not in loaded.files:
        raise FrugalError(
            f"the quality file of {report.file} and a model from {', '.join(loaded.files)}",
            "both of one file",
            "choose the quality file next to the model's own file",
        )


def _notes(patcher: Any, calls: Sequence[ReferenceCall]) -> list[str]:
    """What lies between the file and the figures."""
    notes = []
    if not isinstance(patcher.get_attachment(REPORT_KEY), LoadReport):
        notes.append("the loader does not say which file this model is from")
    files = dict.fromkeys(name for call in calls for name in call.model.get("files", ()))
    if files:
        notes.append(f"recorded from {', '.join(files)}")
    before = max(call.model.get("patched", 0) for call in calls)
    if patcher.patches or before:
        notes.append(
            f"{len(patcher.patches)} weights are changed on the model, by LoRAs for example; "
            f"{before} were when it was recorded"
        )
    mine, theirs = (
        sorted({name for names in lists for name in names})
        for lists in ([side_loras(patcher)], [call.model.get("side_loras", []) for call in calls])
    )
    if mine or theirs:
        told = [", ".join(names) or "none" for names in (mine, theirs)]
        notes.append(f"unmerged LoRAs: {told[0]}; when it was recorded: {told[1]}")
    if patcher.injections:
        notes.append(f"changed by {', '.join(map(str, patcher.injections))}")
    held = patcher.model_options.get(OPTIONS, {})
    for wrappers in (patcher.wrappers, held.get("wrappers", {})):
        skipped = [
            f"{kind} {key}"
            for kind, keys in wrappers.items()
            for key, functions in keys.items()
            if functions and (kind, key) != (WrappersMP.APPLY_MODEL, SIDE_KEY)
        ]
        if skipped:
            notes.append(f"wrappers that did not run here: {', '.join(skipped)}")
    active = [name for name, value in held.items() if value and name not in EXTRAS]
    if active:
        notes.append(f"options of the model that did act: {', '.join(map(str, active))}")
    return notes
