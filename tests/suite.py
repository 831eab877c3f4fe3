"""The whole suite, called by `dev.py test`: ruff, pyright, and pytest several times, side by side.

Tests that need no ComfyUI run once, the others once per version. Each run is a process of its own;
`runs()` lists them, and a further tier is one more entry there. While several go at once a line is
shown for each finished file, and everything else a run said when it is over. Arguments that are not
listed in `main` go to pytest. Standard library only.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from threading import Lock

ROOT = Path(__file__).resolve().parent.parent
# In the order they are started: what takes longest comes first. What is named together runs in one
# process and shares its server; the web page last, for it fills that server with models.
NEEDS_COMFYUI = (("workflows", "browser"), ("nodes",))
# On the simulated card, a process for each of its modes; dynamic VRAM is of newer ComfyUI versions.
CARD, DYNAMIC, OLDER = "card", ("dynamic", "tight"), ("static", "lowvram")
# Arguments of the environment's Python.
CHECKS = {"ruff": ("-m", "ruff", "check", "."), "pyright": ("-m", "pyright")}
FAILED_TESTS, NO_TESTS = 1, 5
# Lines of pytest: how a file (with -v: a test) went, and the sum. The first is no traceback's.
FINISHED = r"tests/\S*[^:\s] "
CLOSING = r"(\d+ (passed|failed|skipped|deselected|error)|no tests ran).* in \d"
COUNTS = ("passed", "failed", "errors", "skipped")


def _isa(aten: str, mkl: str, onednn: str, openblas: str) -> dict[str, str]:
    """The variables that hold each library to an instruction set; AMD's CPUs ignore MKL's."""
    return {
        "ATEN_CPU_CAPABILITY": aten, "MKL_ENABLE_INSTRUCTIONS": mkl, "ONEDNN_MAX_CPU_ISA": onednn,
        "OPENBLAS_CORETYPE": openblas, "OMP_NUM_THREADS": "1",
    }  # fmt: skip


# CPUs that this one can pass for: title, flag of /proc/cpuinfo it takes, pytest option, variables.
LEVELS = (
    ("one thread", "", "", {"OMP_NUM_THREADS": "1"}),
    ("two threads", "", "", {"OMP_NUM_THREADS": "2"}),
    ("SSE", "sse4_1", "", _isa("default", "SSE4_2", "SSE41", "Nehalem")),
    ("AVX2", "avx2", "", _isa("avx2", "AVX2", "AVX2", "Haswell")),
    ("AVX-512", "avx512f", "", _isa("avx512", "AVX512", "AVX512_CORE", "SkylakeX")),
    ("MKL compatible", "", "", {"MKL_CBWR": "COMPATIBLE", "OMP_NUM_THREADS": "1"}),
    ("products round by shape, 1", "", "--rounding-by-shape=1", {"OMP_NUM_THREADS": "1"}),
    ("products round by shape, 2", "", "--rounding-by-shape=2", {"OMP_NUM_THREADS": "2"}),
)


@dataclass(frozen=True)
class Run:
    """One pytest process. tree: what FRUGAL_COMFYUI_TREE is set to. more: further variables."""

    title: str
    paths: list[str]
    tree: str = "none"
    python: str = sys.executable
    more: dict[str, str] = field(default_factory=dict)


@dataclass
class Outcome:
    """What became of a run. code: pytest's exit status. faults: its lines on failed tests."""

    code: int
    counts: dict[str, int]
    faults: list[str]


def runs(trees: list[Path], paths: list[str]) -> list[Run]:
    """The pytest processes that cover these paths, the longest first."""
    alone, inside = split_paths(paths)
    found = []
    for folders, held in zip(NEEDS_COMFYUI, inside, strict=True):
        for tree in trees if held else ():
            found.append(Run(f"{' and '.join(folders)} in {tree.name}", held, str(tree)))
    if alone:
        found.append(Run("without ComfyUI", alone))
    return found


