"""The constant part of Wan's cross-attention, computed once per prompt of a run.

K and V of the text (and of the start image) depend on the prompt and the weights alone: not on the
noise, the step or the frames. While ComfyUI applies the model, the layers that make them have a
forward of their own, which gives back what they made of the same input before. It sits on the
layers and not on the attention around them, so whatever else changes that attention (NAG, other
attention functions, block replacements) is met with the very tensors it would have computed.
Before and after a call nothing of the model is different; what is kept lives as long as the run.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import MethodType
from typing import Any

import comfy.model_base
import comfy.model_management
import torch
from comfy.patcher_extension import WrappersMP, add_wrapper_with_key

from ...kernels.device_types import need_float8
from ...kernels.errors import FrugalError
from ...kernels.log import LOG
from ...kernels.memory.cross_kv_report import ContextPlan, ContextReport
from ...kernels.memory.projected_rows import keep
from ...kernels.memory.prompt_table import Context, Contexts
from .._comfy import CONTEXT_KEY, compute_dtype, for_each_expert

KEY = CONTEXT_KEY
# Tensors that a call holds on to, so that it knows them again; a stock model has 2.
HELD = 8
TEXT, IMAGE = ("k", "v"), ("k_img", "v_img")


@dataclass(frozen=True)
class Options:
    """fp8: keep in 1 byte per value. limit: contexts of text, and of images, per run. release:
    move the weights out of the device's memory once they are of no more use.
    """

    fp8: bool = False
    limit: int = 8
    release: bool = True


def apply(model: Any, options: Options, show: Callable[[ContextReport], None]) -> Any:
    """(clone of the ModelPatcher `model`, ContextPlan). `show` gets each run's report; raises
    FrugalError for anything but a Wan model.
    """
    return _apply(model, options, show), plan(model, options)


@for_each_expert
def _apply(model: Any, options: Options, show: Callable[[ContextReport], None]) -> Any:
    planned = plan(model, options)
    model = model.clone()
    model.remove_wrappers_with_key(WrappersMP.SAMPLER_SAMPLE, KEY)
    model.add_wrapper_with_key(WrappersMP.SAMPLER_SAMPLE, KEY, _each_run(options, show))
    model.set_attachments(KEY, planned)
    return model


def projections(network: torch.nn.Module) -> dict[str, torch.nn.Module]:
    """Path -> layer that makes a K or V of the text or the image."""
    found = {}
    for path, module in network.named_modules():
        # torch.compile puts a module of this name around those that it compiles.
        names = [name for name in path.split(".") if name != "_orig_mod"]
        # The network itself has no name left where it is compiled as a whole.
        if names and names[-1] in TEXT + IMAGE and "cross_attn" in names[-2:-1]:
            found[".".join(names)] = module
    return found


def plan(model: Any, options: Options) -> ContextPlan:
    """What a run with `options` will save and keep; see ContextPlan."""
    network = model.model.diffusion_model
    layers = projections(network)
    if not (isinstance(model.model, comfy.model_base.WAN21) and layers):
        raise FrugalError(
            f"the model is a {type(model.model).__name__}",
            "a Wan model, with cross-attention to a text",
            "connect a Wan model, or remove this node",
        )
    if options.fp8:
        what = "what is kept is to be in fp8"
        need_float8(torch.device(model.load_device), what, "set kv_dtype to 'as computed'")
    size = comfy.model_management.module_size
    itemsize = 1 if options.fp8 else compute_dtype(model.model).itemsize
    rows = {TEXT: 0, IMAGE: 0}
    for path, layer in layers.items():
        rows[_kind(path)] += layer.out_features * itemsize + (4 if options.fp8 else 0)
    return ContextPlan(
        len(layers),
        sum(map(size, layers.values())),
        sum(size(getattr(network, name)) for name in {path.partition(".")[0] for path in layers}),
        rows[TEXT],
        rows[IMAGE],
    )


def _kind(path: str) -> tuple[str, str]:
    return IMAGE if path.rpartition(".")[2] in IMAGE else TEXT


def _each_run(options: Options, show: Callable[[ContextReport], None]) -> Callable[..., Any]:
    """A SAMPLER_SAMPLE wrapper: what is kept is made when the steps start and gone when they end,
    are cancelled or fail.
    """

    def wrapper(executor, guider, sigmas, extra_args, *args, **kwargs):
        run = _Run(options)
        # The sampler's own copy for this run, and the last of its wrappers: it then sees what the
        # layers are under all the others, unmerged LoRAs included.
        options_of_run = extra_args["model_options"].setdefault("transformer_options", {})
        add_wrapper_with_key(WrappersMP.APPLY_MODEL, KEY, run, options_of_run)
        try:
            result = executor(guider, sigmas, extra_args, *args, **kwargs)
            show(run.report())
            return result
        finally:
            options_of_run["wrappers"][WrappersMP.APPLY_MODEL].pop(KEY, None)
            run.caches.clear()

    return wrapper


class _Run:
    """An APPLY_MODEL wrapper, with one cache per copy of the model that the run uses."""

    def __init__(self, options: Options):
        self.options = options
        self.caches: dict[torch.nn.Module, _Cache] = {}
        self.calls = 0

    def __call__(
        self, executor, x, t, c_concat=None, c_crossattn=None, control=None,
        transformer_options=None, **kwargs,
    ):  # fmt: skip
        transformer_options = {} if transformer_options is None else transformer_options
        model = executor.class_obj
        cache = self.caches.get(model)
        if cache is None:
            cache = self.caches[model] = _Cache(model, self.options)
        # ComfyUI joins lists of wrappers, so one can come twice. Training needs the graph of
        # every step.
        if cache.active or torch.is_grad_enabled() or model.current_patcher is None:
            return executor(x, t, c_concat, c_crossattn, control, transformer_options, **kwargs)
        self.calls += 1
        replaced = bool(transformer_options.get("patches_replace", {}).get("dit"))
        with cache.installed(_weights_state(model.current_patcher), replaced):
            result = executor(x, t, c_concat, c_crossattn, control, transformer_options, **kwargs)
        cache.after_call(model.current_patcher)
        return result

    def report(self) -> ContextReport:
        caches = list(self.caches.values())
        tables = [table for cache in caches for table in cache.tables.values()]
        return ContextReport(
            self.calls,
            sum(cache.computed for cache in caches),
            sum(cache.reused for cache in caches),
            sum(map(len, tables)),
            sum(table.nbytes for table in tables),
            sum(table.dropped for table in tables),
            sum(cache.released for cache in caches),
            tuple(note for cache in caches for note in cache.notes()),
        )


def _weights_state(patcher: Any) -> Hashable:
    """Whatever decides the weights of this call: LoRAs by ComfyUI's own mark, and the weight hooks
    of the prompt at their strength of this step.
    """
    hooks = patcher.current_hooks.hooks if patcher.current_hooks else ()
    strengths = (getattr(hook, "strength_model", hook.strength) for hook in hooks)
    return (
        patcher.patches_uuid,
        tuple(zip((hook.hook_ref for hook in hooks), strengths, strict=True)),
    )


class _Cache:
    """One model's layers and what they made. `active` while a call of the model runs."""

    def __init__(self, model: Any, options: Options):
        self.options = options
        self.layers = projections(model.diffusion_model)
        self.tables = {kind: Contexts(options.limit) for kind in (TEXT, IMAGE)}
        self.computed = self.reused = self.released = 0
        self.active = self._settled = False
        self._computed_before = 0
        self._left_alone: dict[str, str] = {}
        self._inner: dict[torch.nn.Module, Callable[..., Any]] = {}
        self._seen: dict[Hashable, tuple[torch.Tensor, Context]] = {}
        self._state: Hashable = None
        self._replaced = False
        # One function per layer for all steps, or torch.compile would compile at each.
        self._forwards = {
            path: MethodType(torch.compiler.disable(self._forward(_kind(path))), layer)
            for path, layer in self.layers.items()
        }

    @contextmanager
    def installed(self, state: Hashable, replaced: bool) -> Iterator[None]:
        """The layers with their forwards. state: of the weights. replaced: some node runs blocks
        itself and may change the context on the way.
        """
        changed: list[tuple[torch.nn.Module, Any]] = []
        self._state, self._replaced = state, replaced
        self._computed_before = self.computed
        self.active = True
        try:
            for path, layer in self.layers.items():
                before = layer.__dict__.get("forward")
                reason = _varies(layer, before)
                if reason:
                    self._left_alone[path] = reason
                    continue
                self._inner[layer] = before or MethodType(type(layer).forward, layer)
                changed.append((layer, before))
                layer.forward = self._forwards[path]
            yield
        finally:
            for layer, before in changed:
                if before is None:
                    del layer.forward
                else:
                    layer.forward = before
            self._seen.clear()
            self._inner.clear()
            self.active = False

    def _forward(self, kind: tuple[str, str]) -> Callable[..., Any]:
        def forward(layer, x, *args, **kwargs):
            compute = self._inner[layer]
            if args or kwargs or x.dim() != 3:
                return compute(x, *args, **kwargs)
            context = self._context(x, kind)
            kept = context.values.get(layer)
            if kept is not None:
                self.reused += 1
                return kept.tensor()
            self.computed += 1
            out = compute(x)
            kept = context.values[layer] = keep(out, context.repeats, self.options.fp8)
            # In fp8 the first step must not differ from the others.
            return kept.tensor() if self.options.fp8 else out

        return forward

    def _context(self, x: torch.Tensor, kind: tuple[str, str]) -> Context:
        """All layers of a call are given one tensor, or equal views of it: its content is compared
        for the first of them, for each wait for the device would hold up the next weights.
        """
        if self._replaced:
            return self.tables[kind].of(x, self._state)
        version = 0 if x.is_inference() else x._version
        place = (kind, x.data_ptr(), x.shape, x.stride(), x.dtype, version)
        if place not in self._seen:
            while len(self._seen) >= HELD:
                del self._seen[next(iter(self._seen))]
            # The tensor is kept with its place, so that no other can come to lie there.
            self._seen[place] = (x, self.tables[kind].of(x, self._state))
        return self._seen[place][1]

    def after_call(self, patcher: Any) -> None:
        """Let the weights go after the first call that needed none of them."""
        if self._settled or self.computed > self._computed_before:
            return
        self._settled = True
        if self.options.release and leaves_device(patcher):
            self.released = release(patcher, list(self.layers.values()))

    def notes(self) -> list[str]:
        reasons: dict[str, list[str]] = {}
        for path, reason in self._left_alone.items():
            reasons.setdefault(reason, []).append(path)
        return [
            f"{len(paths)} layers are computed in every step, {paths[0]} among them: {reason}"
            for reason, paths in reasons.items()
        ]


