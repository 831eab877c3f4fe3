"""The first lines of Doctor's report: which file to take on this machine, and why."""

from __future__ import annotations

from ..report import megabytes
from .fit import Fit

# Of what is native or saves memory, the smallest file first; what comes in public Wan files.
TAKEN = ("W4A8", "int8", "fp8 e4m3")
SHORT = {"fp8 e4m3": "fp8"}
HOME_OF_14B = "Wan 14B I2V"


def _listed(names: list[str], last: str) -> str:
    short = [SHORT.get(name, name) for name in names]
    return short[0] if len(short) == 1 else f"{', '.join(short[:-1])} {last} {short[-1]}"


def which_file(device: str, kind: str, native: set[str], known: set[str]) -> str:
    """native: labels of FORMATS that the device multiplies in. known: those that ComfyUI reads."""
    if kind == "cpu":
        return "CPU: take tiny models and short clips; a Wan 14B step takes hours here"
    fast = [name for name in TAKEN if name in native]
    slow = [name for name in TAKEN if name in known and name not in native]
    verb = "save" if len(slow) > 1 else "saves"
    saves = f"{_listed(slow, 'and')} only {verb} memory here" if slow else ""
    if fast:
        return f"{device}: take {_listed(fast, 'or')}" + (f"; {saves}" if saves else "")
    if slow:
        return f"{device}: take 16 bits where it fits; {saves}"
    return f"{device}: take 16 bits or GGUF; update ComfyUI for int8 and W4A8"


def best_fit(models: tuple[Fit, ...]) -> str:
    """What becomes of the 14B model at 480p on a device with memory of its own, in the format
    that streams least.
    """
    found = [each for each in models if each.model == HOME_OF_14B and each.job == "480p"]
    if not found or found[0].in_ram:
        return ""
    best = min(found, key=lambda each: (each.streamed is None, each.streamed or 0, -each.weights))
    if best.streamed is None:
        return f"{HOME_OF_14B} at 480p: too large for this device"
    how = f"streams {megabytes(best.streamed)} from RAM in every step" if best.streamed else "fits"
    return f"{HOME_OF_14B} in {best.format} at 480p: {how}"
