"""What a user reads about a plan: names of formats, and every decision that changes something."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping

from ..formats.packed_int import GGUF, GPTQ
from .header import TensorInfo
from .layouts import FLOAT8, PLAIN, LayerLayout
from .wan_keys import Naming

LISTED = 6


def format_name(layout: LayerLayout, info: TensorInfo | None = None) -> str:
    """The name of a layer's format as the report gives it; a plain layer needs its tensor."""
    if layout.format == PLAIN:
        return str(info.dtype).removeprefix("torch.") if info else PLAIN
    if layout.packed:
        spec = layout.packed
        if spec.order == GGUF:
            return f"GGUF {spec.blocks}"
        reordered = "reordered " if "g_idx" in layout.stored else ""
        version = "" if spec.order != GPTQ else " v1" if spec.zero_offset else " v2"
        order = spec.order.upper().replace("_", " ")
        return f"{order}{version}, {spec.bits} bits, {reordered}groups of {spec.group_size}"
    if layout.format in FLOAT8.values():
        scale = "none" if layout.unit_scale else f"per {layout.grid}"
        return f"{layout.format}, scale {scale}"
    return f"{layout.format}, rotated" if layout.options.get("convrot") else layout.format


def label_notes(labels: list[str], layers: Mapping[str, LayerLayout]) -> tuple[str, ...]:
    """What of a file is not used: labels, and scales that a format has no use for."""
    notes = []
    if labels:
        more = f" and {len(labels) - LISTED} more" if len(labels) > LISTED else ""
        names = ", ".join(ascii(name)[1:-1][:80] for name in labels[:LISTED])
        notes.append(f"{len(labels)} tensors are labels and not used: {names}{more}")
    unused = Counter(suffix for layer in layers.values() for suffix in layer.unused)
    notes += [
        f"{count} tensors {suffix} are not used: these layers quantise activations as they come"
        for suffix, count in unused.items()
    ]
    return tuple(notes)


def plan_notes(
    naming: Naming,
    layers: Mapping[str, LayerLayout],
    left_out: Mapping[str, int],
    unit_scales_dropped: int,
    markers: list[str],
    tensors: Mapping[str, TensorInfo],
) -> tuple[str, ...]:
    """Sentences for the report; `markers` are the names of fp8 markers in the file."""
    notes = [naming.text()]
    counts = Counter(layer.format for layer in layers.values())
    notes += [f"{count} linear layers in {form}" for form, count in counts.items()]
    if any(layer.lightx2v for layer in layers.values()):
        notes.append("LightX2V NVFP4: half bytes change places, which copies the packed weights")
    if any(layer.packed for layer in layers.values()):
        notes.append(
            "GPTQ, AWQ, W4A16 and GGUF layers stay packed; one layer at a time is unpacked, and a "
            "LoRA changes what was unpacked, so that it is never rounded to their few bits"
        )
    notes += [f"{count} tensors under {part} are left out" for part, count in left_out.items()]
    if unit_scales_dropped:
        notes.append(f"{unit_scales_dropped} scales of unquantised weights are left out")
    inputs = sum(
        "input_scale" in layer.stored.values() and layer.format in FLOAT8.values()
        for layer in layers.values()
    )
    if inputs:
        notes.append(
            f"{inputs} activation scales are left out: fp8 layers multiply in full precision"
        )
    elif markers and tensors[markers[0]].numel != 2:
        notes.append(
            "the file allows fp8 matmul; fp8 layers multiply in full precision, which "
            "suits Wan better"
        )
    return tuple(notes)
