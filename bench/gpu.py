"""Everything that only a real card can tell, in one run and one JSON; `python dev.py gpu` calls it.

`python bench/gpu.py TREE RESULT.json [--minutes 8] [--parts NAME ...] [--folder DIR] [--tiny]`.
Every part is a process of its own with a time limit. One that fails, crashes or comes to its limit
is noted with what it had found by then, and the next begins. The JSON is rewritten after every
part. `--tiny` cuts every size down and also runs on the CPU: it shows that the command works and
says nothing about a card. Such a run, and one on a simulated card, is marked in its JSON and is not
let into bench/results.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import harness
from gpu_graphs import NATIVE

BENCH = harness.ROOT / "bench"
ENVIRONMENT = "environment"
# Less is not worth the start of a part.
SHORTEST = 15.0
DONE, FAILED, TIMED_OUT, NOT_RUN = "done", "failed", "time limit", "not run"


@dataclass(frozen=True)
class Given:
    """What a part's command line is made of."""

    tree: Path
    folder: Path
    tiny: bool

    def result(self, name: str) -> Path:
        return self.folder / f"{name}.json"


@dataclass(frozen=True)
class Part:
    """limit: seconds. command: the process. read: its findings, from the file that it was told."""

    name: str
    limit: float
    command: Callable[[Given], list[str]]
    read: Callable[[Path], Any]


def read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text("utf-8"))
    except FileNotFoundError:
        return None


def read_tests(path: Path) -> Any:
    """Counts, what the tests recorded, and the first line of each failure."""
    if not path.exists():
        return None
    cases = list(xml.etree.ElementTree.parse(path).iter("testcase"))
    found: dict[str, Any] = {"passed": 0, "skipped": {}, "failed": {}, "recorded": {}}
    for case in cases:
        name = f"{case.get('classname', '').rpartition('.')[2]}::{case.get('name')}"
        recorded = {each.get("name"): each.get("value") for each in case.iter("property")}
        if recorded:
            found["recorded"][name] = recorded
        for kind, key in (("failure", "failed"), ("error", "failed"), ("skipped", "skipped")):
            said = case.find(kind)
            if said is not None:
                found[key][name] = (said.get("message") or "").split("\n")[0][:300]
                break
        else:
            found["passed"] += 1
    return found


def script(name: str, *arguments: str) -> list[str]:
    return [str(BENCH / f"{name}.py"), *arguments]


def graphs(name: str) -> Callable[[Given], list[str]]:
    def command(given: Given) -> list[str]:
        places = (given.tree, given.result(name), given.folder)
        return script("gpu_graphs", name, *map(str, places), *(["--tiny"] if given.tiny else []))

    return command


def attention(given: Given) -> list[str]:
    shrink = ["--shrink", "256"] if given.tiny else []
    return script("attention", str(given.tree), str(given.result("attention")), *shrink)


def catvton_diffusers(given: Given) -> list[str]:
    real = "--size 768x1024 --steps 10 --rounds 2 --device cuda --contenders"
    command = [*real.split(), "diffusers fp16,ours fp16,ours int8"]
    if given.tiny:
        tiny = "--size 64x96 --steps 1 --rounds 1 --width 64 --contenders"
        command = [*tiny.split(), "diffusers fp32,ours fp32"]
    out = ["--out", str(given.result("catvton_diffusers"))]
    return script("catvton", str(given.tree), *command, *out)


def causal(given: Given) -> list[str]:
    size = ["--size", "tiny", "--seconds", "1"] if given.tiny else ["--seconds", "5"]
    return script("causal_speed", str(given.tree), str(given.result("causal")), *size)


def step_time(given: Given) -> list[str]:
    size = "tiny" if given.tiny else "1.3b"
    ways = ["--ways", "attention"] if given.tiny else ["--ways", "attention", "compiled"]
    weights = ["--weights", "resident", "--rounds", "1"]
    out = str(given.result("step_time"))
    return script("step_time", str(given.tree), out, "--size", size, *ways, *weights)


def tests(given: Given) -> list[str]:
    report = f"--junitxml={given.result('tests')}"
    # -P: with the checkout on the import path, `nodes` would be ours and not ComfyUI's.
    return ["-P", "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/gpu", report]


# The most telling first: what does not fit into the time is left out.
PARTS = (
    Part(ENVIRONMENT, 60, graphs(ENVIRONMENT), read_json),
    *(Part(name, limit, graphs(name), read_json) for name, limit in (
        ("wan_14b_w4a8", 150), ("catvton", 75), ("wan_1.3b", 90),
    )),
    Part("attention", 75, attention, read_json),
    *(Part(name, 110, graphs(name), read_json) for name in ("wan_14b_fp8", "wan_14b_int8")),
    Part("tests", 120, tests, read_tests),
    Part("catvton_diffusers", 60, catvton_diffusers, read_json),
    Part("causal", 90, causal, read_json),
    Part("step_time", 120, step_time, read_json),
)  # fmt: skip


def end(process: subprocess.Popen[bytes]) -> None:
    """End a part and all that it started."""
    import psutil

    try:
        below = psutil.Process(process.pid).children(recursive=True)
    except psutil.NoSuchProcess:
        below = []
    process.kill()
    for child in below:
        with contextlib.suppress(psutil.NoSuchProcess):
            child.kill()
    psutil.wait_procs(below, timeout=20)
    process.wait()


