"""Compiled blocks in a sampling run of a Wan model, whose weights stay where ComfyUI keeps them.

ComfyUI's own compile node puts the whole network into a graph and therefore takes a model without
dynamic memory. Here the graph of a block holds no weight: each layer that has some is an operator
that runs ComfyUI's own code for it (kernels/compile), and so is attention. Everything outside the
blocks runs as ever.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import comfy.ldm.wan.model as wan
import comfy.ops
import torch
from comfy.patcher_extension import WrappersMP, add_wrapper_with_key

from ...kernels.compile import operators
from ...kernels.compile.graphs import Graphs, probe
from ...kernels.compile.report import CompileReport
from ...kernels.compile.shadow import plain, shadow
from ...kernels.errors import FrugalError
from ...kernels.log import LOG
from .._comfy import ATTENTION_OVERRIDE, PLAN_KEY, for_each_expert

KEY = "frugal.compile"
INDUCTOR = "inductor"
CORE_KEY = "torch.compile"
# Lists of functions that Wan's blocks call inside.
IN_BLOCKS = ("attn1_patch", "attn2_patch")
_graphs: dict[tuple[type, str], Graphs] = {}


class LastRun:
    """Hands the report of the latest run to whoever has the model; None before the first."""

    def __init__(self) -> None:
        self.report: CompileReport | None = None


@for_each_expert
def apply(
    model: Any, show: Callable[[CompileReport], None] = lambda _: None, backend: str = INDUCTOR
) -> Any:
    """A clone of the ModelPatcher `model` whose blocks are compiled in each sampling run and, under
    KEY, a `LastRun`; `show` gets each run's report. backend: of torch.compile.

    Raises FrugalError for anything but a Wan model, and where PyTorch cannot compile.
    """
    network = model.model.diffusion_model
    if not blocks_of(network):
        raise FrugalError(
            f"the model is a {type(network).__name__}",
            "a Wan model",
            "turn compiling off for this model",
        )
    probe(torch.device(model.load_device), backend)
    model = model.clone()
    last = LastRun()

    def report(found: CompileReport) -> None:
        last.report = found
        show(found)

    model.set_attachments(KEY, last)
    model.remove_wrappers_with_key(WrappersMP.SAMPLER_SAMPLE, KEY)
    model.add_wrapper_with_key(WrappersMP.SAMPLER_SAMPLE, KEY, _each_run(backend, report))
    return model


def present(model: Any) -> bool:
    """Whether the ModelPatcher's blocks are compiled by this pack."""
    return KEY in model.wrappers.get(WrappersMP.SAMPLER_SAMPLE, {})


def log(report: CompileReport) -> None:
    """The report as a line of the log."""
    LOG.info("[Frugal] %s", report.text())


def blocks_of(network: torch.nn.Module) -> list[torch.nn.Module]:
    """The transformer blocks of a Wan network, in order."""
    return [each for each in network.modules() if isinstance(each, wan.WanAttentionBlock)]


def _each_run(backend: str, show: Callable[[CompileReport], None]) -> Callable[..., Any]:
    """A SAMPLER_SAMPLE wrapper."""

    def wrapper(executor, guider, sigmas, extra_args, *args, **kwargs):
        options = extra_args["model_options"].setdefault("transformer_options", {})
        if CORE_KEY in options.get("wrappers", {}).get(WrappersMP.APPLY_MODEL, {}):
            raise FrugalError(
                "two nodes compile this model",
                "one",
                "remove ComfyUI's TorchCompileModel, or turn compiling off here",
            )
        if guider.model_patcher.get_attachment(PLAN_KEY) is not None:
            raise FrugalError(
                "the model has a memory plan, whose blocks work in chunks, and compiled blocks",
                "one of them",
                "remove Memory Plan, or turn compiling off",
            )
        run = _Run(backend)
        # The sampler's own copy for this run.
        add_wrapper_with_key(WrappersMP.DIFFUSION_MODEL, KEY, run, options)
        try:
            result = executor(guider, sigmas, extra_args, *args, **kwargs)
            show(run.report)
            return result
        finally:
            options["wrappers"][WrappersMP.DIFFUSION_MODEL].pop(KEY, None)

    return wrapper


