"""The command line of the converter: arguments in, progress on stderr, the report on stdout."""

from __future__ import annotations

import argparse
import math
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from ..errors import FrugalError
from ..formats import table
from . import gptq_layer
from .calibration import read_calibration
from .compiled import follow_comfyui
from .convert import Merge
from .request import ALLOWED, Job, Progress, budget_bytes, check_device, run
from .vllm_folder import ServerJob, export
from .weights import Weights

NAMES = {
    "bf16": table.BF16,
    "fp8": table.FP8,
    "int8": table.INT8,
    "w4a8": table.W4A8,
    "w4a8-g64": table.W4A8_G64,
    "awq": table.AWQ,
}
# Not a format of a file for ComfyUI but a folder for a server.
SERVER = "vllm-int4"
LoraReader = Callable[[Weights, Sequence[tuple[Path, float]]], Merge]
WIDTH = 30


def parser() -> argparse.ArgumentParser:
    """The arguments of `python -m frugal.quantize`."""
    found = argparse.ArgumentParser(
        prog="python -m frugal.quantize",
        description="Converts a Wan model to ComfyUI's own quantised formats, or in INT4 as a "
        "folder for vLLM-Omni. An interrupted run resumes when the same command is given again.",
    )
    found.add_argument("source", type=Path, help="a model file, or the index of a model in parts")
    found.add_argument(
        "target", type=Path, help=f"the safetensors file to write; the folder with --to {SERVER}"
    )
    goal = found.add_mutually_exclusive_group(required=True)
    goal.add_argument(
        "--to", choices=[*NAMES, SERVER], help="format of the large layers of the blocks"
    )
    goal.add_argument(
        "--budget",
        type=float,
        metavar="GB",
        help="size of all weights in GB (10^9 bytes); every layer gets a format by measured error",
    )
    found.add_argument(
        "--allow",
        default=",".join(name for name, label in NAMES.items() if label in ALLOWED),
        metavar="FORMAT,...",
        help="formats that --budget may choose (default: %(default)s)",
    )
    found.add_argument("--calibration", type=Path, help="a file that FrugalCalibrate wrote")
    found.add_argument(
        "--lora",
        action="append",
        default=[],
        metavar="FILE:STRENGTH",
        help="merge a LoRA before quantising; may be given more than once; needs ComfyUI",
    )
    found.add_argument(
        "--rest",
        type=Path,
        metavar="FOLDER",
        help=f"with --to {SERVER}: the unquantised model as diffusers saves it, whose other parts "
        "are taken over (default: the transformer alone is written)",
    )
    found.add_argument(
        "--group-size",
        type=int,
        choices=gptq_layer.GROUPS,
        default=gptq_layer.GROUPS[-1],
        help=f"with --to {SERVER}: weights that share a scale (default: %(default)s)",
    )
    found.add_argument("--report", action="store_true", help="measure every layer's error")
    found.add_argument("--device", default=None, help="where to compute (default: cuda, else cpu)")
    found.add_argument("--overwrite", action="store_true", help="replace the target if it exists")
    return found


def main(arguments: Sequence[str] | None = None, loras: LoraReader | None = None) -> int:
    """Run the command; 0 if the file was written, 1 with one sentence on stderr if not, 130 if it
    was interrupted. `loras` reads LoRA files.
    """
    given = parser().parse_args(arguments)
    try:
        wanted = [_lora(text) for text in given.lora]

        def merge_for(weights: Weights) -> Merge | None:
            return _merge(weights, wanted, loras)

        if given.to == SERVER:
            job = _server_job(given)
            with _Bar() as bar:
                outcome = export(job, merge_for, lambda done, total: bar("write", done, total))
        else:
            with _Bar() as bar:
                outcome = run(_job(given), merge_for, bar)
    except FrugalError as error:
        print(error, file=sys.stderr)  # noqa: T201
        return 1
    except KeyboardInterrupt:
        print(  # noqa: T201
            f"stopped; the same command resumes from here, or delete {given.target.name}.part*",
            file=sys.stderr,
        )
        return 130
    print(outcome.text())  # noqa: T201
    return 0