def card_runs(trees: list[Path], named: list[str], python: str, results: str) -> list[Run]:
    """Those on the simulated card; marked tests of nodes go with dynamic VRAM.

    python: of the card's environment. results: folder for the CPU's, which the card's are compared
    with.
    """
    found = []
    wanted = [path for path in named if Path(path).parts[1:2] == (CARD,)]
    for tree in trees if wanted or not named else ():
        known = (tree / "comfy" / "cli_args.py").read_text(encoding="utf-8")
        for mode in (*DYNAMIC, *OLDER) if "enable-dynamic-vram" in known else OLDER:
            more = {"FRUGAL_CARD": mode, "FRUGAL_CARD_REFERENCE": results}
            marked = ["tests/nodes"] if mode in DYNAMIC else []
            title = f"card, {mode}, in {tree.name}"
            found.append(Run(title, wanted or [f"tests/{CARD}", *marked], str(tree), python, more))
    return found


def level_runs(trees: list[Path], paths: list[str]) -> list[Run]:
    """The files with numeric tests, once per level that this CPU has, in the newest ComfyUI."""
    held = [
        path.relative_to(ROOT).as_posix()
        for path in (ROOT / "tests").rglob("test_*.py")
        if "mark.numeric" in path.read_text(encoding="utf-8")
    ]
    named = [path for path in sorted(held) if not paths or any(path.startswith(p) for p in paths)]
    has = cpu_flags()
    return [
        Run(
            title,
            named,
            str(trees[-1]),
            more={**more, "PYTEST_ADDOPTS": f"-m numeric {option}".strip()},
        )
        for title, needed, option, more in LEVELS
        if needed in has
    ]


def cpu_flags() -> set[str]:
    """What Linux says that the CPU can do, and "" for what every CPU can."""
    told = Path("/proc/cpuinfo")
    text = told.read_text(encoding="utf-8") if told.exists() else ""
    return {
        "",
        *(word for line in re.findall(r"^flags\s*:(.*)$", text, re.M) for word in line.split()),
    }


def _told(more: dict[str, str]) -> str:
    return " ".join(f"{name}={value}" for name, value in more.items())


def split_paths(named: list[str]) -> tuple[list[str], list[list[str]]]:
    """Test paths that need no ComfyUI, and for each entry of NEEDS_COMFYUI those that do.

    named: the ones to run, none for all.
    """
    top = [path for path in sorted((ROOT / "tests").iterdir()) if any(path.rglob("test_*.py"))]
    top += sorted((ROOT / "tests").glob("test_*.py"))
    paths = named or [f"tests/{path.name}" for path in top]
    folder = {path: (*Path(path).parts[1:2], "")[0] for path in paths}
    inside = [[p for name in group for p in paths if folder[p] == name] for group in NEEDS_COMFYUI]
    alone = [p for p in paths if folder[p] != CARD and not any(p in held for held in inside)]
    return alone, inside


class Screen:
    """Where runs print, one line or one block at a time. several: runs go side by side, so only
    the lines on finished files are shown at once.
    """

    def __init__(self, several: bool):
        self.several, self.lock = several, Lock()

    def say(self, text: str) -> None:
        with self.lock:
            print(f"[dev.py] {text}", flush=True)

    def line(self, run: Run, line: str) -> bool:
        """Show a line of a run now if that is its place; returns whether it was shown."""
        if self.several and not re.match(FINISHED, line):
            return False
        with self.lock:
            print(f"{run.title}: {line}" if self.several else line, end="", flush=True)
        return True

    def block(self, title: str, lines: list[str]) -> None:
        with self.lock:
            print(f"[dev.py] {title}", *lines, sep="\n", end="", flush=True)


