"""Our attention behind a MODEL: ComfyUI's override of it, and the state of each sampling run.

The override itself holds no state, because clones of a model share it; what a run learns lives in
the options of that run and goes with it. Choices that were measured are kept in the user's folder.
"""

from __future__ import annotations

import functools
import uuid
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import comfy.ldm.modules.attention
import folder_paths
import torch
from comfy.patcher_extension import WrappersMP, add_wrapper_with_key

from ...kernels.attention import AUTO, KernelSelector, attention, tuning_cache
from ...kernels.attention.backends import BACKENDS
from ...kernels.attention.call import belong, device_kind
from ...kernels.attention.call_report import Table, table
from ...kernels.attention.selector import absences, check_choice
from ...kernels.errors import FrugalError
from ...kernels.log import LOG
from .._comfy import (
    ATTENTION_KEY,
    ATTENTION_OVERRIDE,
    CAUSAL_RUN_KEY,
    for_each_expert,
    show_text,
)

KEY = ATTENTION_KEY
CHOICES = (AUTO, *(each.name for each in BACKENDS))


class LastRun:
    """Hands the table of the latest run to whoever has the model; None before the first."""

    def __init__(self) -> None:
        self.table: Table | None = None


class Run:
    """One sampling run: its selector, and whether 8-bit kernels may be used at the present step."""

    def __init__(self, kernel_selector: KernelSelector, allowed: list[bool]):
        self.kernel_selector, self.allowed = kernel_selector, allowed
        self.lossy = allowed[0] if allowed else False

    def step_done(self, step: int) -> None:
        if step + 1 < len(self.allowed):
            self.lossy = self.allowed[step + 1]


@for_each_expert
def apply(
    model: Any,
    choice: str = AUTO,
    allow_8bit: bool = False,
    start: float = 0.0,
    end: float = 1.0,
    node_id: str | None = None,
) -> Any:
    """A clone of a ModelPatcher whose attention is computed by the chosen kernel.

    choice: "auto" measures on the first call of a shape, or the name of a backend. allow_8bit: let
    8-bit kernels take part in long self-attention, from `start` to `end` of the schedule (0..1).
    node_id: where the table is shown after a run. Raises FrugalError if there is no such kernel on
    this machine, or if it computes in 8 bits and that is not allowed.

    An override already on the model stays: it gets what a named kernel declines, and with "auto"
    every call, each time with our attention in the place of ComfyUI's own.
    """
    kind = device_kind(torch.device(model.load_device))
    if choice != AUTO:
        named = {each.name: each for each in BACKENDS}
        check_choice(choice, named, absences(BACKENDS, kind))
        if not (allow_8bit or named[choice].exact):
            raise FrugalError(
                f"attention kernel {choice} computes in 8 bits and allow_8bit is off",
                "an exact kernel, or 8 bits allowed",
                "turn allow_8bit on, or choose another kernel",
            )
    clone = model.clone()
    options = clone.model_options.setdefault("transformer_options", {})
    token = uuid.uuid4().hex
    options[ATTENTION_OVERRIDE] = make_override(token, options.get(ATTENTION_OVERRIDE))
    last = LastRun()
    clone.set_attachments(KEY, last)
    clone.add_wrapper_with_key(
        WrappersMP.OUTER_SAMPLE,
        KEY,
        run_wrapper(token, choice, allow_8bit, (start, end), last, node_id),
    )
    return clone


def survey(model: Any) -> str:
    """Which kernels could be used on the model's device, and why not the others, as text."""
    kind = device_kind(torch.device(model.load_device))
    absent = absences(BACKENDS, kind)
    here = ", ".join(each.name for each in BACKENDS if each.name not in absent)
    reasons: dict[str, list[str]] = {}
    for name, why in absent.items():
        reasons.setdefault(why, []).append(name)
    lines = [f"kernels for {kind}: {here}"]
    return "\n".join([*lines, *(f"{', '.join(n)}: {why}" for why, n in reasons.items())])


def choices_file() -> Path:
    """Where measured choices are kept between runs and restarts."""
    return Path(folder_paths.get_user_directory()) / "frugal" / "attention.json"


def run_wrapper(
    token: str,
    choice: str,
    allow_8bit: bool,
    span: tuple[float, float],
    last: LastRun,
    node_id: str | None,
) -> Callable[..., Any]:
    """An OUTER_SAMPLE wrapper that makes a `Run`, takes it away again, and shows its table."""

    def wrapper(
        executor, noise, latent, sampler, sigmas, mask=None, callback=None,
        disable_pbar=False, seed=None, **more,
    ):  # fmt: skip
        guider = executor.class_obj
        patcher = guider.model_patcher
        kernel_selector = KernelSelector(
            torch.device(patcher.load_device),
            choice,
            allow_8bit,
            decisions=tuning_cache.load(choices_file()),
            default_name=getattr(comfy.ldm.modules.attention.optimized_attention, "__name__", ""),
        )
        run = Run(kernel_selector, allowed_steps(patcher, sigmas, span) if allow_8bit else [])

        def count(step, x0, x, total):
            run.step_done(step)
            if callback is not None:
                callback(step, x0, x, total)

        runs = guider.model_options["transformer_options"].setdefault(KEY, {})
        runs[token] = run
        finite = partial(_finite, kernel_selector)
        add_wrapper_with_key(
            WrappersMP.CALC_COND_BATCH, token, finite, guider.model_options, is_model_options=True
        )
        try:
            return executor(noise, latent, sampler, sigmas, mask, count, disable_pbar, seed, **more)
        finally:
            del runs[token]
            wrappers = guider.model_options["transformer_options"]["wrappers"]
            wrappers[WrappersMP.CALC_COND_BATCH].pop(token, None)
            last.table = table(kernel_selector)
            keep(kernel_selector)
            show_text(node_id, last.table.text())
            LOG.info("[Frugal] %s", last.table.text().replace("\n", "; "))

    return wrapper


