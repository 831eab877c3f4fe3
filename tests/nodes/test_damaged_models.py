"""Damaged LoRA and try-on files through ComfyUI's readers: a right load or one sentence."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from safetensors.torch import save_file

from frugal.kernels.errors import FrugalError
from frugal.nodes.lora import file as lora_file
from frugal.nodes.tryon import load_run
from frugal.nodes.wan import load_run as wan
from frugal.tests.fuzz.mutations import damaged, strange_tensors
from frugal.tests.fuzz.watch import Watch, cases
from frugal.tests.helpers import tryon as tryon_bed
from frugal.tests.helpers import wan as bed
from frugal.tests.helpers.lora import SOURCE, lora, put

pytestmark = pytest.mark.usefixtures("inference")
NUMBER = 120


def changed(tensors, chance, path, metadata=None):
    """A file with a fault in its tensors, or in its bytes."""
    made = dict(tensors)
    if chance.random() < 0.6:
        strange_tensors(made, chance)
    save_file({name: each.contiguous() for name, each in made.items()}, path, metadata)
    if chance.random() < 0.4:
        path.write_bytes(damaged(path.read_bytes(), chance))


def test_loras(tmp_path):
    plain = bed.base(SOURCE)[0]
    model = wan.load_wan(bed.write(tmp_path / "wan.safetensors", plain))[0].model
    tensors, _ = lora(bed.block_linears(SOURCE)[:4], alpha=2)
    path = tmp_path / "lora.safetensors"
    with Watch("LoRA") as watch:
        for number, chance in enumerate(cases("lora", NUMBER)):
            changed(tensors, chance, path)
            found = watch(f"case {number}", partial(lora_file.read, path, model))
            # Nothing of the file is lost without a word.
            if found is not None:
                placed = {key for entry in found.entries for key in entry.keys}
                assert found.count == len(placed | set(found.unplaced))
    print(f"LoRA: {watch.read} read, {watch.refused} refused")  # noqa: T201


@pytest.mark.parametrize("suffix", ["safetensors", "pt"])
def test_try_on_models(tmp_path, suffix):
    unet = tryon_bed.skip_cross_attention(tryon_bed.make_unet(0, widths=(32, 32, 32)))
    tensors = {name: t for name, t in tryon_bed.state(unet).items() if ".attn2." not in name}
    path = tmp_path / f"unet.{suffix}"

    def read():
        found = load_run.load_catvton(str(path), None, "fp32")
        for name, parameter in found.model.diffusion_model.named_parameters():
            assert parameter.is_floating_point(), name
        return found

    with Watch(f"try-on {suffix}") as watch:
        for number, chance in enumerate(cases(f"tryon {suffix}", NUMBER // 2)):
            if suffix == "pt":
                made = dict(tensors)
                strange_tensors(made, chance)
                torch.save(made, path)
                if chance.random() < 0.5:
                    path.write_bytes(damaged(path.read_bytes(), chance))
            else:
                changed(tensors, chance, path, tryon_bed.META)
            watch(f"case {number}", read)
    print(f"try-on {suffix}: {watch.read} read, {watch.refused} refused")  # noqa: T201


@pytest.mark.parametrize("fault", ["rank", "rows", "columns"])
def test_factors_that_do_not_fit(tmp_path, fault):
    """ComfyUI's own patcher only logs what does not fit, and leaves the layer as it was."""
    plain = bed.base(SOURCE)[0]
    patcher = wan.load_wan(bed.write(tmp_path / "wan.safetensors", plain))[0]
    layer = bed.block_linears(SOURCE)[0]
    tensors, _ = lora([layer])
    up, down = (f"diffusion_model.{layer}.lora_{part}.weight" for part in "BA")
    if fault == "rank":
        tensors[down] = tensors[down][:2]
    elif fault == "rows":
        tensors[up] = tensors[up][:-1]
    else:
        tensors[down] = tensors[down][:, :-1]
    with pytest.raises(FrugalError, match="self_attn"):
        put(patcher, tmp_path, tensors)
