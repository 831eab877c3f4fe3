"""What this machine and this ComfyUI can do for the models of this pack: facts first, then
findings, then sentences.

Compute capabilities: those of the number formats stand in FORMATS (constraints of comfy-kitchen's
kernels, and of fp8 matrix units), those of attention kernels in the table of `kernels/attention`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from ..attention.backends import NAMED, dotted
from ..attention.backends import Backend as Kernel
from ..checkpoints.layouts import WITH_FLOAT8
from ..formats.hardware import FORMATS, INTEGER, Capability
from ..report import megabytes
from .fit import FRAMES, Fit, fit_lines, fits, pair_lines
from .verdict import best_fit, which_file

NATIVE, PLAIN, EMULATED, UNKNOWN = "native", "plain PyTorch", "emulated", "not known"
IMPOSSIBLE = "not possible"
REFERENCE = "eager"
# ComfyUI switches comfy-kitchen's compiled kernels off below this, and CUDA 13 left older cards.
CUDA_13, CARD_OF_CUDA_13 = (13,), (7, 5)
# Import name -> (name, the kernel with its limits, ComfyUI's name for it, switch that makes it the
# default). SageAttention 3 is no kernel of ours; its 4-bit units begin with that card.
ATTENTION: dict[str, tuple[str, Kernel, str | None, str | None]] = {
    "flash_attn": ("FlashAttention 2", NAMED["flash-attn-2"], "flash", "--use-flash-attention"),
    "flash_attn_interface": ("FlashAttention 3", NAMED["flash-attn-3"], None, None),
    "sageattention": ("SageAttention", NAMED["sage"], "sage", "--use-sage-attention"),
    "sageattn3": ("SageAttention 3", replace(NAMED["sage"], least=(12, 0)), "sage3", None),
    "xformers": ("xFormers", NAMED["xformers"], "xformers", None),
}
SLOW_ATTENTION = ("sub_quad", "split", "basic")


@dataclass(frozen=True)
class Backend:
    """State of one comfy-kitchen backend. reason: its own words for being unavailable. kernels:
    name -> least compute capability, None for any device.
    """

    available: bool
    disabled: bool
    reason: str | None = None
    kernels: dict[str, Capability | None] = field(default_factory=dict)

    def runs(self, kernel: str, capability: Capability | None) -> bool:
        """Whether this backend computes `kernel` on a device of `capability`."""
        if not self.available or self.disabled or kernel not in self.kernels:
            return False
        least = self.kernels[kernel]
        return least is None or (capability is not None and capability >= least)


@dataclass(frozen=True)
class Facts:
    """What was found. Memory in bytes; versions as text, None if absent.

    kind: torch's device type. capability: of an NVIDIA device, else None. reserved: what ComfyUI
    keeps free on the device. streaming: its dynamic VRAM is on. kitchen_used: it computes through
    comfy-kitchen. formats: quantised formats that it knows; emulated: those that it says it expands
    on this device. no_float8, no_int8: why the device cannot hold 8-bit floats, and why PyTorch
    does not multiply int8 there; "" where it can. attention: import name -> version of the packages
    found. registered: attention functions of ComfyUI; active: the one in use. sdpa: back ends that
    PyTorch's attention may use.
    """

    comfyui: str | None
    torch: str
    cuda: str | None
    device: str
    kind: str
    capability: Capability | None
    memory_total: int
    memory_free: int
    ram_total: int
    ram_free: int
    reserved: int = 0
    streaming: bool = False
    kitchen: str | None = None
    kitchen_used: bool = False
    backends: dict[str, Backend] = field(default_factory=dict)
    formats: tuple[str, ...] = ()
    emulated: tuple[str, ...] = ()
    no_float8: str = ""
    no_int8: str = ""
    attention: dict[str, str | None] = field(default_factory=dict)
    registered: tuple[str, ...] = ()
    active: str = ""
    sdpa: tuple[str, ...] = ()
    numba: str | None = None
    triton: str | None = None
    gguf: str | None = None


@dataclass(frozen=True)
class Finding:
    """One thing, its state, and what follows from it."""

    name: str
    state: str
    meaning: str

    def text(self) -> str:
        return f"{self.name}: {self.state}" + (f"; {self.meaning}" if self.meaning else "")


@dataclass(frozen=True)
class Diagnosis:
    """What the Doctor found, in the parts that its report has."""

    facts: Facts
    backends: tuple[Finding, ...]
    formats: tuple[Finding, ...]
    attention: tuple[Finding, ...]
    packages: tuple[Finding, ...]
    models: tuple[Fit, ...]
    pairs: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """Every fact and finding, JSON-ready."""
        return asdict(self)

    def json(self) -> str:
        return json.dumps(self.to_dict())

    def verdict(self) -> list[str]:
        """Which file to take, what fits, and what attention runs."""
        facts = self.facts
        native = {each.name for each in self.formats if each.state == NATIVE}
        known = {each.name for each in self.formats if each.state not in (UNKNOWN, IMPOSSIBLE)}
        lines = [which_file(facts.device, facts.kind, native, known), best_fit(self.models)]
        memory = f"{megabytes(facts.ram_free)} of {megabytes(facts.ram_total)} RAM free"
        if facts.kind not in ("cpu", "mps"):
            own = f"{megabytes(facts.memory_free)} of {megabytes(facts.memory_total)} free"
            memory = f"{own}; {memory}"
        usable = [each.name for each in self.attention if each.state == "usable"]
        faster = f"; also usable: {', '.join(usable)}" if usable else ""
        lines += [memory, f"attention in use: {facts.active or 'unknown'}{faster}"]
        return [line for line in lines if line]

    def text(self) -> str:
        """The same as lines of text, what to do first."""
        sections = (
            ("comfy-kitchen", [each.text() for each in self.backends]),
            ("Quantised formats", [each.text() for each in self.formats]),
            ("Attention", [each.text() for each in self.attention]),
            ("Packages", [each.text() for each in self.packages]),
            (f"Models ({FRAMES} frames of video)", fit_lines(list(self.models))),
            ("Main memory, if everything is copied there", list(self.pairs)),
        )
        lines = [*self.verdict(), "", *_machine_lines(self.facts)]
        for title, body in sections:
            lines += ["", title, *body]
        return "\n".join(lines)


def diagnose(facts: Facts) -> Diagnosis:
    """All findings that follow from the facts."""
    own_memory = 0 if facts.kind in ("cpu", "mps") else facts.memory_total - facts.reserved
    return Diagnosis(
        facts,
        tuple(_backends(facts)),
        tuple(_format(facts, name) for name in FORMATS),
        tuple(_attention(facts)),
        tuple(_packages(facts)),
        tuple(fits(own_memory, facts.ram_free, facts.formats)),
        tuple(pair_lines(facts.ram_free, facts.formats)),
    )


def _machine_lines(facts: Facts) -> list[str]:
    built = f"built for CUDA {facts.cuda}" if facts.cuda else "built without CUDA"
    lines = [f"ComfyUI {facts.comfyui or 'of unknown version'}, torch {facts.torch} ({built})"]
    device = f"device {facts.device}"
    if facts.capability:
        device += f", compute capability {dotted(facts.capability)}"
    if facts.kind not in ("cpu", "mps"):
        device += f", {megabytes(facts.memory_free)} free of {megabytes(facts.memory_total)}"
    lines.append(device)
    lines.append(f"RAM {megabytes(facts.ram_free)} free of {megabytes(facts.ram_total)}")
    if facts.kind == "cpu" and facts.cuda:
        lines.append(
            "torch is built for CUDA, but ComfyUI computes on the CPU: no GPU or driver was found, "
            "or it was started with --cpu"
        )
    if facts.kind == "cpu":
        lines.append(
            "a Wan 14B step at 480p is about 3,400 TFLOP with guidance: hours on a CPU; use tiny "
            "models or short clips here"
        )
    if facts.kind not in ("cpu", "mps"):
        lines.append(
            "weights are streamed by ComfyUI's dynamic VRAM"
            if facts.streaming
            else "dynamic VRAM is off: what does not fit stays in RAM and is copied layer by layer"
        )
    return lines


def _backends(facts: Facts) -> list[Finding]:
    if not facts.kitchen_used:
        state = f"{facts.kitchen} installed but not used" if facts.kitchen else "not installed"
        meaning = (
            "this ComfyUI does not know it; update ComfyUI for int8 and 4-bit formats"
            if facts.kitchen
            else "quantised formats run through PyTorch, if ComfyUI knows them"
        )
        return [Finding("comfy-kitchen", state, meaning)]
    return [
        Finding(f"backend {name}", *_backend_state(facts, name, backend))
        for name, backend in sorted(facts.backends.items())
    ]


def _backend_state(facts: Facts, name: str, backend: Backend) -> tuple[str, str]:
    if not backend.available:
        return "unavailable", backend.reason or "no reason given"
    if not backend.disabled:
        return "on", ""
    if name == "cuda":
        why = why_compiled_off(facts.cuda, facts.capability)
        if why:
            return "off", why
    if name == "triton":
        return "off", "ComfyUI leaves it off unless it is started with --enable-triton-backend"
    return "off", "switched off by another part of ComfyUI"


def integer_backend(
    name: str, backends: Mapping[str, Backend], capability: Capability | None
) -> str | None:
    """Which of comfy-kitchen's backends multiplies in this format of INTEGER with kernels of its
    own on such a device, None where PyTorch's products are all there is.
    """
    able = (k for k, b in backends.items() if k != REFERENCE and b.runs(INTEGER[name], capability))
    return next(able, None)


def why_plain(name: str, capability: Capability | None) -> str:
    """Why there is no `integer_backend`."""
    least = FORMATS[name][1]
    if capability is not None and capability >= least:
        return "comfy-kitchen's kernels for it are off"
    return f"native from compute capability {dotted(least)} (NVIDIA)"


def why_compiled_off(cuda: str | None, capability: Capability | None) -> str:
    """Why ComfyUI switches comfy-kitchen's compiled kernels off under a torch built for this CUDA
    ("" if it does not), and what helps on such a card.
    """
    if not cuda:
        return "torch is built without CUDA"
    if _version(cuda) >= CUDA_13:
        return ""
    why = f"ComfyUI switches it off because torch is built for CUDA {cuda}; "
    if capability is not None and capability < CARD_OF_CUDA_13:
        return why + (
            f"CUDA 13 has no code for cards before compute capability {dotted(CARD_OF_CUDA_13)}, "
            "so this card uses PyTorch's own matmuls"
        )
    return why + "install a torch built for CUDA 13.0 or newer"


def _version(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in text.split(".") if part.isdigit())


def _format(facts: Facts, name: str) -> Finding:
    label, least = FORMATS[name]
    if name not in facts.formats:
        return Finding(
            label,
            UNKNOWN,
            "this ComfyUI has no quantised tensor for it, and Load Wan Model says so when a file "
            "needs it; update ComfyUI",
        )
    if facts.no_float8 and name in WITH_FLOAT8:
        return Finding(
            label,
            IMPOSSIBLE,
            f"{facts.device} has no 8-bit floats ({facts.no_float8}); use a file in 16 bits, int8, "
            "GPTQ, AWQ or GGUF",
        )
    needs = f"compute capability {dotted(least)} (NVIDIA)"
    able = facts.capability is not None and facts.capability >= least
    if name in INTEGER:
        key = integer_backend(name, facts.backends, facts.capability)
        if key is not None:
            return Finding(label, NATIVE, f"through comfy-kitchen's {key} kernels")
        why = why_plain(name, facts.capability)
        if facts.no_int8:
            why += f", and PyTorch has no integer matmul here ({facts.no_int8})"
            return Finding(label, EMULATED, f"{why}: it saves memory and no time")
        return Finding(label, PLAIN, f"{why}: it saves memory, but little or no time")
    if able and name in facts.emulated:
        return Finding(
            label, EMULATED, "the device could, this torch or system cannot; update torch"
        )
    if able:
        return Finding(label, NATIVE, "the device multiplies in it where the loader asks for that")
    return Finding(
        label,
        EMULATED,
        f"native from {needs}: weights are dequantised to 16 or 32 bits layer by layer, which "
        "saves memory and no time",
    )


def _attention(facts: Facts) -> list[Finding]:
    found = [Finding("in use", facts.active or "unknown", _active_meaning(facts))]
    for package, version in facts.attention.items():
        label, kernel, name, switch = ATTENTION[package]
        label = f"{label} {version}" if version else label
        why = kernel.refused_card(facts.capability)
        if facts.kind == "cuda" and facts.capability is None:
            found.append(Finding(label, "found, not checked on this device", ""))
        elif facts.capability is None:
            found.append(Finding(label, "no use here", "runs on an NVIDIA GPU"))
        elif why is not None:
            found.append(Finding(label, "no use here", why))
        elif name is not None and name == facts.active:
            found.append(Finding(label, "in use", ""))
        elif name is not None and name in facts.registered:
            how = f"ComfyUI started with {switch} uses it" if switch else "nodes can choose it"
            found.append(Finding(label, "usable", how))
        else:
            found.append(Finding(label, "found, not taken up by ComfyUI", ""))
    if not facts.attention:
        found.append(
            Finding("packages", "none of " + ", ".join(v[0] for v in ATTENTION.values()), "")
        )
    if facts.kind == "cuda":
        fused = [name for name in facts.sdpa if name != "math"]
        found.append(
            Finding(
                "PyTorch's back ends",
                ", ".join(facts.sdpa) or "none",
                ""
                if fused
                else "no fused one is on: CatVTON at 768x1024 then needs 19.3 GB for its scores",
            )
        )
    return found


def _active_meaning(facts: Facts) -> str:
    if facts.active in SLOW_ATTENTION:
        return "slower than PyTorch's own in fp32; --use-pytorch-cross-attention chooses that"
    if facts.active in ("sage", "sage3", "comfy_kitchen_int8"):
        return "8 bits or fewer inside, so results differ a little from full precision"
    return ""


def _packages(facts: Facts) -> list[Finding]:
    absent = {
        "numba": "mask nodes use the slower reference code; install numba",
        "triton": (
            "torch.compile, flex attention and comfy-kitchen's Triton kernels are off, everything "
            "else works; for Windows the package is called triton-windows"
        ),
        "gguf": "GGUF files cannot be loaded; install gguf",
    }
    return [
        Finding(name, getattr(facts, name) or "not found", "" if getattr(facts, name) else meaning)
        for name, meaning in absent.items()
    ]
