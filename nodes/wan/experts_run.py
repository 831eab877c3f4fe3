"""Two Wan experts behind one MODEL: the sampler's run is split where the noise level crosses the
boundary, and each part is an ordinary run of its own expert.

ComfyUI then loads, offloads and patches each expert as it does any model, and only one of them is
asked for at a time. Wan 2.2 (arXiv 2503.20314 and its release) switches at 0.875 (text to video)
and 0.9 (image to video) of the largest timestep; a flow model's sigma is that fraction.
"""

from __future__ import annotations

import copy
import uuid
from collections.abc import Callable
from types import FunctionType, MethodType
from typing import Any

import comfy.model_base
import comfy.samplers
import torch
from comfy.patcher_extension import WrappersMP

from ...kernels.errors import FrugalError
from ...kernels.log import LOG
from ...kernels.report import LoadReport
from .._comfy import EXPERTS_KEY, REPORT_KEY

KEY = EXPERTS_KEY
# Small parameters that no format quantises; two trainings never agree on all of them.
TELLING = ("modulation", "bias", "norm_q.weight", "norm_k.weight")
# Settings of a model that say nothing about its weights, so both experts can take them.
SHARED_OPTIONS = (
    "sampler_cfg_function",
    "sampler_post_cfg_function",
    "sampler_pre_cfg_function",
    "disable_cfg1_optimization",
    "transformer_options.optimized_attention_override",
)


def join(high: Any, low: Any, boundary: float, cfg_low: float) -> tuple[Any, str]:
    """One ModelPatcher from two, and a text about it.

    high, low: ModelPatchers of the same Wan variant with different weights or patches. boundary:
    sigma in 0..1; steps at or above it belong to `high`. cfg_low: guidance for the steps below it,
    0 for the sampler's own. Raises FrugalError if the two do not make a pair.
    """
    _check_pair(high, low)
    model = _joined(high, low, boundary, cfg_low)
    switch = 1000 * boundary
    text = f"high noise: timesteps {switch:g} to 1000, low noise: below {switch:g}"
    reports = [each.get_attachment(REPORT_KEY) for each in (high, low)]
    if all(isinstance(report, LoadReport) for report in reports):
        both = _joined_report(*reports, note=text)
        model.set_attachments(REPORT_KEY, both)
        text = both.text()
    return model, text


def _joined(high: Any, low: Any, boundary: float, cfg_low: float) -> Any:
    model = high.clone()
    model.add_wrapper_with_key(
        WrappersMP.OUTER_SAMPLE, KEY, ExpertSwitch(high.clone(), low.clone(), boundary, cfg_low)
    )
    return model


def high_steps(sigmas: torch.Tensor, boundary: float) -> int:
    """Number of steps that start at or above the boundary. sigmas [steps + 1], falling.

    Raises FrugalError if the noise rises over the boundary again.
    """
    above = (sigmas[:-1] >= boundary).tolist()
    count = sum(above)
    if not all(above[:count]):
        raise FrugalError(
            f"the noise rises over {boundary:g} again at step {above.index(False) + 2}",
            "noise levels that fall",
            "use another scheduler, or a sampler for each expert",
        )
    return count