def run(part: Part, given: Given, seconds: float) -> dict[str, Any]:
    """Run one part for at most so many seconds; how it ended and what it found, never raises."""
    start, log = time.monotonic(), given.folder / f"{part.name}.log"
    # The limits are for a card; a machine without one may take its time.
    limit = seconds if given.tiny else min(part.limit, seconds)
    entry: dict[str, Any] = {"state": FAILED, "limit_s": round(limit, 1)}
    tree = {"FRUGAL_COMFYUI_TREE": str(given.tree), "OMP_WAIT_POLICY": "PASSIVE"}
    try:
        with log.open("wb") as output:
            process = subprocess.Popen(
                [sys.executable, *part.command(given)],
                cwd=harness.ROOT,
                env={**os.environ, **tree},
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
            )
            try:
                code = process.wait(limit)
                entry["state"] = DONE if code == 0 else FAILED
            except subprocess.TimeoutExpired:
                entry["state"] = TIMED_OUT
            finally:
                end(process)
        entry["result"] = part.read(given.result(part.name))
        if entry["state"] == DONE and entry["result"] is None:
            entry["state"] = FAILED
    except Exception as error:
        entry |= {"state": FAILED, "error": f"{type(error).__name__}: {error}"}
    entry["seconds"] = round(time.monotonic() - start, 1)
    if entry["state"] != DONE and log.exists():
        entry["log"] = log.read_text("utf-8", "replace").splitlines()[-25:]
    return entry


def summary(name: str, entry: dict[str, Any]) -> list[str]:
    """A few lines for the person who waits."""
    lines = [f"{name}: {entry['state']}, {entry['seconds']:.0f} s"]
    found = entry.get("result")
    rows = found.get("rows", []) if isinstance(found, dict) else []
    rows = [row for row in rows if isinstance(row, dict) and "label" in row]
    native = next((row.get("seconds_per_step") for row in rows if row["label"] == NATIVE), None)
    for row in rows:
        line, step = f"  {row['label']}: {row['status']}", row.get("seconds_per_step")
        line += f", {step:.3f} s per step" if step else ""
        line += f" ({native / step:.2f}x native)" if step and native else ""
        ratio = row.get("plan", {}).get("measured_to_planned")
        line += f", memory {ratio:.2f} of the plan" if ratio else ""
        lines.append(line)
    if entry["state"] != DONE:
        said = [*entry.get("log", [])[-3:], entry.get("error", "")]
        lines += [f"  {line}" for line in said if line]
    return lines


def measure(given: Given, out: Path, names: list[str], minutes: float) -> dict[str, Any]:
    until = time.monotonic() + 60 * minutes
    held: dict[str, Any] = {
        "simulated": given.tiny,
        "tiny": given.tiny,
        "commit": harness.commit(),
        "tree": given.tree.name,
        "minutes": minutes,
        "parts": {},
    }
    for part in PARTS:
        if part.name not in (ENVIRONMENT, *names):
            continue
        left = until - time.monotonic()
        if left < SHORTEST:
            held["parts"][part.name] = {"state": NOT_RUN, "seconds": 0.0}
        else:
            held["parts"][part.name] = run(part, given, left)
        if part.name == ENVIRONMENT:
            refuse(held, held["parts"][ENVIRONMENT], out)
        harness.write(out, held)
        print("\n".join(summary(part.name, held["parts"][part.name])), flush=True)
    return held


def refuse(held: dict[str, Any], entry: dict[str, Any], out: Path) -> None:
    """Stop where the figures would not be those of a card; mark those that only pretend."""
    found = entry.get("result") or {}
    if "device" not in found:
        raise SystemExit("\n".join(["the environment cannot be read:", *entry.get("log", [])]))
    if found["device"] == "cpu" and not held["tiny"]:
        raise SystemExit(
            f"torch {found['torch']} sees no graphics card (its CUDA: {found['cuda']}). Install a "
            "torch with CUDA into this environment, or name another with --python; --tiny tries "
            "the command on the CPU."
        )
    held["simulated"] = held["tiny"] or found["simulated"]
    if held["simulated"] and harness.RESULTS in out.resolve().parents:
        raise SystemExit("this run only pretends a card: name a file outside bench/results.")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("tree", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--minutes", type=float, default=8.0)
    names = [part.name for part in PARTS]
    parser.add_argument("--parts", nargs="+", choices=names, default=names)
    parser.add_argument("--folder", type=Path, help="where the model files go, 20 GB")
    parser.add_argument("--tiny", action="store_true")
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="frugal-gpu-", dir=asked.folder) as folder:
        given = Given(asked.tree.resolve(), Path(folder).resolve(), asked.tiny)
        held = measure(given, asked.out, asked.parts, asked.minutes)
    if held["simulated"]:
        print("simulated: no figure above is that of a card")
    bad = [name for name, entry in held["parts"].items() if entry["state"] != DONE]
    print(f"{asked.out}: {len(held['parts']) - len(bad)} of {len(held['parts'])} parts done")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
