"""The doctor's findings follow from the facts: each sentence under its condition only."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from frugal.kernels.formats import hardware
from frugal.kernels.memory import fit
from frugal.kernels.memory.doctor import EMULATED, NATIVE, PLAIN, UNKNOWN, Backend, Facts, diagnose

GB = 10**9
INT = {"int8_linear": (7, 5), "convrot_w4a4_linear": (7, 5), "w4a8_int8_linear": (8, 0)}
ON = {
    "cuda": Backend(True, False, None, INT),
    "eager": Backend(True, False, None, dict.fromkeys(INT)),
    "triton": Backend(True, True, None, {"int8_linear": (8, 0)}),
}
# An RTX 3060 of 12 GB under a current ComfyUI.
GPU = Facts(
    comfyui="1.2.3",
    torch="2.11.0",
    cuda="13.0",
    device="RTX 3060",
    kind="cuda",
    capability=(8, 6),
    memory_total=12 * GB,
    memory_free=11 * GB,
    ram_total=64 * GB,
    ram_free=50 * GB,
    streaming=True,
    kitchen="0.2.31",
    kitchen_used=True,
    backends=ON,
    formats=tuple(hardware.FORMATS),
    registered=("pytorch", "sub_quad", "split"),
    active="pytorch",
    sdpa=("flash", "math"),
    numba="0.60",
    triton="3.6",
    gguf="0.19",
)
CPU = replace(
    GPU, device="cpu", kind="cpu", capability=None, memory_total=0, memory_free=0, streaming=False
)


def states(facts: Facts) -> dict[str, str]:
    return {each.name: each.state for each in diagnose(facts).formats}


@pytest.mark.parametrize(
    ("capability", "native"),
    [
        ((7, 0), []),
        ((7, 5), ["int8", "W4A4"]),
        ((8, 0), ["int8", "W4A4", "W4A8"]),
        ((8, 9), ["fp8 e4m3", "fp8 e5m2", "int8", "W4A4", "W4A8"]),
        ((9, 0), ["fp8 e4m3", "fp8 e5m2", "int8", "W4A4", "W4A8"]),
        ((12, 0), ["fp8 e4m3", "fp8 e5m2", "int8", "W4A4", "W4A8", "NVFP4", "MXFP8"]),
    ],
)
def test_native_formats_by_capability(capability, native):
    found = states(replace(GPU, capability=capability))
    assert sorted(name for name, state in found.items() if state == NATIVE) == sorted(native)
    for name in found.keys() - set(native):
        assert found[name] == (PLAIN if name in ("int8", "W4A4", "W4A8") else EMULATED), name


@pytest.mark.parametrize(
    ("facts", "verdict"),
    [
        (GPU, "RTX 3060: take W4A8 or int8; fp8 only saves memory here"),
        (replace(GPU, device="RTX 4090", capability=(8, 9)), "RTX 4090: take W4A8, int8 or fp8"),
        (
            replace(GPU, device="V100", capability=(7, 0)),
            "V100: take 16 bits where it fits; W4A8, int8 and fp8 only save memory here",
        ),
        (
            replace(GPU, formats=()),
            "RTX 3060: take 16 bits or GGUF; update ComfyUI for int8 and W4A8",
        ),
        (CPU, "CPU: take tiny models and short clips; a Wan 14B step takes hours here"),
    ],
)
def test_the_verdict_comes_first(facts, verdict):
    lines = diagnose(facts).text().split("\n")
    assert lines[0] == verdict
    # The blank line ends what a node has room for.
    assert lines.index("") <= 5


def test_the_large_model_is_told_of_in_the_format_that_streams_least():
    assert diagnose(GPU).verdict()[1] == (
        "Wan 14B I2V in W4A8 at 480p: streams 3.92 GB from RAM in every step"
    )
    large = replace(GPU, memory_total=96 * GB, memory_free=95 * GB)
    assert diagnose(large).verdict()[1] == "Wan 14B I2V in fp16 at 480p: fits"


def test_cuda_backend_off_below_13_and_what_it_costs():
    backends = ON | {"cuda": replace(ON["cuda"], disabled=True)}
    facts = replace(GPU, cuda="12.8", backends=backends)
    text = diagnose(facts).text()
    assert "backend cuda: off; ComfyUI switches it off because torch is built for CUDA 12.8" in text
    assert states(facts)["int8"] == states(facts)["W4A8"] == PLAIN
    assert "int8: plain PyTorch; comfy-kitchen's kernels for it are off" in text
    healthy = diagnose(GPU).text()
    assert "backend cuda: on" in healthy and "switches it off" not in healthy
    assert "int8: native; through comfy-kitchen's cuda kernels" in healthy
    # Triton takes over for what it has, where it is on.
    triton = replace(facts, backends=backends | {"triton": replace(ON["triton"], disabled=False)})
    assert states(triton)["int8"] == NATIVE and states(triton)["W4A8"] == PLAIN
    assert states(replace(triton, capability=(7, 5)))["int8"] == PLAIN


def test_other_backend_states():
    def line(name: str, **changes) -> str:
        facts = replace(GPU, backends={name: changes.pop("backend")}, **changes)
        [found] = diagnose(facts).backends
        return found.text()

    gone = Backend(False, False, "No module named _C")
    off = Backend(True, True)
    assert line("cuda", backend=gone) == "backend cuda: unavailable; No module named _C"
    assert line("cuda", backend=off, cuda=None).endswith("torch is built without CUDA")
    assert line("cuda", backend=off, cuda="13.0").endswith("by another part of ComfyUI")
    assert line("cuda", backend=off, cuda="9.2").endswith("CUDA 13.0 or newer")
    assert "--enable-triton-backend" in line("triton", backend=off)
    assert line("eager", backend=Backend(True, False)) == "backend eager: on"


def test_without_kitchen_and_with_one_that_is_not_used():
    old = replace(GPU, kitchen_used=False, backends={}, formats=("float8_e4m3fn",))
    assert "comfy-kitchen: 0.2.31 installed but not used" in diagnose(old).text()
    assert "comfy-kitchen: not installed" in diagnose(replace(old, kitchen=None)).text()
    found = states(replace(old, capability=(8, 9)))
    assert found.pop("fp8 e4m3") == NATIVE and set(found.values()) == {UNKNOWN}
    assert "int8: not known; this ComfyUI has no quantised tensor" in diagnose(old).text()
    assert {each.format for each in diagnose(old).models} == {"fp16", "fp8"}


def test_comfyui_has_the_last_word_on_emulation():
    able = replace(GPU, capability=(12, 0))
    assert states(able)["MXFP8"] == NATIVE
    assert states(replace(able, emulated=("mxfp8",)))["MXFP8"] == EMULATED
    assert "update torch" in diagnose(replace(able, emulated=("mxfp8",))).text()


@pytest.mark.parametrize(
    ("package", "capability", "registered", "active", "words"),
    [
        ("sageattention", (8, 6), ("sage",), "pytorch", "usable; ComfyUI started with --use-sage"),
        ("sageattention", (8, 6), ("sage",), "sage", "SageAttention 9.9: in use"),
        ("sageattention", (7, 5), ("sage",), "pytorch", "no use here; needs compute"),
        ("sageattention", (8, 6), (), "pytorch", "found, not taken up by ComfyUI"),
        ("flash_attn", (8, 0), ("flash",), "pytorch", "--use-flash-attention"),
        ("flash_attn_interface", (8, 6), (), "pytorch", "compute capability 9.0"),
        ("flash_attn_interface", (9, 0), (), "pytorch", "FlashAttention 3 9.9: found, not taken"),
        ("sageattn3", (12, 0), ("sage3",), "pytorch", "usable; nodes can choose it"),
        ("xformers", (8, 6), ("xformers",), "xformers", "xFormers 9.9: in use"),
        ("xformers", None, ("xformers",), "pytorch", "found, not checked on this device"),
    ],
)
def test_attention_packages(package, capability, registered, active, words):
    facts = replace(
        GPU, attention={package: "9.9"}, capability=capability, registered=registered, active=active
    )
    assert any(words in each.text() for each in diagnose(facts).attention)
    assert "packages: none of" not in diagnose(facts).text()


def test_attention_in_use():
    text = diagnose(GPU).text()
    assert "in use: pytorch\n" in text and "packages: none of FlashAttention 2" in text
    assert "PyTorch's back ends: flash, math\n" in text
    bare = diagnose(replace(GPU, sdpa=("math",))).text()
    assert "back ends: math; no fused one is on: CatVTON at 768x1024" in bare
    assert "PyTorch's back ends" not in diagnose(CPU).text()
    assert "--use-pytorch-cross-attention" in diagnose(replace(CPU, active="sub_quad")).text()
    assert "--use-pytorch-cross-attention" not in text
    assert "in use: sage; 8 bits" in diagnose(replace(GPU, active="sage")).text()


def test_missing_packages():
    bare = diagnose(replace(GPU, numba=None, triton=None, gguf=None)).text()
    for words in ("numba: not found; mask nodes", "triton: not found", "gguf: not found; GGUF"):
        assert words in bare and words not in diagnose(GPU).text()


def test_machine_lines():
    text = diagnose(GPU).text()
    assert "\n\nComfyUI 1.2.3, torch 2.11.0 (built for CUDA 13.0)\n" in text
    assert "RTX 3060, compute capability 8.6, 11.00 GB free of 12.00 GB" in text
    assert "streamed by ComfyUI's dynamic VRAM" in text and "hours on a CPU" not in text
    assert "dynamic VRAM is off" in diagnose(replace(GPU, streaming=False)).text()
    alone = diagnose(CPU).text()
    assert "ComfyUI computes on the CPU: no GPU or driver" in alone and "hours on a CPU" in alone
    assert "dynamic VRAM" not in alone
    plain = diagnose(replace(CPU, cuda=None)).text()
    assert "built without CUDA" in plain and "no GPU or driver" not in plain


def found(facts: Facts, model: str, form: str, job: str) -> fit.Fit:
    [one] = [
        each
        for each in diagnose(facts).models
        if (each.model, each.format, each.job) == (model, form, job)
    ]
    return one


def test_weights_are_those_of_the_published_models():
    """Billions of parameters of the released files."""
    for model, billions in (
        ("Wan 14B T2V", 14.29),
        ("Wan 14B I2V", 16.395),
        ("Wan 1.3B T2V", 1.42),
    ):
        assert fit.wan_bytes(fit.WAN[model], "fp16") / 2e9 == pytest.approx(billions, abs=0.005)
        sizes = [fit.wan_bytes(fit.WAN[model], form) for form in ("fp16", "fp8", "W4A8")]
        assert sizes == sorted(sizes, reverse=True)
        assert fit.wan_bytes(fit.WAN[model], "int8") == sizes[1]


def test_work_is_what_comfyui_reserves_and_what_was_traced():
    gib = 2**30
    for dim, size, reserve, peak in (
        (5120, (832, 480), 5.90, 3.50),
        (5120, (1280, 720), 13.61, 8.06),
        (1536, (832, 480), 1.77, 1.51),
    ):
        found = fit.wan_work(dim, *size, 81)
        assert found[0] / gib == pytest.approx(reserve, abs=0.01)
        assert found[1] / gib == pytest.approx(peak, rel=0.01)


def test_what_fits_is_streamed_or_is_too_large():
    small = found(GPU, "Wan 14B I2V", "fp8", "480p")
    room = 12 * GB - small.reserve
    assert small.streamed == small.weights - room > 0 and small.from_disk == 0
    assert "does not fit, ComfyUI will stream about 10.99 GB from RAM" in small.text()
    # Above the reserve nothing is streamed; the byte below it is.
    for memory, streamed in ((small.weights + small.reserve, 0), (small.weights, small.reserve)):
        one = found(replace(GPU, memory_total=memory), "Wan 14B I2V", "fp8", "480p")
        assert one.streamed == streamed
        assert one.text() == "480p: fits" or streamed
    # Between what the work needs and what ComfyUI reserves, every weight is streamed.
    big = found(GPU, "Wan 14B I2V", "fp8", "720p")
    assert big.peak < 12 * GB < big.reserve and big.streamed == big.weights
    tiny = found(replace(GPU, memory_total=4 * GB - 1), "Wan 14B T2V", "W4A8", "720p")
    assert tiny.streamed is None and "too large, the activations alone take 8.6" in tiny.text()
    kept = replace(GPU, memory_total=small.weights + small.reserve, reserved=GB)
    assert found(kept, "Wan 14B I2V", "fp8", "480p").streamed == GB


def test_short_ram_means_the_disk():
    short = found(replace(GPU, ram_free=8 * GB), "Wan 14B I2V", "fp8", "480p")
    assert short.from_disk == short.streamed - 8 * GB
    assert short.text().endswith("2.99 GB more than is free, so the disk will be read")
    on_cpu = found(replace(CPU, ram_free=17 * GB), "Wan 14B I2V", "fp8", "480p")
    assert on_cpu.in_ram and on_cpu.from_disk == on_cpu.weights + on_cpu.peak - 17 * GB
    assert on_cpu.text().startswith("480p: in RAM, 3.4")
    assert found(CPU, "Wan 14B I2V", "fp8", "480p").text() == "480p: fits in RAM"


def test_data_and_text_hold_the_same_numbers():
    diagnosis = diagnose(GPU)
    data = json.loads(diagnosis.json())
    assert data["facts"]["capability"] == [8, 6] and data["facts"]["memory_total"] == 12 * GB
    assert len(data["models"]) == len(diagnosis.models) == 3 * 4 * 2 + 3
    text = diagnosis.text()
    for name, size in (("Wan 14B T2V fp8", "14.54 GB"), ("CatVTON fp16", "1.89 GB")):
        assert f"{name} ({size}): " in text
    assert text.isascii()