class ExpertSwitch:
    """An OUTER_SAMPLE wrapper. `high` and `low` are snapshots of the two experts."""

    def __init__(self, high: Any, low: Any, boundary: float, cfg_low: float):
        self.high, self.low, self.boundary, self.cfg_low = high, low, boundary, cfg_low

    def changed(self, model: Any, change: Callable[[Any], Any]) -> Any:
        """The MODEL with this switch, both of its experts changed by `change`, as if that had
        been done before they were joined.
        """
        low = _with_changes(self.low, self.high, model)
        high = model.clone()
        high.remove_wrappers_with_key(WrappersMP.OUTER_SAMPLE, KEY)
        return _joined(change(high), change(low), self.boundary, self.cfg_low)

    def __call__(
        self, executor, noise, latent, sampler, sigmas, mask=None, callback=None,
        disable_pbar=False, seed=None, **more,
    ):  # fmt: skip
        """Arguments and result of CFGGuider.outer_sample: latents [B, 16, T, H, W], sigmas
        [steps + 1].
        """
        guider, steps = executor.class_obj, len(sigmas) - 1
        count = high_steps(sigmas, self.boundary)
        LOG.info("[Frugal] %d steps with the high noise expert, %d low", count, steps - count)
        if count == steps:
            return executor(
                noise, latent, sampler, sigmas, mask, callback, disable_pbar, seed, **more
            )
        if count and mask is not None:
            raise FrugalError(
                f"the latent has a noise mask and the switch comes after step {count} of {steps}",
                "a latent without a mask",
                "remove the mask (Wan takes start images through its conditioning)",
            )
        if len(more.get("latent_shapes") or ()) > 1:
            raise FrugalError("the latent has several parts", "one", "use a Wan latent")
        second = self._low_guider(guider)
        if count:
            latent = executor(
                noise, latent, sampler, sigmas[: count + 1], mask,
                _shifted(callback, 0, steps), disable_pbar, seed, **more,
            )  # fmt: skip
            # The noise left in the latent is the noise; a second run of the same random numbers
            # would be correlated with the first in samplers that add noise.
            noise = torch.zeros_like(noise)
            seed = None if seed is None else seed + 1
        return second.sample(
            noise, latent, sampler, sigmas[count:], mask,
            _shifted(callback, count, steps), disable_pbar, seed,
        )  # fmt: skip

    def _low_guider(self, guider: Any) -> Any:
        """The guider of this run with the low noise expert in the place of the other."""
        low = _with_changes(self.low, self.high, guider.model_patcher)
        if _is_dynamic(low) and not _is_dynamic(guider.model_patcher):
            low = low.get_non_dynamic_delegate()
        second = copy.copy(guider)
        second.model_patcher, second.model_options = low, low.model_options
        if self.cfg_low:
            own = type(guider).set_cfg is comfy.samplers.CFGGuider.set_cfg
            if not own or "negative" not in guider.original_conds:
                raise FrugalError(
                    f"cfg_low_noise {self.cfg_low:g} with {type(guider).__name__}",
                    "a sampler with one cfg, a positive and a negative prompt",
                    "set cfg_low_noise to 0",
                )
            second.set_cfg(self.cfg_low)
        return second


def _shifted(callback: Any, first: int, total: int) -> Any:
    if callback is None:
        return None
    return lambda step, x0, x, _: callback(first + step, x0, x, total)


def _is_dynamic(patcher: Any) -> bool:
    return hasattr(patcher, "is_dynamic") and patcher.is_dynamic()


def _check_pair(high: Any, low: Any) -> None:
    for name, patcher in (("high_noise", high), ("low_noise", low)):
        if not isinstance(patcher.model, comfy.model_base.WAN21):
            raise FrugalError(
                f"{name} is a {type(patcher.model).__name__}", "a Wan model", "connect a Wan expert"
            )
        if KEY in patcher.wrappers.get(WrappersMP.OUTER_SAMPLE, {}):
            raise FrugalError(f"{name} is a pair", "a single expert", "connect the expert itself")
    configs = [_configuration(patcher) for patcher in (high, low)]
    if configs[0] != configs[1]:
        keys = sorted(
            key for key in {*configs[0], *configs[1]} if configs[0].get(key) != configs[1].get(key)
        )
        values = " and ".join(str(config.get(keys[0])) for config in configs)
        raise FrugalError(
            f"the two experts differ in {keys[0]} ({values})",
            "two models of the same variant and size",
            "choose both files of one pair",
        )
    if high.load_device != low.load_device:
        raise FrugalError(
            f"the experts are on {high.load_device} and {low.load_device}",
            "one device",
            "load both on the same device",
        )
    same = high.patches_uuid == low.patches_uuid or not (high.patches or low.patches)
    if same and _same_weights(high.model.diffusion_model, low.model.diffusion_model):
        raise FrugalError(
            "high_noise and low_noise hold the same weights",
            "two different experts",
            "choose the other file of the pair for one of them",
        )
    names = [_file_names(patcher) for patcher in (high, low)]
    swapped = _says(names[0], "low", "high") and _says(names[1], "high", "low")
    # diffusers keeps the expert for the low noise in transformer_2.
    folders = ["transformer_2/" in name for name in names]
    if swapped or (folders == [True, False] and "transformer/" in names[1]):
        raise FrugalError(
            f"high_noise comes from {names[0]} and low_noise from {names[1]}",
            "the high noise expert first",
            "swap the two",
        )


def _configuration(patcher: Any) -> dict[str, Any]:
    config = {k: v for k, v in patcher.model.model_config.unet_config.items() if k != "dtype"}
    return config | {"class": type(patcher.model).__name__}


