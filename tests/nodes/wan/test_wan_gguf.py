"""GGUF files in the ComfyUI under test: blocks stay in the file's mapping, whatever is done to the
model.
"""

from __future__ import annotations

import comfy.model_management
import comfy.sd
import pytest
import torch

from frugal.kernels.errors import FrugalError
from frugal.kernels.formats.gguf_blocks import TYPES
from frugal.kernels.memory.plan import Job
from frugal.nodes.memory import memory_plan_run
from frugal.nodes.sampling import compile_run
from frugal.nodes.wan import experts_run, load_run, packed_int
from frugal.tests.helpers import gguf, sampling
from frugal.tests.helpers import lora as lora_bed
from frugal.tests.helpers import wan as bed
from frugal.tests.helpers.wan_checks import check, forward, loaded_weights, reference

pytest.importorskip("gguf", reason="GGUF files are read by the package gguf")

SOURCE = bed.weights()
LAYERS = bed.block_linears(SOURCE)
CPU = torch.device("cpu")
# Of outputs: float32 sums in another order.
EXACT = 2e-5


@pytest.fixture(autouse=True)
def nothing_loaded():
    yield
    comfy.model_management.unload_all_models()


def load(path, *choices):
    with torch.inference_mode():
        return load_run.load_wan(path, *choices)


def file(folder, kind, config=bed.T2V, **how):
    path = folder / "wan.gguf"
    return path, gguf.write(path, bed.weights(config), kind, config, **how)


def words(patcher) -> list[torch.Tensor]:
    model = patcher.model.diffusion_model
    return [model.get_submodule(layer).weight._qdata for layer in LAYERS]


def in_mapping(tensor: torch.Tensor, name: str) -> bool:
    address = tensor.data_ptr()
    with open("/proc/self/maps") as maps:
        for line in maps:
            span, _, rest = line.partition(" ")
            low, high = (int(end, 16) for end in span.split("-"))
            if low <= address < high:
                return rest.rstrip().endswith(name)
    raise AssertionError("an address outside all mappings")


@pytest.mark.parametrize("config", [bed.T2V, bed.I2V], ids=["T2V", "I2V"])
@pytest.mark.parametrize("kind", TYPES)
def test_blocks_stay_in_the_file_and_mean_what_the_library_says(kind, config, tmp_path):
    path, meant = file(tmp_path, kind, config)
    patcher, report = load(path)
    check(patcher, meant, config)
    layers = bed.block_linears(bed.weights(config), config)
    values = sum(meant[f"{layer}.weight"].numel() for layer in layers)
    form = TYPES[kind]
    assert report.formats[f"GGUF {kind}"] == values // form.values * form.size
    for layer in layers:
        held = patcher.model.diffusion_model.get_submodule(layer).weight._qdata
        assert held.dtype == torch.uint8 and in_mapping(held, ".gguf")
    # Other weights are in F32 here, as in the file.
    assert patcher.model_size() <= 1.01 * path.stat().st_size


@pytest.mark.parametrize("others", ["BF16", "F16", "F32"])
def test_other_layers_stay_in_the_file_too(others, tmp_path):
    path, meant = file(tmp_path, "Q4_K", others=others)
    patcher, _ = load(path)
    check(patcher, meant)
    model = patcher.model.diffusion_model
    for layer in ("text_embedding.0", "time_projection.1", "head.head"):
        assert in_mapping(model.get_submodule(layer).weight, ".gguf")
    assert patcher.model_size() <= 1.05 * path.stat().st_size
    lora, dense = lora_bed.lora(["text_embedding.0"])
    with torch.inference_mode():
        patched = comfy.sd.load_lora_for_models(patcher, None, lora, 1.0, 0.0)[0]
        patched.patch_model(CPU)
        wanted = reference(lora_bed.with_changes(meant, (dense, 1.0)))
        # The changed weight is rounded to the type of the layer.
        assert bed.relative(forward(patched), wanted) <= (EXACT if others == "F32" else 1e-2)
        patched.unpatch_model(CPU)


