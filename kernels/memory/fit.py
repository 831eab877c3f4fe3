"""Do the models fit this device: weights by format, working memory, and what must be streamed.

Weights are counted from the parameter table of the model. Working memory is counted twice: what
ComfyUI sets aside before it places weights, and the live peak of a forward, traced through its
modules on tensors without memory. It is what to expect with nothing else on the device.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from ..checkpoints.wan_shapes import WanConfig, parameters
from ..report import megabytes

MIB = 1 << 20
FRAMES, SIZES = 81, {"480p": (832, 480), "720p": (1280, 720)}
WAN = {
    "Wan 14B T2V": WanConfig(dim=5120, ffn_dim=13824, layers=40, in_dim=16, out_dim=16),
    "Wan 14B I2V": WanConfig(dim=5120, ffn_dim=13824, layers=40, in_dim=36, out_dim=16, image=True),
    "Wan 1.3B T2V": WanConfig(dim=1536, ffn_dim=8960, layers=30, in_dim=16, out_dim=16),
}
# Live peak of a forward in 16 bits, fused attention, bytes per token: 3.50 and 1.51 GiB at 32,760.
PEAK_PER_TOKEN = {5120: 114_700, 1536: 49_500}
# Format -> bytes per weight and per output row of a quantised layer, and ComfyUI's name for it
# (None: no quantised tensor). W4A8: 4 bits, an fp8 scale per 16 inputs, fp32 scale and bias a row.
FORMATS: dict[str, tuple[float, int, str | None]] = {
    "fp16": (2, 0, None),
    "fp8": (1, 4, "float8_e4m3fn"),
    "int8": (1, 4, "int8_tensorwise"),
    "W4A8": (0.5 + 1 / 16, 4, "asym_w4a8_int8"),
}
QUANTISED = re.compile(r"blocks\.\d+\.(self_attn|cross_attn|ffn)\.[a-z0-9_]+\.weight$")
# umT5-XXL encoder: 24 layers and a vocabulary of 256,384, both of width 4096; the fp8 file keeps
# the vocabulary in 16 bits.
ENCODER_BYTES = {"fp16": 11_360_000_000, "fp8": 6_730_000_000}
ENCODER_WORK = 300 * MIB, 300 * MIB
# SD 1.5 inpainting UNet with its unused cross-attention, and VAE, fp16; work at 768 x 1024, batch 2
# (guidance).
CATVTON_BYTES, CATVTON_WORK = (1556 + 84 + 160) * MIB, (1966 * MIB, 1560 * MIB)


@dataclass(frozen=True)
class Fit:
    """Bytes. reserve: what ComfyUI sets aside for the work at `job`; peak: what the work needs.
    streamed: weights that do not fit beside the reserve and are read from main memory in every
    step; None if the peak alone is too large, or on a device that computes in main memory.
    from_disk: what free main memory cannot hold of that, or of all.
    """

    model: str
    format: str
    job: str
    weights: int
    reserve: int
    peak: int
    streamed: int | None
    from_disk: int
    in_ram: bool = False

    def text(self) -> str:
        """What it means, without the model's name."""
        short = f"{megabytes(self.from_disk)} more than is free, so the disk will be read"
        if self.in_ram:
            return f"{self.job}: {f'in RAM, {short}' if self.from_disk else 'fits in RAM'}"
        if self.streamed is None:
            return (
                f"{self.job}: too large, the activations alone take {megabytes(self.peak)}; choose "
                "a smaller size or fewer frames"
            )
        if not self.streamed:
            return f"{self.job}: fits"
        found = (
            f"{self.job}: does not fit, ComfyUI will stream about {megabytes(self.streamed)} from "
            "RAM in every step"
        )
        return f"{found}, {short}" if self.from_disk else found


def wan_bytes(config: WanConfig, form: str) -> int:
    """Bytes of a Wan model whose block layers are held in `form`, one of FORMATS, the rest in 16
    bits.
    """
    each, row, _ = FORMATS[form]
    total = 0.0
    for name, parameter in parameters(config).items():
        count = 1
        for length in parameter.shape:
            count *= length
        if parameter.linear and QUANTISED.search(name):
            total += each * count + row * parameter.shape[0]
        else:
            total += 2 * count
    return int(total)


def wan_work(dim: int, width: int, height: int, frames: int) -> tuple[int, int]:
    """Bytes (reserve, peak) of one forward of a Wan of width `dim`, one of PEAK_PER_TOKEN, in 16
    bits with fused attention. width, height in px. ComfyUI's rule for the reserve: latent pixels x
    2 bytes x 0.01 x dim / 2222 MiB.
    """
    latent = (width // 8) * (height // 8) * ((frames - 1) // 4 + 1)
    return int(latent * 2 * 0.01 * dim / 2222 * MIB), latent // 4 * PEAK_PER_TOKEN[dim]


def fits(device: int, ram_free: int, known: tuple[str, ...]) -> list[Fit]:
    """One Fit per model, format and picture size. device: bytes of memory of the device, 0 if it
    computes in main memory. ram_free: bytes. known: quantised formats that this ComfyUI has.
    """

    def fit(model: str, form: str, job: str, weights: int, work: tuple[int, int]) -> Fit:
        reserve, peak = work
        if device <= 0:
            short = max(0, weights + peak - ram_free)
            return Fit(model, form, job, weights, reserve, peak, None, short, in_ram=True)
        if peak > device:
            return Fit(model, form, job, weights, reserve, peak, None, 0)
        streamed = max(0, weights - max(0, device - reserve))
        return Fit(model, form, job, weights, reserve, peak, streamed, max(0, streamed - ram_free))

    found = []
    for model, config in WAN.items():
        for form, (_, _, name) in FORMATS.items():
            if name is None or name in known:
                for label, (width, height) in SIZES.items():
                    work = wan_work(config.dim, width, height, FRAMES)
                    found.append(fit(model, form, label, wan_bytes(config, form), work))
    for form, size in ENCODER_BYTES.items():
        found.append(fit("Wan text encoder", form, "a prompt", size, ENCODER_WORK))
    found.append(fit("CatVTON", "fp16", "768x1024", CATVTON_BYTES, CATVTON_WORK))
    return found


def pair_lines(ram_free: int, known: tuple[str, ...]) -> list[str]:
    """One line per format on two 14B experts, as Wan 2.2 has, with the text encoder in fp8: what
    main memory takes once both have been copied there.
    """
    lines = []
    for form, (_, _, name) in FORMATS.items():
        if name is None or name in known:
            size = 2 * wan_bytes(WAN["Wan 14B I2V"], form) + ENCODER_BYTES["fp8"]
            short = size - ram_free
            says = f"{megabytes(short)} more than is free" if short > 0 else "fits"
            lines.append(
                f"two experts of 14B {form}, with text encoder ({megabytes(size)}): {says}"
            )
    return lines


def fit_lines(found: list[Fit]) -> list[str]:
    """One line per model and format, its jobs side by side."""
    groups: dict[str, list[Fit]] = {}
    for fit in found:
        head = f"{fit.model} {fit.format} ({megabytes(fit.weights)})"
        groups.setdefault(head, []).append(fit)
    return [f"{head}: {'; '.join(fit.text() for fit in group)}" for head, group in groups.items()]