def _same_weights(one: torch.nn.Module, other: torch.nn.Module) -> bool:
    if one is other:
        return True
    theirs = dict(other.named_parameters())
    return all(
        torch.equal(value.float().cpu(), theirs[name].float().cpu())
        for name, value in one.named_parameters()
        if name.endswith(TELLING)
    )


def _file_names(patcher: Any) -> str:
    report = patcher.get_attachment(REPORT_KEY)
    if not isinstance(report, LoadReport):
        return ""
    return ", ".join(f"{report.folder}/{name}" for name in report.files)


def _says(names: str, word: str, other: str) -> bool:
    return word in names.lower() and other not in names.lower()


def _joined_report(high: LoadReport, low: LoadReport, note: str) -> LoadReport:
    formats = dict(high.formats)
    for name, size in low.formats.items():
        formats[name] = formats.get(name, 0) + size
    # Both files of a pair may have one name, in two folders.
    files = {
        f"{which} noise {report.folder}/{name}": size
        for which, report in (("high", high), ("low", low))
        for name, size in report.files.items()
    }
    return LoadReport(
        f"two experts: {high.title}",
        files,
        formats,
        high.seconds + low.seconds,
        (*dict.fromkeys((*high.notes, *low.notes)), note),
        high.licence or low.licence,
    )


def _with_changes(low: Any, high: Any, run: Any) -> Any:
    """A clone of `low` that has what was put on `run`, the MODEL in use, since it was `high`.

    LoRA weights, object patches outside the network and SHARED_OPTIONS go to both experts; anything
    else may be bound to the weights of one, and raises FrugalError.
    """
    _refuse_bound_changes(high, run)
    low = low.clone()
    for name, value in run.object_patches.items():
        if value is not high.object_patches.get(name):
            low.add_object_patch(name, value)
    before = _leaves(high.model_options)
    for option, value in _leaves(run.model_options).items():
        if not _same_option(before.get(option), value):
            holder, _, suffix = option.rpartition(".")
            target = low.model_options.setdefault(holder, {}) if holder else low.model_options
            target[suffix] = value
    new = {
        key: entries[len(high.patches.get(key, ())) :]
        for key, entries in run.patches.items()
        if len(entries) > len(high.patches.get(key, ()))
    }
    if new:
        for key, entries in new.items():
            low.patches[key] = [*low.patches.get(key, ()), *entries]
        # The same patches give the same mark, so that ComfyUI need not load the weights again.
        low.patches_uuid = uuid.uuid5(low.patches_uuid, str(run.patches_uuid))
    return low


def _refuse_bound_changes(high: Any, run: Any) -> None:
    found = []
    for key, entries in high.patches.items():
        kept = run.patches.get(key, ())[: len(entries)]
        if [id(entry) for entry in kept] != [id(entry) for entry in entries]:
            found.append(f"a replaced weight patch of {key}")
    for name, value in run.object_patches.items():
        if name.startswith("diffusion_model") and value is not high.object_patches.get(name):
            found.append(f"a patch of {name}")
    for kind in ("wrappers", "callbacks"):
        for place, keyed in getattr(run, kind).items():
            before = getattr(high, kind).get(place, {})
            found += [
                f"a wrapper '{key}' at {place}"
                for key, entries in keyed.items()
                if key != KEY and entries != before.get(key, [])
            ]
    # Weight hooks are not among them: they come with a prompt, and each run registers them again.
    for kind in ("injections", "additional_models", "weight_wrapper_patches"):
        before = getattr(high, kind, {})
        found += [f"{kind} '{key}'" for key in getattr(run, kind, {}) if key not in before]
    before = _leaves(high.model_options)
    for path, value in _leaves(run.model_options).items():
        if path not in SHARED_OPTIONS and not _same_option(before.get(path), value):
            found.append(f"the model option {path}")
    if found:
        raise FrugalError(
            f"{found[0]} was put on the joined model",
            "such a change on each expert",
            "connect that node before the two are joined",
        )


def _leaves(options: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in options.items():
        if isinstance(value, dict):
            found |= _leaves(value, f"{prefix}{key}.")
        else:
            found[f"{prefix}{key}"] = value
    return found


def _same_option(before: Any, now: Any) -> bool:
    if type(before) is not type(now):
        return False
    if isinstance(now, (list, tuple)):
        return len(before) == len(now) and all(map(_same_option, before, now))
    if isinstance(now, MethodType):
        return before.__func__ is now.__func__
    # Old versions copy other objects, though not functions, when they clone a model.
    plain = (FunctionType, bool, int, float, str, torch.dtype, torch.device)
    return before == now if isinstance(now, plain) else True
