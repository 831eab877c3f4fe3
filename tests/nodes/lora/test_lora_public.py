"""LoRA files as diffusers, peft, LightX2V, DiffSynth and VideoX-Fun write them: names, endings, and
strengths that stand in the metadata; beside the layers, and merged by the quantizer.
"""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import save_file

from frugal.kernels.checkpoints.diffusers_names import to_diffusers
from frugal.kernels.errors import FrugalError
from frugal.kernels.quantize.weights import Weights
from frugal.nodes.lora import apply, file
from frugal.nodes.lora.merge import LoraMerge
from frugal.nodes.wan import load_run
from frugal.tests.helpers import wan as bed
from frugal.tests.helpers.lora import RANK, SOURCE, factors, output, reference

pytestmark = pytest.mark.usefixtures("inference")
LAYERS = bed.block_linears(SOURCE)
EXACT = 1e-5
MADE = {
    layer: factors(SOURCE[f"{layer}.weight"].shape, number) for number, layer in enumerate(LAYERS)
}
DENSE = {f"{layer}.weight": up @ down for layer, (up, down) in MADE.items()}
PEFT = (".lora_B.weight", ".lora_A.weight")
KOHYA = (".lora_up.weight", ".lora_down.weight")


def named(form, endings=PEFT, layers=LAYERS):
    pairs = ((form(layer), MADE[layer]) for layer in layers)
    return {name + end: part for name, pair in pairs for end, part in zip(endings, pair)}  # noqa: B905


def diffusers(layer):
    return f"transformer.{to_diffusers(layer)}"


def noise(shape, seed):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def plus(*changes):
    found = {name: tensor.clone() for name, tensor in SOURCE.items()}
    for change in changes:
        for name, value in change.items():
            found[name] += value
    return found


@pytest.fixture
def check(tmp_path):
    """Beside the layers and merged, a file must give the weights that are meant."""
    base = bed.write(tmp_path / "base.safetensors", SOURCE)

    def run(tensors, wanted, metadata=None, name="lora.safetensors"):
        path = tmp_path / name
        held = {key: tensor.contiguous() for key, tensor in tensors.items()}
        save_file(held, path, metadata)
        model = load_run.load_wan(base, "fp32")[0]
        changed, report = apply.apply(model, file.read(path, model.model), 1.0)
        assert report.left == {} and report.beside + report.inside == report.keys == len(tensors)
        assert bed.relative(output(changed), reference(wanted)) <= EXACT
        merge = LoraMerge(Weights(base), [(path, 1.0)])
        for key, tensor in SOURCE.items():
            found = merge.apply(key, tensor.clone()) if key in merge.names else tensor
            assert torch.allclose(found, wanted[key], rtol=1e-5, atol=1e-6), key
        assert f"{len(tensors)} of {len(tensors)} keys applied" in merge.notes[0]
        return report

    return run


def factor(value, layers=LAYERS):
    return {f"{layer}.weight": DENSE[f"{layer}.weight"] * (value - 1) for layer in layers}


STATED = {"r": RANK, "lora_alpha": 16, "use_rslora": False, "rank_pattern": {}, "alpha_pattern": {}}
ATTENTION = [layer for layer in LAYERS if layer.endswith("self_attn.q")]


def packed(**changed):
    """As diffusers' save_lora_weights puts it."""
    part = {f"transformer.{key}": value for key, value in (STATED | changed).items()}
    return {"format": "pt", "lora_adapter_metadata": json.dumps(part, indent=2, sort_keys=True)}


METADATA = {
    "diffusers": (packed(), factor(4)),
    "diffusers, rsLoRA": (packed(use_rslora=True), factor(8)),
    "diffusers, alpha_pattern": (
        packed(alpha_pattern={"attn1.to_q": 2}),
        factor(4, [layer for layer in LAYERS if layer not in ATTENTION]) | factor(0.5, ATTENTION),
    ),
    "diffusers, alpha_pattern as an expression": (
        packed(alpha_pattern={r"blocks\.\d+\.attn1\.to_q": 2}),
        factor(4, [layer for layer in LAYERS if layer not in ATTENTION]) | factor(0.5, ATTENTION),
    ),
    "diffusers, rank_pattern": (packed(r=32, rank_pattern={".*": RANK}), factor(4)),
    "save_lora_adapter": ({"lora_adapter_metadata": json.dumps(STATED)}, factor(4)),
    "flat, transformer.": ({"transformer.r": "4", "transformer.lora_alpha": "16"}, factor(4)),
    "flat": ({"r": "4", "lora_alpha": "16.0", "use_rslora": "True"}, factor(8)),
    "Finetrainers": ({"lora_config": json.dumps({"r": 4, "lora_alpha": 2})}, factor(0.5)),
    "a text encoder's beside it": (
        packed() | {"text_encoder.lora_alpha": "1", "text_encoder.r": "4"}, factor(4)
    ),
    "nothing stated": ({"format": "pt"}, factor(1)),
}  # fmt: skip


