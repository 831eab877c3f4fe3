"""Hands the command line to the converter, and to ComfyUI's LoRA readers where they are needed."""

from __future__ import annotations

import importlib
import sys

from ..kernels.errors import FrugalError
from ..kernels.quantize.command import main

READER = "..nodes.lora.merge"


def read_loras(weights, loras):
    """LoRA files as a Merge. Raises FrugalError where ComfyUI cannot be imported."""
    try:
        import comfy.cli_args
        import torch

        # ComfyUI looks for a graphics card when it is imported, and fails where there is none.
        comfy.cli_args.args.cpu = comfy.cli_args.args.cpu or not torch.cuda.is_available()
        reader = importlib.import_module(READER, __package__)
    except ModuleNotFoundError as error:
        if (error.name or "").startswith("frugal"):
            raise
        raise FrugalError(
            f"--lora needs ComfyUI, and '{error.name}' cannot be imported here",
            "ComfyUI's folder as the working folder, and its Python",
            "run the command there",
        ) from error
    return reader.LoraMerge(weights, loras)


if __name__ == "__main__":
    sys.exit(main(loras=read_loras))