class _Run:
    """A DIFFUSION_MODEL wrapper under which the network's blocks run compiled."""

    def __init__(self, backend: str):
        self.backend = backend
        self.report = CompileReport()
        self.forwards: dict[torch.nn.Module, list[_Forward]] = {}

    def __call__(self, executor, *args, **kwargs):
        network = executor.class_obj
        if network not in self.forwards:
            self.forwards[network] = [_Forward(self, block) for block in blocks_of(network)]
        with _installed(self.forwards[network]):
            return executor(*args, **kwargs)


@contextmanager
def _installed(forwards: list[_Forward]) -> Iterator[None]:
    changed: list[tuple[torch.nn.Module, Any]] = []
    try:
        for forward in forwards:
            before = vars(forward.block).get("forward")
            # ComfyUI joins lists of wrappers, so one can come twice.
            if before is not forward:
                forward.refresh()
                changed.append((forward.block, before))
                forward.block.forward = forward
        yield
    finally:
        for block, before in changed:
            if before is None:
                del block.forward
            else:
                block.forward = before


class _Forward:
    """In place of a block's forward."""

    def __init__(self, run: _Run, block: torch.nn.Module):
        self.run, self.block = run, block
        key = type(block), run.backend
        self.graphs = _graphs.setdefault(key, Graphs(run.backend))
        self.twins: dict[tuple[bool, ...], torch.nn.Module] = {}
        self.parts = [each for each in block.modules() if list(each.parameters())]
        self.twin: torch.nn.Module = block

    def refresh(self) -> None:
        """Take note of what other nodes have put on the block's parts for this call."""
        state = tuple(map(plain, self.parts))
        if state not in self.twins:
            self.twins[state] = shadow(self.block, fetch)
        self.twin = self.twins[state]

    def __call__(self, *args, **kwargs):
        options = kwargs.get("transformer_options") or {}
        report = self.run.report
        patches = [name for name in IN_BLOCKS if options.get("patches", {}).get(name)]
        if patches or torch.is_grad_enabled():
            report.left(patches[0] if patches else "gradients")
            return type(self.block).forward(self.block, *args, **kwargs)
        kwargs["transformer_options"] = TRACED
        # The first block gets a view in another layout, for which a graph of its own would be made.
        args = [each.contiguous() if isinstance(each, torch.Tensor) else each for each in args]
        with operators.attending(partial(_attend, options)):
            out, graphs, seconds = self.graphs(self.twin, *args, **kwargs)
        report.computed(graphs, seconds)
        return out


def fetch(layer: Any, device: torch.device, dtype: torch.dtype) -> list[torch.Tensor]:
    """A small layer's weight and bias, patched and cast as ComfyUI does it, as tensors of their
    own.
    """
    weight, bias, stream = comfy.ops.cast_bias_weight(
        layer, None, dtype, device, dtype, offloadable=True
    )
    found = [each.clone() for each in (weight, bias) if each is not None]
    comfy.ops.uncast_bias_weight(layer, weight, bias, stream)
    return found


def _traced(
    func, q, k, v, heads, mask=None, low_precision_attention=True, transformer_options=None,
    _inside_attn_wrapper=True,
):  # fmt: skip
    """The override that the compiler sees. It takes what Wan's blocks give and nothing else, so an
    argument that it would drop is an error.
    """
    return operators.block_attention(q, k, v, mask, heads, low_precision_attention)


def _attend(options: dict, q, k, v, heads: int, mask, low_precision: bool) -> torch.Tensor:
    exact = {} if low_precision else {"low_precision_attention": False}
    return wan.optimized_attention(
        q, k, v, heads=heads, mask=mask, transformer_options=options, **exact
    )


# The same for every call: what changes from step to step would be compiled again.
TRACED = {ATTENTION_OVERRIDE: _traced}