@pytest.mark.parametrize("kind", ["IQ3_S", "IQ2_XXS"])
def test_types_that_do_not_stay_packed_are_unpacked_and_the_report_says_so(kind, tmp_path):
    path, meant = file(tmp_path, kind)
    patcher, report = load(path)
    held = loaded_weights(patcher)
    for name in meant:
        assert bed.relative(held[name], meant[name]) <= 4e-4, name
    assert any(f"GGUF blocks ({kind}" in note and "unpacked" in note for note in report.notes)


def test_a_chosen_type_unpacks(tmp_path):
    path, meant = file(tmp_path, "Q8_0")
    patcher, report = load(path, "fp32")
    check(patcher, meant)
    assert not any(packed_int.is_packed(p) for p in patcher.model.diffusion_model.parameters())
    assert any("GGUF blocks (Q8_0 1.7 MB) are unpacked" in note for note in report.notes)
    _, report = load(path)
    assert not any("unpacked while loading" in note for note in report.notes)


def test_quantising_blocks_again_is_refused(tmp_path):
    path, _ = file(tmp_path, "Q8_0")
    with pytest.raises(FrugalError, match=r"holds quantised blocks \(Q8_0 1.7 MB\)"):
        load(path, "default", "fp8 per-channel")


def test_damaged_blocks_are_refused(tmp_path):
    source = dict(SOURCE)
    source["blocks.1.ffn.2.weight"] = source["blocks.1.ffn.2.weight"].clone()
    source["blocks.1.ffn.2.weight"][7, 40] = float("nan")
    path = tmp_path / "wan.gguf"
    gguf.write(path, source, "Q4_1")
    with pytest.raises(FrugalError, match=r"blocks\.1\.ffn\.2 holds values that are not finite"):
        load(path)


@pytest.mark.parametrize("held", [True, False], ids=["resident", "low VRAM"])
@pytest.mark.parametrize("kind", ["Q8_0", "Q4_K", "IQ4_XS"])
def test_merged_lora_is_exact_and_goes_away(kind, held, tmp_path):
    path, meant = file(tmp_path, kind)
    lora, wanted = bed.lora_of(meant)
    memory = 0 if held else 64
    with torch.inference_mode():
        model = load(path)[0]
        before, stored = forward(model), words(model)
        patched = comfy.sd.load_lora_for_models(model, None, lora, 1.0, 0.0)[0]
        patched.patch_model(CPU, lowvram_model_memory=memory)
        out = forward(patched)
        assert bed.relative(out, reference(wanted)) <= EXACT < bed.relative(before, out)
        # Nothing of the model became larger.
        assert all(map(torch.equal, words(patched), stored))
        assert patched.model_size() <= 1.01 * path.stat().st_size
        patched.unpatch_model(CPU)
        model.patch_model(CPU, lowvram_model_memory=memory)
        assert torch.equal(forward(model), before)


def test_two_loras_and_a_part_of_the_model_that_goes_away(tmp_path):
    path, meant = file(tmp_path, "Q4_K")
    one, wanted = bed.lora_of(meant)
    with torch.inference_mode():
        model = load(path)[0]
        for _ in range(2):
            model = comfy.sd.load_lora_for_models(model, None, dict(one), 0.5, 0.0)[0]
        model.patch_model(CPU)
        whole = forward(model)
        assert bed.relative(whole, reference(wanted)) <= EXACT
        assert model.partially_unload(CPU, 10**6)
        functions = [
            len(model.model.diffusion_model.get_submodule(layer).weight_function)
            for layer in LAYERS
        ]
        assert functions == [1] * len(LAYERS)
        assert torch.equal(forward(model), whole)


def test_lora_beside_a_layer(tmp_path):
    path, meant = file(tmp_path, "Q5_K")
    with torch.inference_mode():
        model = load(path)[0]
        tensors, dense = lora_bed.lora(LAYERS)
        changed = lora_bed.put(model, tmp_path, tensors)[0]
        comfy.model_management.load_models_gpu([changed, *changed.get_nested_additional_models()])
        out = lora_bed.output(changed)
        wanted = lora_bed.reference(lora_bed.with_changes(meant, (dense, 1.0)))
        assert bed.relative(out, wanted) <= EXACT