@pytest.mark.parametrize("label", METADATA)
@pytest.mark.parametrize("form", [diffusers, lambda layer: f"diffusion_model.{layer}"])
def test_strength_that_the_metadata_state(label, form, check):
    metadata, change = METADATA[label]
    if "pattern" in label and form is not diffusers and "rank" not in label:
        pytest.skip("the pattern names diffusers' layers")
    report = check(named(form), plus(DENSE, change), metadata)
    assert report.scaled == (0 if label == "nothing stated" else len(LAYERS))
    assert ("that the file's metadata state" in report.text()) == (report.scaled > 0)


def test_peft_folder(check, tmp_path):
    (tmp_path / "adapter_config.json").write_text(json.dumps(STATED | {"peft_type": "LORA"}))
    tensors = named(lambda layer: f"base_model.model.{layer}")
    check(tensors, plus(DENSE, factor(4)), name="adapter_model.safetensors")
    check(tensors, plus(DENSE), name="another.safetensors")


def test_alpha_tensors_come_before_metadata(check):
    alphas = {f"{diffusers(layer)}.alpha": torch.tensor(2.0) for layer in LAYERS}
    check(named(diffusers) | alphas, plus(DENSE, factor(0.5)), packed())


REFUSED = {
    "another rank": (packed(r=8), "states the rank 8 .* and holds 4"),
    "no number": (packed(lora_alpha="x"), "states lora_alpha as 'x'"),
    "not finite": ({"lora_alpha": "nan"}, "states lora_alpha as 'nan'"),
    "no JSON": ({"lora_adapter_metadata": "{"}, "lora_adapter_metadata is no JSON object"),
}


@pytest.mark.parametrize("label", REFUSED)
def test_strength_that_cannot_be_read(label, check):
    metadata, message = REFUSED[label]
    with pytest.raises(FrugalError, match=message):
        check(named(diffusers), SOURCE, metadata)


ADAPTER = (".lora_B.my_adapter.weight", ".lora_A.my_adapter.weight")
NAMES = {
    "pipe.dit., default (UniAnimate-DiT)": (
        lambda layer: f"pipe.dit.{layer}", (".lora_B.default.weight", ".lora_A.default.weight")
    ),
    "an adapter of any name": (lambda layer: f"base_model.model.{layer}", ADAPTER),
    "kohya, one dot": (lambda layer: "lora_unet_" + layer.replace("blocks.", "blocks_", 1), KOHYA),
    "kohya, dots after the prefix": (lambda layer: f"lora_unet_{layer}", KOHYA),
    "kohya, diffusers names and dots": (lambda layer: f"lora_unet_{to_diffusers(layer)}", KOHYA),
    "VideoX-Fun": (lambda layer: "lora_unet__" + layer.replace(".", "_"), KOHYA),
    "second expert of a pipeline": (lambda layer: f"transformer_2.{to_diffusers(layer)}", PEFT),
    "lora.up": (diffusers, (".lora.up.weight", ".lora.down.weight")),
    "mochi": (diffusers, (".lora_B", ".lora_A")),
}  # fmt: skip


@pytest.mark.parametrize("label", NAMES)
def test_names(label, check):
    form, endings = NAMES[label]
    check(named(form, endings), plus(DENSE))


def test_videox_fun_without_the_layer_that_comfyui_looks_for(check):
    some = [layer for layer in LAYERS if "cross_attn" not in layer]
    tensors = named(NAMES["VideoX-Fun"][0], KOHYA, some)
    check(tensors, plus({f"{layer}.weight": DENSE[f"{layer}.weight"] for layer in some}))


def test_modulation_of_lightx2v(check):
    change = {f"blocks.{n}.modulation": 0.3 * noise((1, 6, 256), n) for n in range(2)}
    change["head.modulation"] = 0.3 * noise((1, 2, 256), 5)
    tensors = named(lambda layer: f"diffusion_model.{layer}")
    tensors |= {
        f"diffusion_model.{name.replace('modulation', 'diff_m')}": value
        for name, value in change.items()
    }
    check(tensors, plus(DENSE, change))


