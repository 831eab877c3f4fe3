"""A Wan model as a diffusers folder with INT4 blocks, as vLLM-Omni loads it.

The folder's `transformer` is written here: weights under the names of diffusers, the linear layers
of the blocks in GPTQ's symmetric 4 bits (gptq_layer), and a configuration that carries AutoRound's
label for that packing, the one vLLM-Omni knows. All else (VAE, text encoder, tokenizer, scheduler)
comes from a folder of the unquantised model, whose large files are linked where the disk allows.
Nothing has the final name before all of it is there.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ..checkpoints.diffusers_names import to_diffusers
from ..checkpoints.header import TensorInfo
from ..checkpoints.wan_shapes import FREQ_DIM, IMAGE_DIM, WanConfig
from ..errors import FrugalError
from ..report import megabytes
from . import gptq_layer
from .convert import VERSION, Merge, Statistics, merged, states
from .vllm_folder_parts import MODEL, REST, TRANSFORMER, settings, take_rest, write_json
from .weights import Weights
from .writer import Group, Writer, arranged

FILE = "diffusion_pytorch_model.safetensors"
CLASS = "WanTransformer3DModel"
# Whether a model takes a start image.
VARIANTS = {"T2V": False, "I2V": True, "FLF2V": True}
HEAD = 128


@dataclass(frozen=True)
class ServerJob:
    """What is asked for. source: a Wan file. folder: the one to write. rest: a diffusers folder of
    the same model, None to write the transformer alone. group: inputs that share a scale.
    """

    source: Path
    folder: Path
    rest: Path | None = None
    group: int = 128
    calibration: Statistics | None = None
    device: torch.device | str = "cpu"


@dataclass(frozen=True)
class ServerReport:
    """What was written. error: of the 4-bit weights, relative to their size, root mean square."""

    folder: str
    source: str
    layers: int
    group: int
    size: int
    error: float
    seconds: float
    notes: tuple[str, ...]

    def text(self) -> str:
        return "\n".join(
            [
                f"{self.folder}: transformer of {megabytes(self.size)}, from {self.source}",
                f"{self.layers} layers INT4, one scale for {self.group} weights; the weights "
                f"differ by {100 * self.error:.2f} %",
                f"written in {self.seconds:.1f} s",
                *(f"note: {note}" for note in self.notes),
            ]
        )


def quantization_config(group: int) -> dict[str, Any]:
    """The entry of a configuration that tells vLLM-Omni how the blocks are stored."""
    return {
        "quant_method": "auto-round",
        "packing_format": "auto_round:auto_gptq",
        "data_type": "int",
        "bits": gptq_layer.BITS,
        "group_size": group,
        "sym": True,
        "desc_act": False,
        "block_name_to_quantize": "blocks",
    }


def export(
    job: ServerJob,
    merge_for: Callable[[Weights], Merge | None] = lambda weights: None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> ServerReport:
    """Do the job. `merge_for` makes changes to the weights, such as LoRAs; `progress` gets bytes
    done and in all, and an exception that it raises leaves what is done for the next call.

    Raises FrugalError for a folder that exists, a model that the server has no class for, a rest of
    another model, and layers that do not suit.
    """
    started = time.perf_counter()
    if job.folder.exists():
        raise FrugalError(
            f"{job.folder.name} exists already", "a name that is free", "choose another name"
        )
    source = Weights(job.source)
    image = _takes_image(source)
    config = _config(source, job, settings(job.rest, image) if job.rest else {})
    merge = merge_for(source)
    unfinished = job.folder.with_name(f"{job.folder.name}.part")
    (unfinished / TRANSFORMER).mkdir(parents=True, exist_ok=True)
    size, error = _write_weights(source, job, unfinished / TRANSFORMER / FILE, merge, progress)
    write_json(unfinished / TRANSFORMER / "config.json", config)
    take_rest(job.rest, unfinished)
    _settle(unfinished, job.folder)
    layers = source.large()
    notes = (*_notes(source, layers, job), *(merge.notes if merge is not None else ()))
    seconds = time.perf_counter() - started
    return ServerReport(
        job.folder.name, source.source.name, len(layers), job.group, size, error, seconds, notes
    )


def _takes_image(source: Weights) -> bool:
    variant = source.plan.config.variant
    if variant not in VARIANTS:
        raise FrugalError(
            f"{source.plan.file} is Wan {variant}",
            f"one of {', '.join(VARIANTS)}, which diffusers and vLLM-Omni call {CLASS}",
            "choose such a model",
        )
    return VARIANTS[variant]


def _config(source: Weights, job: ServerJob, stated: Mapping[str, Any]) -> dict[str, Any]:
    """The transformer's configuration: what the weights say, and what only `stated` can."""
    own = source.plan.config
    heads = _heads(own, stated)
    said: dict[str, Any] = {
        "patch_size": [1, 2, 2],
        "num_attention_heads": heads,
        "attention_head_dim": own.dim // heads,
        "in_channels": own.in_dim,
        "out_channels": own.out_dim,
        "text_dim": own.text_dim,
        "freq_dim": FREQ_DIM,
        "ffn_dim": own.ffn_dim,
        "num_layers": own.layers,
        "image_dim": IMAGE_DIM if own.image else None,
        "added_kv_proj_dim": own.dim if own.image else None,
        "pos_embed_seq_len": own.flf_tokens or None,
    }
    for name, value in said.items():
        if stated.get(name, value) != value:
            raise FrugalError(
                f"the transformer of {job.rest.name if job.rest else ''} has {name} "
                f"{ascii(stated[name])[:40]}",
                f"{value}, as {source.plan.file} has",
                "name the folder of the same model",
            )
    assumed = {
        "cross_attn_norm": True,
        "qk_norm": "rms_norm_across_heads",
        "eps": 1e-6,
        "rope_max_seq_len": 1024,
    }
    label = {"quantization_config": quantization_config(job.group)}
    return {"_class_name": CLASS, **assumed, **stated, **said, **label}


