"""What the families share of ComfyUI: feature detection, names on a MODEL, messages on a node.

Features are looked for, versions are never compared: an argument that the running ComfyUI does not
know is left out, so one source serves 0.3.75 and newer.
"""

from __future__ import annotations

import functools
import inspect
import json
import math
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from comfy.patcher_extension import WrappersMP
from comfy_api.v0_0_2 import io

from . import _reports

CATEGORY = "Frugal"
REPORT_KEY = "frugal.load_report"
# Attachment of a MODEL with an attribute `table`: what attention took in its latest run.
ATTENTION_KEY = "frugal.attention"
# Attachment of a MODEL with LoRAs that are not merged.
LORA_KEY = "frugal.lora_side"
# Entry of transformer_options that makes a model causal.
CAUSAL_KEY = "frugal.causal"
# Entries of transformer_options: what a causal run will need, and the run itself while it lasts.
CAUSAL_NEEDS_KEY, CAUSAL_RUN_KEY = f"{CAUSAL_KEY}.needs", f"{CAUSAL_KEY}.run"
# Wrapper of a MODEL whose cross-attention is computed once per prompt, and its attachment with what
# that keeps (kernels.memory.cross_kv_report.ContextPlan).
CONTEXT_KEY = "frugal.constant_context"
# OUTER_SAMPLE wrapper of a MODEL that is two experts; has attributes `high` and `low`, MODELs, and
# a method `changed`, see `for_each_expert`.
EXPERTS_KEY = "frugal.two_experts"
# Attachment of a planned MODEL (kernels.memory.active_plan.ActivePlan), and key of its wrappers.
PLAN_KEY = "frugal.memory_plan"
# Entry of transformer_options through which ComfyUI lets its attention be replaced.
ATTENTION_OVERRIDE = "optimized_attention_override"


def known(target: Callable[..., Any], **arguments: Any) -> dict[str, Any]:
    """The given arguments that `target` accepts; used as `call(..., **known(call, new=1))`."""
    accepted = inspect.signature(target).parameters
    return {name: value for name, value in arguments.items() if name in accepted}


# Of inputs that few people change: `io.Int.Input(..., **ADVANCED)`. Nodes 2.0 folds them away.
ADVANCED = known(io.Int.Input, advanced=True)


def found_by(words: Iterable[str], node_id: str = "") -> dict[str, Any]:
    """Search aliases of a node, for `io.Schema(..., **found_by([...]))`; the pack's name is always
    among them, since it is not part of any display name. node_id: where search_words.json has the
    node's words in other scripts than sources are written in.
    """
    more = _search_words()[node_id] if node_id else []
    return known(io.Schema, search_aliases=[*words, *more, CATEGORY.lower()])


@functools.cache
def _search_words() -> dict[str, list[str]]:
    path = Path(__file__).with_name("search_words.json")
    return json.loads(path.read_text(encoding="utf-8"))


def experts_of(model: Any) -> Any:
    """The switch of a MODEL that is two experts, with attributes `high` and `low`; else None."""
    wrappers = getattr(model, "wrappers", {})
    found = wrappers.get(WrappersMP.OUTER_SAMPLE, {}).get(EXPERTS_KEY)
    return found[0] if found else None


def for_each_expert(change: Callable[..., Any]) -> Callable[..., Any]:
    """Make `change`, a function of a MODEL that returns it changed, change both experts where the
    MODEL is two: what it puts there may be bound to the weights of one.
    """

    @functools.wraps(change)
    def changed(model: Any, *args: Any, **kwargs: Any) -> Any:
        switch = experts_of(model)
        if switch is None:
            return change(model, *args, **kwargs)
        return switch.changed(model, lambda expert: change(expert, *args, **kwargs))

    return changed


def runs_negative(model: Any, cfg: float) -> bool:
    """Whether a run of a MODEL, one or two experts, at `cfg` computes the negative prompt too.

    Some nodes ask for it at cfg 1, where ComfyUI would leave it out.
    """
    switch = experts_of(model)
    both = [model] if switch is None else [model, switch.high, switch.low]
    scales = [cfg] if switch is None or not switch.cfg_low else [cfg, switch.cfg_low]
    keeps = any(each.model_options.get("disable_cfg1_optimization", False) for each in both)
    return keeps or not all(math.isclose(scale, 1.0) for scale in scales)


def compute_dtype(model: Any) -> torch.dtype:
    """In which a model (of a MODEL) computes, its weights being kept in this or another type."""
    return model.manual_cast_dtype or model.get_dtype()


def round_patched(layer: Any) -> None:
    """Let a quantised linear layer of ComfyUI's compute with a patched weight as it is kept.

    With dynamic VRAM a patched weight is rounded to its format where it stays on the device. A
    layer that multiplies in full precision gets it unrounded at the first use, unless it asks: the
    same seed would then give another result in the second run.
    """
    cast = type(layer).forward_comfy_cast_weights
    if known(cast, want_requant=True):
        layer.forward_comfy_cast_weights = functools.partial(_cast_rounded, layer)


def _cast_rounded(layer: Any, x: Any, compute_dtype: Any = None, want_requant=True, **rest: Any):
    cast = type(layer).forward_comfy_cast_weights
    return cast(layer, x, compute_dtype, want_requant=True, **rest)


def show_text(node_id: str | None, text: str) -> None:
    """Show plain text on a node, while it runs and afterwards; silent outside a server. An inner
    node of an expansion, whose id begins with that of the node the person sees, shows it there.
    """
    if node_id:
        _reports.send(str(node_id).partition(".")[0], text)