def _job(given: argparse.Namespace) -> Job:
    if given.rest is not None:
        raise FrugalError(f"--rest without --to {SERVER}", "a folder for a server", "leave it out")
    allowed = []
    for name in filter(None, given.allow.split(",")):
        if name.strip() not in NAMES:
            raise FrugalError(
                f"--allow names {ascii(name)[:40]}",
                f"names of {', '.join(NAMES)}",
                "correct the command",
            )
        allowed.append(NAMES[name.strip()])
    return Job(
        given.source,
        given.target,
        NAMES[given.to] if given.to else None,
        budget_bytes(given.budget or 0),
        tuple(allowed),
        given.calibration,
        _device(given),
        given.overwrite,
        given.report,
    )


def _server_job(given: argparse.Namespace) -> ServerJob:
    if given.overwrite or given.report:
        raise FrugalError(
            f"--{'overwrite' if given.overwrite else 'report'} with --to {SERVER}",
            "neither --overwrite nor --report, which are for files",
            "leave it out, and delete a folder that is in the way yourself",
        )
    known = None if given.calibration is None else read_calibration(given.calibration)
    check_device(_device(given))
    return ServerJob(
        given.source, given.target, given.rest, given.group_size, known, _device(given)
    )


def _device(given: argparse.Namespace) -> str:
    device = given.device or ("cuda" if torch.cuda.is_available() else "cpu")
    if device.startswith("cuda"):
        follow_comfyui()
    return device


def _lora(text: str) -> tuple[Path, float]:
    path, sign, strength = text.rpartition(":")
    # A colon may also be that of a drive letter.
    if not sign or "/" in strength or "\\" in strength:
        path, strength = text, "1"
    try:
        found = (Path(path), float(strength))
    except ValueError as error:
        raise FrugalError(
            f"--lora {ascii(text)[:80]}", "FILE:STRENGTH with a number", "correct the command"
        ) from error
    if not math.isfinite(found[1]):
        raise FrugalError(
            f"--lora with a strength of {found[1]:g}", "a number", "correct the command"
        )
    if not found[0].is_file():
        raise FrugalError(f"no LoRA file {found[0].name}", "a safetensors file", "check the path")
    return found


def _merge(
    weights: Weights, wanted: Sequence[tuple[Path, float]], loras: LoraReader | None
) -> Merge | None:
    if not wanted:
        return None
    if loras is None:
        raise FrugalError("a LoRA", "ComfyUI, whose readers are used", "run it where ComfyUI is")
    return loras(weights, wanted)


class _Bar:
    """A line on stderr that says how far the work is; without a terminal, a line per tenth."""

    def __init__(self) -> None:
        self._live = sys.stderr.isatty()
        self._stage, self._shown, self._when = "", -1.0, 0.0
        self._started = time.monotonic()

    def __enter__(self) -> Progress:
        return self._show

    def __exit__(self, *_: object) -> None:
        if self._live and self._stage:
            sys.stderr.write("\n")

    def _show(self, stage: str, done: float, total: float) -> None:
        now, part = time.monotonic(), done / total if total else 1.0
        if stage != self._stage:
            self._stage, self._shown, self._started = stage, -1.0, now
        elif part < 1 and (now - self._when < 0.2 if self._live else part < self._shown + 0.1):
            return
        if part == self._shown:
            return
        self._when, self._shown = now, part
        left = (now - self._started) * (1 - part) / part if part else 0.0
        bar = "#" * int(WIDTH * part) + "." * (WIDTH - int(WIDTH * part))
        start, end = ("\r", "") if self._live else ("", "\n")
        sys.stderr.write(f"{start}{stage:8} [{bar}] {100 * part:5.1f} % {left:6.0f} s left{end}")
        sys.stderr.flush()
