"""What to do with a Wan file, decided from names, shapes, dtypes and a few small tensors before
weights are read.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from .. import json_text
from ..errors import FrugalError
from .header import TensorInfo
from .layouts import FLOAT8, FLOATS, FOREIGN, ONE, PLAIN, SIDE, LayerLayout, classify
from .packed import (
    LIGHTX2V,
    PACKED,
    WORDS,
    classify_blocks,
    classify_lightx2v,
    classify_packed,
    is_lightx2v,
    settings,
)
from .packed import SIDE as PACKED_SIDE
from .relatives import refuse_relative
from .resolve_notes import format_name, label_notes, plan_notes
from .wan_keys import COMPANIONS, PREFERENCE, Naming, find_naming, is_label
from .wan_shapes import RELATIVES, TEXT_DIM, Parameter, WanConfig, detect_config, parameters

MARKER = "scaled_fp8"
# Of a configuration in the metadata: what is handed on, and what must say what every Wan 2.1
# model has.
FORWARDED = ("causal_ar", "text_dim", "num_heads", "model_type")
# Types that the shapes say; any other type in a configuration, such as animate2, is handed on.
BY_SHAPE = ("t2v", "i2v", "ti2v", "flf2v", "vace", "camera", "camera_2.2")
FIXED = {"eps": 1e-6, "freq_dim": 256, "patch_size": [1, 2, 2], "cross_attn_norm": True}
QUANT_METADATA = "_quantization_metadata"
# What a model is made of that ComfyUI has a class for, from the configuration, the names and shapes
# of the file, and what its metadata say of the model: its parameters, None if there is no class.
Structure = Callable[
    [WanConfig, Mapping[str, tuple[int, ...]], Mapping[str, Any]], Mapping[str, Parameter] | None
]


@dataclass(frozen=True)
class Plan:
    """The decisions for one file.

    `table` holds the model's parameters, `rename` maps each tensor of the file that is kept to its
    canonical name, `layers` each linear layer that is quantised to its layout, `transformer`
    holds what the file's own configuration adds to the shapes, `formats` counts bytes of weights
    per format, `notes` says in words what a user should know, `settings` holds what the file states
    of a GPTQ or AWQ quantisation, `own_formats` are the formats that the pack runs because ComfyUI
    does not, and `preferences` the tensors that choose an attention kernel.
    """

    file: str
    config: WanConfig
    table: Mapping[str, Parameter]
    naming: Naming
    rename: Mapping[str, str]
    layers: Mapping[str, LayerLayout]
    transformer: Mapping[str, Any]
    formats: Mapping[str, int]
    notes: tuple[str, ...]
    settings: Mapping[str, Any] = field(default_factory=dict)
    own_formats: tuple[str, ...] = PACKED
    preferences: tuple[str, ...] = ()

    @property
    def gridded(self) -> tuple[str, ...]:
        """fp8 layers with more than one scale."""
        return tuple(name for name, layer in self.layers.items() if layer.grid != ONE)

    @property
    def packed(self) -> tuple[str, ...]:
        return tuple(
            name for name, layer in self.layers.items() if layer.format in self.own_formats
        )


def plan_wan(
    file: str,
    tensors: Mapping[str, TensorInfo],
    metadata: Mapping[str, str],
    value: Callable[[str], torch.Tensor],
    structure: Structure | None = None,
) -> Plan:
    """Plan the load of a Wan file given its tensors' facts, its metadata and a reader of small
    tensors. structure: what asks ComfyUI for the parameters of a model that is not in the table of
    Wan 2.1 and 2.2; without it, such a model is refused.

    Raises FrugalError for an unknown layout, a missing, unknown or doubled key, a scale without a
    quantised weight, a quantised weight without a scale, or a wrong shape. Nothing large is read.
    """
    refuse_relative(file, tensors)
    naming = find_naming(file, tensors)
    labels = [raw for raw, info in tensors.items() if is_label(naming.canonical(raw) or raw, info)]
    kept = {raw: info for raw, info in tensors.items() if raw not in set(labels)}
    names, left_out, markers = _canonical_names(file, naming, kept)
    preferences = {name: names.pop(name) for name in list(names) if name.endswith(PREFERENCE)}
    for name, raw in preferences.items():
        _json(file, name, _bytes(file, name, value(raw)))
    stated = _transformer(file, metadata)
    transformer = {key: stated[key] for key in FORWARDED if key in stated}
    if transformer.get("model_type") in BY_SHAPE:
        del transformer["model_type"]
    shapes = {name: tensors[raw].shape for name, raw in names.items()}
    config = detect_config(file, shapes, transformer.get("text_dim", TEXT_DIM))
    _check_config(file, config, stated)
    table = _table(file, config, shapes, transformer, structure)
    side = _side_tensors(file, names, table)
    _check_keys(file, names, table, side, config)
    declared = _declared(file, naming, metadata, side, names, value)
    packed_settings = settings(file, metadata)

    layers: dict[str, LayerLayout] = {}
    rename = {raw: name for name, raw in preferences.items()}
    formats: Counter[str] = Counter()
    unit_scales_dropped = 0
    for name, parameter in table.items():
        layer = name.removesuffix(".weight")
        raw = names[name] if name in names else names[f"{layer}.{WORDS}"]
        rename[raw] = name
        info = tensors[raw]
        if not parameter.linear:
            _check_plain(file, name, info, parameter.shape)
            formats[str(info.dtype).removeprefix("torch.")] += info.nbytes
            continue
        beside = {suffix: tensors[names[f"{layer}.{suffix}"]] for suffix in side.get(layer, ())}
        where, shape = f"{file}: {layer}", (parameter.shape[0], parameter.shape[1])
        if info.blocks:
            layout = classify_blocks(where, shape, info, beside)
        elif any(suffix in PACKED_SIDE for suffix in beside):
            layout = classify_packed(where, shape, beside, packed_settings)
        elif is_lightx2v(beside):
            layout = classify_lightx2v(where, shape, info, beside)
        else:
            layout = classify(where, shape, info, beside, declared.get(layer))
        formats[format_name(layout, info)] += info.nbytes
        _check_input_scale(f"{file}: {layer}", layer, beside, names, value)
        if layout.format == PLAIN:
            unit_scales_dropped += _refuse_scale(file, layer, layout, names, tensors, value)
            continue
        layers[layer] = layout
        rename.update(
            {
                names[f"{layer}.{suffix}"]: f"{layer}.{target}"
                for suffix, target in layout.stored.items()
            }
        )
    _check_scaled(file, layers, markers)
    notes = plan_notes(naming, layers, left_out, unit_scales_dropped, markers, tensors)
    notes += label_notes(labels, layers)
    ignored = sorted(set(stated) - {*FORWARDED, *FIXED, *_derived(config)})
    if "model_type" in stated and "model_type" not in transformer:
        ignored.append("model_type")
    if ignored:
        notes += (f"configuration entries left out: {ascii(', '.join(ignored))[1:-1][:200]}",)
    return Plan(
        file, config, table, naming, rename, layers, transformer, dict(formats), notes,
        packed_settings, preferences=tuple(preferences),
    )  # fmt: skip


def _table(
    file: str,
    config: WanConfig,
    shapes: Mapping[str, tuple[int, ...]],
    transformer: Mapping[str, Any],
    structure: Structure | None,
) -> Mapping[str, Parameter]:
    """The model's parameters: of a relative those of ComfyUI's class, and of what else the table of
    Wan 2.1 and 2.2 does not explain, where that class does.
    """
    if not config.relative:
        own = parameters(config)
        parts = {name.partition(".")[0] for name in shapes} - {n.partition(".")[0] for n in own}
        # A model that is new here, if ComfyUI knows it; else its keys are refused by name.
        newer = structure(config, shapes, transformer) if structure is not None and parts else None
        explained = newer is not None and parts <= {name.partition(".")[0] for name in newer}
        return newer if newer is not None and explained else own
    found = None if structure is None else structure(config, shapes, transformer)
    if found is None:
        example = next(n for n in shapes for start in RELATIVES if n.startswith(start))
        raise FrugalError(
            f"{file} holds {example} and so is Wan {config.relative}",
            "a model whose parts are known here",
            "load and quantize it inside ComfyUI"
            if structure is None
            else "update ComfyUI: it has no model of this kind",
        )
    return found


def _canonical_names(
    file: str, naming: Naming, tensors: Mapping[str, TensorInfo]
) -> tuple[dict[str, str], Counter[str], list[str]]:
    names: dict[str, str] = {}
    left_out: Counter[str] = Counter()
    markers: list[str] = []
    for raw in tensors:
        name = naming.canonical(raw)
        if name == MARKER or raw == MARKER:
            markers.append(raw)
        elif name is None:
            companion = next((part for part in COMPANIONS if raw.startswith(part)), None)
            if companion is None:
                raise FrugalError(
                    f"{file} holds {ascii(raw)[1:-1][:80]} outside the prefix "
                    f"'{naming.prefix}' of the video model",
                    "every tensor under one prefix",
                    "choose a file that holds only the video model",
                )
            left_out[companion] += 1
        elif name in names:
            raise FrugalError(
                f"{file} holds {name} twice, as {ascii(names[name])[1:-1][:80]} and "
                f"{ascii(raw)[1:-1][:80]}",
                "each tensor once",
                "choose another file",
            )
        else:
            names[name] = raw
    return names, left_out, markers


def _transformer(file: str, metadata: Mapping[str, str]) -> dict[str, Any]:
    if "config" not in metadata:
        return {}
    try:
        entry = json_text.parse(metadata["config"])
        transformer = entry.get("transformer", {})
    except (ValueError, AttributeError):
        transformer = None
    if not isinstance(transformer, dict):
        raise FrugalError(
            f"{file} carries a config that is no JSON object",
            "JSON with a transformer",
            "choose another file",
        )
    return transformer


def _derived(config: WanConfig) -> dict[str, Any]:
    return {
        "dim": config.dim,
        "ffn_dim": config.ffn_dim,
        "num_layers": config.layers,
        "in_dim": config.in_dim,
        "out_dim": config.out_dim,
        "text_dim": config.text_dim,
    }


def _check_config(file: str, config: WanConfig, stated: Mapping[str, Any]) -> None:
    for key, shape_says in {**_derived(config), **FIXED}.items():
        if key in stated and stated[key] != shape_says:
            raise FrugalError(
                f"{file} says {key} {ascii(stated[key])[:40]} in its config, the model "
                f"has {shape_says}",
                "one value",
                "choose another file",
            )
    if config.vace_layers:
        step = config.layers // config.vace_layers
        if not step or len(range(0, config.layers, step)) != config.vace_layers:
            raise FrugalError(
                f"{file} holds {config.vace_layers} VACE blocks for {config.layers} blocks",
                "a number of VACE blocks that divides the blocks",
                "download the file again",
            )


def _side_tensors(
    file: str, names: Mapping[str, str], table: Mapping[str, Any]
) -> dict[str, tuple[str, ...]]:
    """Layer -> names of the tensors beside its weight."""
    found: dict[str, list[str]] = {}
    for name in names:
        if name in table:
            continue
        for suffix, convention in FOREIGN.items():
            if name.endswith(f".{suffix}"):
                raise FrugalError(
                    f"{file} holds {name}, a tensor of {convention}",
                    "a layout that ComfyUI can run",
                    "use an fp8, int8 or native 4-bit file of the same model",
                )
        layer, _, suffix = name.rpartition(".")
        known = suffix in SIDE or suffix in PACKED_SIDE or suffix in LIGHTX2V
        if known and f"{layer}.weight" in table and table[f"{layer}.weight"].linear:
            found.setdefault(layer, []).append(suffix)
            if suffix == WORDS and f"{layer}.weight" in names:
                raise FrugalError(
                    f"{file} holds {layer} both as weight and as {WORDS}",
                    "one of them",
                    "choose another file",
                )
    return {layer: tuple(suffixes) for layer, suffixes in found.items()}


def _check_keys(
    file: str,
    names: Mapping[str, str],
    table: Mapping[str, Any],
    side: Mapping[str, tuple[str, ...]],
    config: WanConfig,
) -> None:
    explained = {f"{layer}.{suffix}" for layer, suffixes in side.items() for suffix in suffixes}
    words = {f"{layer}.weight" for layer, suffixes in side.items() if WORDS in suffixes}
    missing = [name for name in table if name not in names and name not in words]
    unknown = [name for name in names if name not in table and name not in explained]
    what = f"a Wan {config.variant} {config.size} file with {config.layers} blocks"
    if missing:
        raise FrugalError(
            f"{file} lacks {missing[0]}"
            + (f" and {len(missing) - 1} more tensors" if missing[1:] else ""),
            f"all {len(table)} parameters of {what}",
            "download the file again or choose a complete one",
        )
    if unknown:
        first = ascii(names[unknown[0]])[1:-1][:100]
        raise FrugalError(
            f"{file} holds {first}"
            + (f" and {len(unknown) - 1} more unknown tensors" if unknown[1:] else ""),
            f"only the {len(table)} parameters of {what} and their scales",
            "use the loader made for this variant",
        )


def _declared(
    file: str,
    naming: Naming,
    metadata: Mapping[str, str],
    side: Mapping[str, tuple[str, ...]],
    names: Mapping[str, str],
    value: Callable[[str], torch.Tensor],
) -> dict[str, Mapping[str, Any]]:
    """Layer -> its declared format, from the header and from comfy_quant tensors, which must
    not disagree.
    """
    declared: dict[str, Mapping[str, Any]] = {}
    if QUANT_METADATA in metadata:
        for raw, entry in (
            _json(file, QUANT_METADATA, metadata[QUANT_METADATA].encode()).get("layers", {}).items()
        ):
            layer = naming.layer(raw)
            if not isinstance(entry, dict):
                raise FrugalError(
                    f"{file} declares {ascii(raw)[1:-1][:80]} as {ascii(entry)[:40]}",
                    "an object with a format",
                    "convert the model again",
                )
            if f"{layer}.weight" not in names:
                raise FrugalError(
                    f"{file} declares a format for {ascii(raw)[1:-1][:80]}, which it does not hold",
                    "formats of its own layers",
                    "download the file again",
                )
            declared[layer] = entry
    for layer, suffixes in side.items():
        if "comfy_quant" not in suffixes:
            continue
        name = f"{layer}.comfy_quant"
        entry = _json(file, name, _bytes(file, name, value(names[name])))
        if declared.setdefault(layer, entry).get("format") != entry.get("format"):
            raise FrugalError(
                f"{file} declares {layer} as {declared[layer].get('format')} and as "
                f"{entry.get('format')}",
                "one format",
                "convert the model again",
            )
    return declared


def _bytes(file: str, name: str, tensor: torch.Tensor) -> bytes:
    if tensor.dtype != torch.uint8:
        raise FrugalError(f"{file}: {name} is {tensor.dtype}", "bytes", "convert the model again")
    return bytes(tensor.flatten().tolist())


def _json(file: str, name: str, raw: bytes) -> dict[str, Any]:
    try:
        entry = json_text.parse(raw)
    except ValueError as error:
        raise FrugalError(
            f"{file} has a damaged {name}", "JSON", "convert the model again"
        ) from error
    if not isinstance(entry, dict) or not isinstance(entry.get("layers", {}), dict):
        raise FrugalError(
            f"{file} has a {name} that is no object", "a JSON object", "convert the model again"
        )
    return entry


def _check_plain(file: str, name: str, info: TensorInfo, shape: tuple[int, ...]) -> None:
    if info.shape != shape:
        raise FrugalError(
            f"{file}: {name} has shape {list(info.shape)}", f"{list(shape)}", "choose a Wan file"
        )
    if info.dtype not in FLOATS and info.dtype not in FLOAT8:
        raise FrugalError(
            f"{file}: {name} is {info.text()}", "a float tensor", "choose another file"
        )


def _refuse_scale(
    file: str,
    layer: str,
    layout: LayerLayout,
    names: Mapping[str, str],
    tensors: Mapping[str, TensorInfo],
    value: Callable[[str], torch.Tensor],
) -> int:
    """A scale beside an unquantised weight must be exactly 1; returns how many such scales are
    left out.
    """
    for suffix, target in layout.stored.items():
        raw = names[f"{layer}.{suffix}"]
        if target == "weight_scale" and not (
            tensors[raw].numel == 1 and value(raw).float().item() == 1.0
        ):
            raise FrugalError(
                f"{file}: {layer} has the scale {suffix} and a weight that is not quantised",
                "scales only beside quantised weights",
                "download the file again or choose another one",
            )
    return len(layout.stored)


def _check_input_scale(
    where: str,
    layer: str,
    beside: Mapping[str, TensorInfo],
    names: Mapping[str, str],
    value: Callable[[str], torch.Tensor],
) -> None:
    """One activation scale is left out or used as it is; more than one must say nothing: one per
    input channel would have to divide the inputs.
    """
    for suffix, info in beside.items():
        if SIDE.get(suffix) != "input_scale" or info.numel == 1:
            continue
        if not bool((value(names[f"{layer}.{suffix}"]).float() == 1).all()):
            raise FrugalError(
                f"{where} has activation scales {suffix} of shape {list(info.shape)} "
                "that are not 1",
                "one number, or ones",
                "convert the model again without scales for activations",
            )


def _check_scaled(file: str, layers: Mapping[str, LayerLayout], markers: list[str]) -> None:
    bare = [name for name, layer in layers.items() if layer.unit_scale]
    scaled = [name for name, layer in layers.items() if not layer.unit_scale]
    if bare and (scaled or markers):
        reason = (
            f"{len(scaled)} other layers have one"
            if scaled
            else f"the marker {markers[0]} announces scales"
        )
        raise FrugalError(
            f"{file}: {bare[0]} and {len(bare) - 1} more fp8 layers have no scale, while {reason}",
            "a scale beside every fp8 weight",
            "download the file again or choose a complete one",
        )
    if markers and not layers:
        raise FrugalError(
            f"{file} holds the marker {markers[0]} and no fp8 layer",
            "fp8 weights",
            "choose another file",
        )