def _finite(kernel_selector: KernelSelector, executor, model, conds, x, timestep, model_options):
    """A CALC_COND_BATCH wrapper: a step that a kernel spoilt is computed again without it.

    Kernels are checked once, on the first call of a shape. Those that sum in few bits overflow only
    where values are large, in later layers or with another model.
    """
    arguments = (model, conds, x, timestep, model_options)
    outputs = executor(*arguments)
    if not kernel_selector.used or torch.is_grad_enabled() or _all_finite(outputs):
        return outputs
    if not _all_finite([x]):
        return outputs
    names = kernel_selector.distrust("gave NaN or infinite values")
    named = ", ".join(names)
    if CAUSAL_RUN_KEY in model_options.get("transformer_options", {}):
        raise FrugalError(
            f"a step of a causal model has NaN or infinite values, by the attention kernel {named}",
            "finite numbers",
            "choose another kernel in the Attention node, or remove the node",
        )
    LOG.warning("[Frugal] attention: %s gave NaN or infinite values, step repeated without", named)
    repeated = executor(*arguments)
    if not _all_finite(repeated):
        # Not the kernels' fault, then.
        LOG.warning("[Frugal] attention: the model gives NaN or infinite values without them too")
        for name in names:
            del kernel_selector.broken[name]
    return repeated


def _all_finite(tensors: Sequence[torch.Tensor]) -> bool:
    return bool(torch.stack([each.isfinite().all() for each in tensors]).all())


def keep(kernel_selector: KernelSelector) -> None:
    """Write down what was measured; a folder that cannot be written costs only the next time."""
    lasting = kernel_selector.lasting()
    if not lasting:
        return
    try:
        tuning_cache.save(choices_file(), lasting)
    except OSError as error:
        LOG.warning("[Frugal] attention: the measured choices were not kept: %s", error)


def allowed_steps(patcher: Any, sigmas: torch.Tensor, span: tuple[float, float]) -> list[bool]:
    """Per step whether its noise level lies in the span of the schedule (0..1, start to end)."""
    levels = patcher.get_model_object("model_sampling")
    first, final = (levels.percent_to_sigma(each) for each in span)
    return [final <= level <= first for level in sigmas[:-1].tolist()]


def make_override(token: str, earlier: Callable[..., Any] | None) -> Callable[..., Any]:
    """The override of one node; `earlier` is the one that was there before it."""

    def ours(
        func, q, k, v, heads, mask=None, attn_precision=None,
        skip_reshape=False, skip_output_reshape=False, chained=False, **more,
    ):  # fmt: skip
        out = None
        split = (q, k, v) if skip_reshape else split_heads(q, k, v, heads, more)
        if split is not None and belong(*split):
            exact = attn_precision == torch.float32 or not more.get("low_precision_attention", True)
            options = more.get("transformer_options") or {}
            run = options.get(KEY, {}).get(token)
            if run is not None:
                same = split[0].shape[2] == split[1].shape[2]
                out = run.kernel_selector.attend(
                    *split,
                    mask,
                    more.get("scale"),
                    lossy=run.lossy and same and not exact,
                    default=as_run(func, attn_precision, skip_reshape, more),
                    chained=chained,
                )
            elif not chained:
                # Called outside a sampling run: nothing is measured, nothing is kept.
                out = attention(*split, mask, more.get("scale"))
        if out is not None:
            return out if skip_output_reshape else out.transpose(1, 2).flatten(2)
        given = {
            "mask": mask,
            "attn_precision": attn_precision,
            "skip_reshape": skip_reshape,
            "skip_output_reshape": skip_output_reshape,
        }
        if chained:
            return earlier(functools.partial(ours, func), q, k, v, heads, **given, **more)
        return func(q, k, v, heads, **given, **more)

    return ours if earlier is None else functools.partial(ours, chained=True)


def split_heads(q, k, v, heads: int, more: dict[str, Any]):
    """(B, L, H * D) -> (B, H, L, D) as views, fewer key heads where the call says so, or None where
    the widths do not divide.
    """
    width, rest = divmod(q.shape[-1], heads)
    kv_heads = k.shape[-1] // max(width, 1) if more.get("enable_gqa") else heads
    if rest or not kv_heads or k.shape[-1] != kv_heads * width or v.shape[-1] % kv_heads:
        return None
    return tuple(
        each.unflatten(2, (count, each.shape[2] // count)).transpose(1, 2)
        for each, count in ((q, heads), (k, kv_heads), (v, kv_heads))
    )


def as_run(
    func: Callable[..., Any], attn_precision: Any, skip_reshape: bool, more: dict[str, Any]
) -> Callable[..., Any]:
    """ComfyUI's own attention function in the form in which kernels are measured; it is called in
    the layout of the real call, since its speed depends on that.
    """

    def run(q, k, v, mask, scale):
        heads = q.shape[1]
        if not skip_reshape:
            q, k, v = (each.transpose(1, 2).flatten(2) for each in (q, k, v))
        return func(
            q, k, v, heads, mask=mask, attn_precision=attn_precision,
            skip_reshape=skip_reshape, skip_output_reshape=True, **more,
        )  # fmt: skip

    return run