@pytest.mark.parametrize("alpha", [None, 16])
@pytest.mark.parametrize("end", [".lora_B.bias", ".lora_B.default.bias"])
def test_bias_of_the_up_projection_has_the_strength_of_the_product(alpha, end, check):
    bias = {f"{layer}.bias": 0.2 * noise((MADE[layer][0].shape[0],), 3) for layer in LAYERS}
    default = "default" in end
    endings = tuple(text.replace(".weight", ".default.weight") for text in PEFT)
    tensors = named(diffusers, endings if default else PEFT)
    tensors |= {f"{diffusers(name[:-5])}{end}": value for name, value in bias.items()}
    times = 1 if alpha is None else alpha / RANK
    changes = (DENSE, factor(times), {name: value * times for name, value in bias.items()})
    check(tensors, plus(*changes), None if alpha is None else packed())


@pytest.mark.parametrize(
    "end", [".lora_magnitude_vector", ".lora_magnitude_vector.default.weight", ".dora_scale"]
)
def test_dora_by_the_formula_of_the_paper(end, check):
    """magnitude * (W + D) / ||W + D||, with lora_alpha / r in D."""
    endings = tuple(text.replace(".weight", ".default.weight") for text in PEFT)
    tensors = named(diffusers, endings if "default" in end else PEFT)
    wanted = plus(DENSE, factor(4))
    for number, layer in enumerate(LAYERS):
        name = f"{layer}.weight"
        size = 1 + 0.2 * torch.rand(
            wanted[name].shape[0], generator=torch.Generator().manual_seed(number)
        )
        magnitude = SOURCE[name].norm(dim=1) * size
        wanted[name] = magnitude[:, None] * wanted[name] / wanted[name].norm(dim=1, keepdim=True)
        tensors[diffusers(layer) + end] = magnitude[:, None] if "scale" in end else magnitude
    check(tensors, wanted, packed())


def test_files_with_more_than_one_lora(check):
    second = named(NAMES["second expert of a pipeline"][0])
    both = named(diffusers) | {key: value.clone() for key, value in second.items()}
    with pytest.raises(FrugalError, match="LoRAs for two models, transformer"):
        check(both, SOURCE)
    two = named(diffusers, ADAPTER) | {
        key: value.clone() for key, value in named(diffusers).items()
    }
    with pytest.raises(FrugalError, match="holds the adapters"):
        check(two, SOURCE)


def test_what_is_missing_comes_first(tmp_path):
    base = bed.write(tmp_path / "base.safetensors", SOURCE)
    tensors = named(diffusers) | {"transformer.blocks.7.attn1.to_q.lora_A.weight": torch.ones(4, 8)}
    path = bed.write(tmp_path / "lora.safetensors", tensors)
    model = load_run.load_wan(base, "fp32")[0]
    report = apply.apply(model, file.read(path, model.model), 1.0)[1]
    first = f"lora.safetensors at 1: 1 of {len(tensors)} keys not applied"
    assert report.text().startswith(first)
    assert LoraMerge(Weights(base), [(path, 1.0)]).notes[0].startswith(first)


def test_choices_of_attention_kernels_are_named(tmp_path):
    """A newer ComfyUI's LoRA may hold such a choice for a layer; no weight changes by it."""
    base = bed.write(tmp_path / "base.safetensors", SOURCE)
    key = "diffusion_model.blocks.0.self_attn.comfy_attention.config"
    wish = torch.tensor(list(b'{"attention": "x"}'), dtype=torch.uint8)
    path = bed.write(tmp_path / "lora.safetensors", named(diffusers) | {key: wish})
    model = load_run.load_wan(base, "fp32")[0]
    report = apply.apply(model, file.read(path, model.model), 1.0)[1]
    assert dict(report.left) == {key: file.PREFERS}
    assert report.beside + report.inside == report.keys - 1
    assert (
        file.PREFERS in report.text()
        and file.PREFERS in LoraMerge(Weights(base), [(path, 1.0)]).notes[0]
    )


@pytest.mark.parametrize("content", [b"", b"<!DOCTYPE html><html></html>", "cut", "nan"])
def test_files_that_are_no_lora(content, check, tmp_path):
    tensors = named(diffusers)
    path = bed.write(tmp_path / "lora.safetensors", tensors)
    if content == "nan":
        tensors[next(iter(tensors))] = torch.full((4, 4), float("nan"))
        bed.write(path, tensors)
    else:
        path.write_bytes(path.read_bytes()[:-40] if content == "cut" else content)
    model = load_run.load_wan(bed.write(tmp_path / "wan.safetensors", SOURCE), "fp32")[0]
    for read in (
        lambda: file.read(path, model.model),
        lambda: LoraMerge(Weights(tmp_path / "wan.safetensors"), [(path, 1.0)]),
    ):
        with pytest.raises(FrugalError, match=r"lora\.safetensors"):
            read()
