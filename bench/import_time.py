"""What the pack adds to ComfyUI's start: python bench/import_time.py RESULT.json TREE [TREE ...]

ComfyUI is started and ends by itself once its nodes are loaded (`--quick-test-for-ci`), with an
empty custom_nodes folder and with the pack in it, in turn. Processor seconds are of the whole
process; the least of the rounds counts, because a shared machine only ever adds. ComfyUI's own
figure for the import of the pack is kept beside it.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import harness

ROUNDS = 5
# What the pack may add, in seconds of one core.
LIMIT = 0.3


def start(tree: Path, base: Path) -> dict[str, float]:
    """One start of the ComfyUI in `tree`; raises when it fails or a pack does not load."""
    for name in ("models", "input", "output", "temp", "user", "custom_nodes", "web"):
        (base / name).mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "main.py", "--cpu", "--quick-test-for-ci", "--disable-auto-launch"]
    command += ["--base-directory", str(base), "--database-url", "sqlite:///:memory:"]
    command += ["--front-end-root", str(base / "web")]
    if "--disable-api-nodes" in (tree / "comfy" / "cli_args.py").read_text(encoding="utf-8"):
        command.append("--disable-api-nodes")
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    before, begun = os.times(), time.monotonic()
    done = subprocess.run(
        command, cwd=tree, env=environment, capture_output=True, text=True, encoding="utf-8"
    )
    wall, after = time.monotonic() - begun, os.times()
    log = done.stdout + done.stderr
    if done.returncode or "(IMPORT FAILED)" in log:
        raise SystemExit(f"ComfyUI did not start:\n{log[-3000:]}")
    processor = sum(
        getattr(after, name) - getattr(before, name)
        for name in ("children_user", "children_system")
    )
    found = {"processor_seconds": processor, "wall_seconds": wall}
    if own := re.search(r"([\d.]+) seconds: .*comfyui-frugal", log):
        found["import_seconds_by_comfyui"] = float(own.group(1))
    return found


def measure(tree: Path) -> dict[str, Any]:
    """Both ways of starting, in turn, and what the pack adds."""
    rounds: dict[str, list[dict[str, float]]] = {"without": [], "with": []}
    with tempfile.TemporaryDirectory() as place:
        linked = Path(place) / "with" / "custom_nodes" / "comfyui-frugal"
        linked.parent.mkdir(parents=True)
        linked.symlink_to(harness.ROOT, target_is_directory=True)
        for way in rounds:  # the first starts read from the disk, and compile Python's files
            start(tree, Path(place) / way)
        for _ in range(ROUNDS):
            for way, seen in rounds.items():
                seen.append(start(tree, Path(place) / way))
    least = {way: min(one["processor_seconds"] for one in seen) for way, seen in rounds.items()}
    added = least["with"] - least["without"]
    return {
        "tree": tree.name,
        "processor_seconds": {way: round(value, 3) for way, value in least.items()},
        "added_seconds": round(added, 3),
        "ratio": round(least["with"] / least["without"], 4),
        "import_seconds_by_comfyui": min(
            one["import_seconds_by_comfyui"] for one in rounds["with"]
        ),
        "limit_seconds": LIMIT,
        "met": added <= LIMIT,
        "rounds": {
            way: [round(one["processor_seconds"], 3) for one in seen]
            for way, seen in rounds.items()
        },
    }


def main() -> None:
    out, *trees = map(Path, sys.argv[1:])
    result = {
        "commit": harness.commit(),
        "python": sys.version.split()[0],
        "load_average": list(os.getloadavg()) if hasattr(os, "getloadavg") else [],
        "rows": [measure(tree.resolve()) for tree in trees],
    }
    harness.write(out, result)
    for row in result["rows"]:
        print(f"{row['tree']}: +{row['added_seconds']} s, x{row['ratio']}")


if __name__ == "__main__":
    main()