@pytest.mark.parametrize("with_lora", [False, True], ids=["plain", "with a LoRA"])
def test_saved_model_loads_anywhere(with_lora, tmp_path):
    """Floats in place of blocks, a merged LoRA in them."""
    path, meant = file(tmp_path, "Q4_K")
    lora, changed = bed.lora_of(meant)
    with torch.inference_mode():
        model = load(path)[0]
        before = forward(model)
        saved = model
        if with_lora:
            saved = comfy.sd.load_lora_for_models(model, None, lora, 1.0, 0.0)[0]
        out = tmp_path / "saved.safetensors"
        comfy.sd.save_checkpoint(str(out), saved)
        wanted = reference(changed if with_lora else meant)
        assert bed.relative(forward(load(out, "fp32")[0]), wanted) <= EXACT
        native = comfy.sd.load_diffusion_model(str(out), model_options={"dtype": torch.float32})
        assert bed.relative(forward(native), wanted) <= EXACT
        saved.unpatch_model(CPU)
        model.patch_model(CPU)
        assert torch.equal(forward(model), before)
        assert all(each.dtype == torch.uint8 for each in words(model))


@pytest.mark.usefixtures("inference")
@pytest.mark.parametrize("held", [True, False], ids=["resident", "low VRAM"])
@pytest.mark.parametrize("kind", ["Q4_K", "IQ4_XS"])
def test_compiled_blocks(kind, held, tmp_path, monkeypatch):
    monkeypatch.setattr(compile_run, "_graphs", {})
    path, meant = file(tmp_path, kind)
    lora, _ = bed.lora_of(meant)
    model = comfy.sd.load_lora_for_models(load(path)[0], None, lora, 1.0, 0.0)[0]
    prompts = sampling.two_prompts()
    want = sampling.sample(model, prompts, 2)
    reports = []
    compiled = compile_run.apply(model, reports.append, "aot_eager")
    if not held:
        monkeypatch.setattr(comfy.model_management, "load_models_gpu", _streamed)
        model.unpatch_model(CPU)
    assert bed.relative(sampling.sample(compiled, prompts, 2), want) <= EXACT
    assert reports[0].calls == 4 and reports[0].uncompiled == {}


def _streamed(models, *_, **__):
    for model in models:
        if not model.model.model_lowvram:
            model.patch_model(CPU, lowvram_model_memory=64)


def test_memory_plan_counts_blocks_and_the_largest_unpacked_layer(tmp_path):
    path, _ = file(tmp_path, "Q4_K")
    model = load(path)[0]
    found = memory_plan_run.weights_of(model)
    assert found.total <= 1.01 * path.stat().st_size
    largest = max(SOURCE[f"{layer}.weight"].numel() for layer in LAYERS)
    assert found.expanded >= largest * model.model.get_dtype().itemsize


def test_two_experts_of_blocks_as_planned(tmp_path):
    """Of two types; the pair is that of the floats which the blocks stand for."""
    pair, exact = [], []
    for seed, kind in ((1, "Q4_K"), (2, "Q8_0")):
        path = tmp_path / f"{seed}.gguf"
        meant = gguf.write(path, bed.weights(seed=seed), kind)
        pair.append(load(path)[0])
        floats = bed.write(tmp_path / f"{seed}.safetensors", meant)
        exact.append(load(floats, "fp32")[0])
    prompts = sampling.two_prompts()

    def run(high, low, planned):
        model = experts_run.join(high, low, 0.9, 0.0)[0]
        if planned:
            plan, peaks = memory_plan_run.plan_of(model, Job(64, 64, 5), 0)
            assert "two experts" in plan.text()
            model = memory_plan_run.apply(model, plan, peaks, False, None)
        return sampling.sample(model, prompts, 4)

    wanted = run(*exact, False)
    for planned in (False, True):
        assert bed.relative(run(*pair, planned), wanted) <= 1e-3
    assert bed.relative(run(*reversed(pair), False), wanted) > 1e-2
    assert all(packed_int.is_packed(held) for held in (words_of(each) for each in pair))


def words_of(patcher):
    return patcher.model.diffusion_model.get_submodule(LAYERS[0]).weight
