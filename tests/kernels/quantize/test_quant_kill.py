"""Killing the converter at any moment: no half file, and the resumed result is the same bytes.

A process of its own converts a small file in forked children, which ask it before each step, and
kills them within one, so that torch is imported once and no test process is forked.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from frugal.tests.helpers.patience import HANG

pytest.importorskip("comfy_kitchen")
KILLS, STEPS = 10, 24
# argv: folder of the tests, source, target. Prints one line of JSON.
LOOP = """
import importlib.util, json, os, random, signal, sys, time
from pathlib import Path
os.environ["FRUGAL_COMFYUI_TREE"] = "none"
spec = importlib.util.spec_from_file_location("conftest", Path(sys.argv[1]) / "conftest.py")
spec.loader.exec_module(importlib.util.module_from_spec(spec))
import torch
torch.set_num_threads(1)
from frugal.kernels.formats import table
from frugal.kernels.quantize import writer
from frugal.kernels.quantize.convert import convert, uniform
from frugal.kernels.quantize.weights import Weights

source, target = Path(sys.argv[2]), Path(sys.argv[3])
writer.COMMIT_BYTES = 100_000
random.seed(7)

def work(step):
    held = Weights(source)
    return convert(held, target, uniform(held, table.INT8), progress=lambda done, total: step())

def journal():
    path = target.with_name(target.name + ".part.json")
    return path.read_text().count('"groups"') if path.exists() else 0

kills, seen, whole = 0, [], []
while kills < int(sys.argv[4]) and not target.exists():
    (asked, ask), (answered, answer) = os.pipe(), os.pipe()
    child = os.fork()
    if not child:
        os.close(asked), os.close(answer)
        work(lambda: (os.write(ask, b"?"), os.read(answered, 1)))
        os._exit(0)
    os.close(ask), os.close(answered)
    for _ in range(random.randrange(int(sys.argv[5]))):
        # It says nothing any more when it has come to its end.
        if os.read(asked, 1):
            os.write(answer, b"!")
    # Somewhere in the step, wherever that is on this machine.
    time.sleep(random.uniform(0, 0.01))
    os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    os.close(asked), os.close(answer)
    kills += os.WIFSIGNALED(status)
    whole.append(target.exists())
    seen.append(journal())
report = None if target.exists() else work(lambda: None)
print(json.dumps({"kills": kills, "journal": seen, "finished": whole,
                  "resumed": report and report.resumed}))
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="kills forked processes")
def test_ten_kills_lose_nothing(tmp_path):
    from frugal.kernels.formats import table
    from frugal.kernels.quantize.convert import convert, uniform
    from frugal.kernels.quantize.weights import Weights
    from frugal.tests.helpers import wan as bed

    config = bed.variant(bed.T2V, layers=4)
    source = bed.write(tmp_path / "wan.safetensors", bed.base(bed.weights(config))[0])
    whole, killed = tmp_path / "whole.safetensors", tmp_path / "killed" / "out.safetensors"
    killed.parent.mkdir()
    held = Weights(source)
    convert(held, whole, uniform(held, table.INT8))
    tests = Path(__file__).resolve().parents[2]
    words = [str(tests), str(source), str(killed), str(KILLS), str(STEPS)]
    command = [sys.executable, "-P", "-c", LOOP, *words]
    run = subprocess.run(command, capture_output=True, text=True, timeout=HANG)
    assert run.returncode == 0, run.stderr[-3000:]
    told = json.loads(run.stdout.splitlines()[-1])
    assert killed.read_bytes() == whole.read_bytes()
    assert os.listdir(killed.parent) == ["out.safetensors"]
    # Guards: it was killed that often while unfinished, and later runs did not start over.
    assert told["kills"] == KILLS and not any(told["finished"]), told
    assert told["journal"] == sorted(told["journal"]) and told["journal"][-1] > 3, told
    assert told["resumed"] > 3, told
