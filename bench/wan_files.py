"""Measures docs/wan-files.md: what ComfyUI's own loader and this pack make of each file layout.

One run per ComfyUI tree: `python bench/wan_files.py TREE results.json`; `python bench/wan_files.py
--table A.json B.json` prints the table. A figure is ||out - exact|| / ||exact|| of one forward of
a tiny Wan in fp32 on the CPU, where `exact` is the model with the very weights that the bytes
stand for.
"""

from __future__ import annotations

import json
import logging
import sys
import tempfile
from pathlib import Path

import harness


def measure(tree: Path, out: Path) -> None:
    harness.enter(tree)
    import comfy.sd
    import torch

    from frugal.nodes.wan import load_run
    from frugal.tests.helpers import wan as bed
    from frugal.tests.helpers.native_formats import tolerance

    logging.disable(logging.CRITICAL)
    given = bed.inputs()

    def forward(patcher) -> torch.Tensor:
        return patcher.model.diffusion_model(**given)

    def reference(weights) -> torch.Tensor:
        exact = {name: tensor.float() for name, tensor in weights.items()}
        return forward(
            comfy.sd.load_diffusion_model_state_dict(exact, model_options={"dtype": torch.float32})
        )

    def outcome(load, expected) -> str:
        try:
            patcher = load()
            found = forward(patcher)
        except Exception as error:
            name = type(error).__name__
            return f"refused: {error.found}" if name == "FrugalError" else f"{name}"
        return f"{bed.relative(found, expected):.2e}"

    rows = {}
    with tempfile.TemporaryDirectory() as folder, torch.inference_mode():
        for label, (path, meant) in bed.layout_files(Path(folder)).items():
            expected = reference(meant)
            rows[label] = {
                "native": outcome(lambda p=path: comfy.sd.load_diffusion_model(str(p)), expected),
                "pack": outcome(lambda p=path: load_run.load_wan(p)[0], expected),
                "tolerance": tolerance(label),
            }
    result = {"tree": tree.name, "torch": torch.__version__, "device": "cpu", "rows": rows}
    harness.write(out, result)


def judged(text: str, tolerance: float) -> str:
    if text.startswith("refused"):
        return "refused, says why"
    try:
        error = float(text)
    except ValueError:
        return text
    if error != error:
        return "**NaN**"
    shown = "0" if error == 0 else text
    return shown if error <= tolerance else f"**{shown}**"


def table(*files: str) -> str:
    results = [json.loads(Path(file).read_text("utf-8")) for file in files]
    versions = [result["tree"].rpartition("-")[2] for result in results]
    heads = [f"{who} {version}" for version in versions for who in ("native", "pack on")]
    lines = ["| layout | " + " | ".join(heads) + " |", "|---|" + "---|" * len(heads)]
    for label in results[0]["rows"]:
        cells = [
            judged(result["rows"][label][who], result["rows"][label]["tolerance"])
            for result in results
            for who in ("native", "pack")
        ]
        lines.append(f"| {label} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    if sys.argv[1] == "--table":
        print(table(*sys.argv[2:]))
    else:
        measure(Path(sys.argv[1]), Path(sys.argv[2]))