def carry_out(run: Run, arguments: list[str], threads: int, screen: Screen) -> Outcome:
    """Run pytest, pass its output on, and count from its closing line."""
    # -P: with the checkout on the import path, `nodes` would be ours and not ComfyUI's.
    command = [run.python, "-P", "-m", "pytest", *run.paths, *arguments]
    if sys.stdout.isatty():
        command.append("--color=yes")
    screen.say(f"pytest {run.title}")
    start, closing, kept, faults = time.monotonic(), "", [], []
    process = subprocess.Popen(
        command,
        cwd=ROOT,
        env=environment(run, threads),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT if screen.several else None,
        text=True,
        encoding="utf-8",
        errors="replace",
    )
    assert process.stdout is not None
    with process:
        for line in process.stdout:
            if not screen.line(run, line):
                kept.append(line.rstrip("\n"))
            plain = re.sub(r"\x1b\[[0-9;]*m", "", line)
            if re.search(CLOSING, plain):
                closing = plain
            if re.match(r"(FAILED|ERROR) tests/", plain):
                faults.append(plain.rstrip("\n"))
    counts = dict.fromkeys(COUNTS, 0)
    for number, word in re.findall(r"(\d+) (passed|failed|errors?|skipped)", closing):
        counts["errors" if word == "error" else word] = int(number)
    code = process.returncode
    if not closing or code not in (0, FAILED_TESTS, NO_TESTS):
        # Counted, for the sum of all runs says nothing of a status; a test can end with any.
        faults.append(f"pytest did not come to its end (status {code})")
        counts["errors"] += 1
        code = code or FAILED_TESTS
    ending = f"pytest {run.title}: status {code} after {time.monotonic() - start:.0f} s"
    screen.block(ending, [*kept, ""] if kept else [""])
    return Outcome(code, counts, [f"{run.title}: {fault}" for fault in faults])


def environment(run: Run, threads: int) -> dict[str, str]:
    own = {"FRUGAL_COMFYUI_TREE": run.tree, "PYTHONIOENCODING": "utf-8", "PYTHONUNBUFFERED": "1"}
    return {"OMP_NUM_THREADS": str(threads), **os.environ, **own, **run.more}


def check_source(folder: Path) -> list[int]:
    """Exit status of each of the CHECKS, which print what they find."""
    codes = []
    for name, command in CHECKS.items():
        # Else pyright asks the network for a newer pyright.
        quiet = {**os.environ, "PYRIGHT_PYTHON_IGNORE_WARNINGS": "1"}
        codes.append(subprocess.call([sys.executable, *command], cwd=folder, env=quiet))
        if codes[-1]:
            print(f"[dev.py] {name} found the faults above", flush=True)
    return codes


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("--tree", action="append", default=[], type=Path, help="a ComfyUI folder")
    parser.add_argument("--card", help="Python that can simulate a card; tests/card/environment.py")
    parser.add_argument("--jobs", type=int, default=0, help="runs that go at once")
    parser.add_argument("--cpu-levels", action="store_true", help="numeric tests alone, see LEVELS")
    options, rest = parser.parse_known_args()
    start, cores = time.monotonic(), os.cpu_count() or 1
    codes = check_source(ROOT)
    paths = [a for a in rest if Path(a).parts[:1] == ("tests",)]
    arguments = [a for a in rest if a not in paths]
    listed = runs(options.tree, paths)
    results = tempfile.TemporaryDirectory(prefix="frugal-card-")
    if options.card:
        listed += card_runs(options.tree, paths, options.card, results.name)
    if options.cpu_levels:
        listed = level_runs(options.tree, paths)
        print("[dev.py] levels:", *(f"{r.title}: {_told(r.more)}" for r in listed), sep="\n  ")
    jobs = max(1, min(options.jobs or min(cores, 2), len(listed)))
    screen = Screen(jobs > 1)
    threads = max(1, cores // jobs)
    with ThreadPoolExecutor(jobs) as pool:
        work = [pool.submit(carry_out, run, arguments, threads, screen) for run in listed]
        try:
            outcomes = [done.result() for done in work]
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    codes += [each.code for each in outcomes if each.code != NO_TESTS]
    if all(each.code == NO_TESTS for each in outcomes):
        screen.say("no test was selected")
        codes.append(NO_TESTS)
    faults = [fault for each in outcomes for fault in each.faults]
    if faults:
        screen.block("what failed, once more:", [*faults, ""])
    worst = next((code for code in codes if code), 0)
    seconds = time.monotonic() - start
    checked = f"{len(listed)} pytest runs, {jobs} at once, {' and '.join(CHECKS)}"
    screen.say(f"{checked} in {seconds:.0f} s: {'FAILED' if worst else 'passed'}")
    total = {name: sum(each.counts[name] for each in outcomes) for name in COUNTS}
    failed = total["failed"] + total["errors"]
    # The sum over all runs, last, for people and for CI.
    print(f"{total['passed']} passed, {failed} failed, {total['skipped']} skipped", flush=True)
    return worst


if __name__ == "__main__":
    sys.exit(main())