def _varies(layer: torch.nn.Module, before: Any) -> str:
    """Why this layer may make something else of the same input in another step; "" if it may not.

    A weight function that is not one of ComfyUI's LoRA patches, or a forward of unknown make, can
    hold a strength that changes over the steps.
    """
    for name in ("weight_function", "bias_function"):
        for function in getattr(layer, name, None) or ():
            if not hasattr(function, "patches"):
                return "another node changes their weights as they are used"
    plain = before is None or getattr(before, "__func__", None) is type(layer).forward
    # Unmerged LoRAs keep one strength for a run: this pack's, and ComfyUI's own.
    beside = hasattr(before, "entries")
    bypass = type(getattr(before, "__self__", None)).__module__.startswith("comfy.weight_adapter")
    return "" if plain or beside or bypass else "another node changed how they compute"


def leaves_device(patcher: Any) -> bool:
    """Whether there is memory to win by moving weights away, and no other has to do it.

    Dynamic memory loads weights as they are used and lets go of any that it has no room for. A
    weight hook keeps copies of weights by itself.
    """
    dynamic = hasattr(patcher, "is_dynamic") and patcher.is_dynamic()
    return not (
        dynamic
        or patcher.load_device == patcher.offload_device
        or patcher.hook_patches
        or patcher.current_hooks
    )


def release(patcher: Any, layers: list[torch.nn.Module]) -> int:
    """Move the weights of `layers` from the device, by ComfyUI's own partial unloading, which keeps
    LoRAs right and takes them back as it does others. Returns bytes.
    """
    whole, chosen = patcher._load_list, {id(layer) for layer in layers}

    def chosen_only(*args: Any, **kwargs: Any) -> list[Any]:
        return [
            entry for entry in whole(*args, **kwargs) if any(id(part) in chosen for part in entry)
        ]

    patcher._load_list = chosen_only
    try:
        return patcher.partially_unload(patcher.offload_device, 1e32)
    finally:
        del patcher._load_list


def log(report: ContextReport) -> None:
    """The report as lines of the log."""
    for line in report.text().splitlines():
        LOG.info("[Frugal] %s", line)