def _heads(config: WanConfig, stated: Mapping[str, Any]) -> int:
    heads = stated.get("num_attention_heads")
    if isinstance(heads, int) and heads > 0 and config.dim % heads == 0:
        return heads
    if config.dim % HEAD:
        raise FrugalError(
            f"a model of width {config.dim}", f"a multiple of {HEAD}, or its folder", f"name {REST}"
        )
    return config.dim // HEAD


def _write_weights(
    source: Weights,
    job: ServerJob,
    target: Path,
    merge: Merge | None,
    progress: Callable[[int, int], None],
) -> tuple[int, float]:
    """Bytes of the file, and the relative error of its 4-bit weights."""
    plan = {unit: _group(source, unit, job.group) for unit in source.units()}
    groups = arranged(plan.values())
    owner = {next(iter(group)): unit for unit, group in plan.items()}
    order = [owner[next(iter(group))] for group in groups]
    files = [*source.source.files, *([job.calibration.path] if job.calibration else [])]
    mark = [
        states(files),
        merge.identity if merge else "",
        torch.device(job.device).type,
        job.group,
    ]
    facts = {"tool": f"ComfyUI-Frugal {VERSION}", "source": source.source.name}
    facts["loras"] = merge.title if merge is not None else ""
    metadata = {"format": "pt", "frugal": json.dumps(facts)}
    # A whole file under an unfinished folder is what a run left that ended right after it.
    with Writer(target, groups, metadata, json.dumps(mark), overwrite=True) as out:
        done = [out.size - sum(_bytes(plan[unit]) for unit in order[out.written :])]

        def advance(count: int) -> None:
            done[0] += count
            progress(done[0], out.size)

        advance(0)
        for unit in order[out.written :]:
            tensors, note = _tensors(source, unit, plan[unit], job, merge)
            out.write(tensors, note, advance)
            source.release(unit)
        out.finish()
        lost = sum(entry[0] for entry in out.notes.values())
        whole = sum(entry[1] for entry in out.notes.values())
        return out.size, (lost / whole) ** 0.5 if whole else 0.0


def _bytes(group: Group) -> int:
    return sum(info.nbytes for info in group.values())


def _group(source: Weights, unit: str, group: int) -> dict[str, TensorInfo]:
    shape = source.shapes.get(unit)
    if shape is None or (unit not in source.large() and source.layout(unit) is None):
        return {
            to_diffusers(name): TensorInfo(info.dtype, info.shape)
            for name, info in source.infos(unit).items()
        }
    layer = to_diffusers(unit)
    if unit not in source.large():
        return {f"{layer}.weight": TensorInfo(torch.bfloat16, shape)}
    reason = gptq_layer.suits(shape, group)
    if reason:
        raise FrugalError(
            f"{source.plan.file}: {unit} cannot be INT4: {reason}",
            "widths that suit the group",
            "choose a smaller group",
        )
    return {
        f"{layer}.{suffix}": TensorInfo(dtype, size)
        for suffix, (dtype, size) in gptq_layer.tensor_specs(shape, group).items()
    }


def _tensors(
    source: Weights, unit: str, group: Group, job: ServerJob, merge: Merge | None
) -> tuple[dict[str, torch.Tensor], dict[str, Any] | None]:
    device = torch.device(job.device)
    if unit not in source.shapes:
        held = source.stored(unit)
        if merge is not None:
            for name in merge.names & set(held):
                kind = held[name].dtype
                held[name] = merge.apply(name, held[name].float()).to(kind).cpu()
        return {to_diffusers(name): tensor for name, tensor in held.items()}, None
    weight, layer = merged(source, unit, merge, device), to_diffusers(unit)
    if unit not in source.large():
        name = f"{layer}.weight"
        return {name: weight.to(group[name].dtype).cpu()}, None
    known = job.calibration.layer(unit) if job.calibration is not None else None
    where = f"{source.plan.file}: {unit}"
    made = gptq_layer.encode(weight, job.group, device, known, where=where)
    meant = gptq_layer.decode(made, source.shapes[unit], job.group)
    weight = weight.float().cpu()
    note = {unit: [float((meant - weight).square().sum()), float(weight.square().sum())]}
    return {f"{layer}.{suffix}": tensor for suffix, tensor in made.items()}, note


def _notes(source: Weights, layers: list[str], job: ServerJob) -> list[str]:
    notes = list(source.plan.notes)
    twice = [layer for layer in layers if source.layout(layer) is not None]
    if twice or source.source.blocks:
        notes.append(
            f"{len(twice) or 'all'} layers were quantised already and are rounded twice: an "
            "unquantised source gives a better file"
        )
    if job.calibration is None:
        notes.append("without a calibration every weight is rounded to the nearest value")
    else:
        seen = sum(job.calibration.layer(layer) is not None for layer in layers)
        notes.append(f"{seen} of {len(layers)} layers are calibrated")
    if job.rest is None:
        notes.append(
            "the folder holds the transformer alone: put it in place of the one in a diffusers "
            f"folder of the model, and take the key transformer_2 out of that {MODEL}"
        )
    return notes


def _settle(unfinished: Path, folder: Path) -> None:
    if folder.exists():
        raise FrugalError(
            f"{folder.name} appeared during the run", "a name that is free", "choose another name"
        )
    os.replace(unfinished, folder)
