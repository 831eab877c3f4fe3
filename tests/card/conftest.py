"""Tests on the simulated card: a process per mode, see modes.py; results are those of the CPU."""

from __future__ import annotations

import fcntl
import os
import re
import subprocess
import sys
from pathlib import Path

import comfy.model_management
import comfy.quant_ops
import comfy.sd
import pytest
import torch

from frugal.nodes.wan import load_run
from frugal.tests.card import modes
from frugal.tests.card.bounds import EXACT
from frugal.tests.helpers import sampling
from frugal.tests.helpers import wan as bed

ROOT = Path(__file__).resolve().parents[2]
# What can be quantised on load, by ComfyUI's name, where an older version does not know it.
NEWER = {"int8 ConvRot": "int8_tensorwise", "W4A8": "asym_w4a8_int8"}


class Bench:
    """Loads and samples the tiny Wan of wan_bed as nodes do."""

    def __init__(self, folder: Path):
        self.folder, self.source = folder, bed.weights()
        self.prompts = sampling.two_prompts()

    def write(self, file, name="model"):
        tensors, metadata = file[:2]
        return bed.write(self.folder / f"{name}.safetensors", tensors, metadata)

    def load(self, file, *choices, name="model"):
        for choice in choices:
            form = NEWER.get(choice)
            if form and form not in getattr(comfy.quant_ops, "QUANT_ALGOS", {}):
                pytest.skip(f"this ComfyUI does not know {form}")
        with torch.inference_mode():
            return load_run.load_wan(self.write(file, name), *choices)[0]

    def sample(self, model, steps=2, cfg=3.0, latent=None):
        return sampling.sample(model, self.prompts, steps, cfg=cfg, latent=latent)

    def stock_lora(self, model):
        lora, _ = bed.lora_of(self.source)
        return comfy.sd.load_lora_for_models(model, None, lora, 0.7, 0)[0]


@pytest.fixture
def bench(tmp_path):
    yield Bench(tmp_path)
    comfy.model_management.unload_all_models()


@pytest.fixture
def layouts(bench):
    return bed.fp8_layouts(bench.source)


@pytest.fixture(scope="session")
def reference(request, tmp_path_factory, comfy_tree) -> Path:
    """Folder of the CPU's results, of runs of these very tests."""
    given = os.environ.get("FRUGAL_CARD_REFERENCE")
    folder = Path(given) if given else tmp_path_factory.mktemp("reference")
    folder = folder / comfy_tree.name
    folder.mkdir(parents=True, exist_ok=True)
    if not modes.ON_CARD:
        return folder
    # Several modes at once need it; the first one has it made, and a failure is not tried again.
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (folder / "made").exists():
            (folder / "made").write_text(compute(request, folder, comfy_tree), encoding="utf-8")
    fault = (folder / "made").read_text(encoding="utf-8")
    assert not fault, f"the CPU itself fails:\n{fault}"
    return folder


def compute(request, folder: Path, tree: Path) -> str:
    """Have the CPU run the tests of this session that are compared with it; the end of what it
    says if one fails.
    """
    wanted = [item.nodeid for item in request.session.items if "same_as_cpu" in item.fixturenames]
    command = [sys.executable, "-P", "-m", "pytest", "-q", "-p", "no:cacheprovider", *wanted]
    more = {"FRUGAL_CARD": modes.CPU, "FRUGAL_CARD_REFERENCE": str(folder.parent)}
    more["FRUGAL_COMFYUI_TREE"] = str(tree)
    done = subprocess.run(
        command, cwd=ROOT, env={**os.environ, **more}, capture_output=True, text=True
    )
    return done.stdout[-4000:] if done.returncode else ""


@pytest.fixture
def same_as_cpu(request, reference):
    """check(results, bound): each tensor is within `bound`, relative, of the CPU's; a list has a
    bound for each.
    """
    path = reference / (re.sub(r"\W+", "_", request.node.nodeid.split("/")[-1]) + ".pt")

    def check(results, bound: float | list[float] = EXACT) -> None:
        got = [each.detach().float().cpu() for each in results]
        assert all(bool(each.isfinite().all()) for each in got), "not finite"
        if not modes.ON_CARD:
            torch.save(got, path)
            return
        want = torch.load(path)
        assert [each.shape for each in got] == [each.shape for each in want]
        off = [float((g - w).norm() / w.norm()) for g, w in zip(got, want, strict=True)]
        bounds = bound if isinstance(bound, list) else [bound] * len(off)
        held = all(o <= b for o, b in zip(off, bounds, strict=True))
        assert held, f"relative to the CPU's: {off}, at most {bounds}"

    return check


@pytest.fixture(autouse=True)
def sound_handles():
    """No test may leave native memory freed twice, or by a copy."""
    if not modes.ON_CARD:
        yield
        return
    from frugal.tests.card.simulated_cuda import aimdo

    before = {fault: aimdo.counts[fault] for fault in aimdo.FAULTS}
    yield
    found = {f: aimdo.counts[f] - n for f, n in before.items() if aimdo.counts[f] > n}
    assert not found, f"handles of comfy-aimdo: {found}"
