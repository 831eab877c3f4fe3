"""The suite's own decisions: which test runs where, what counts as a failure, what is shown."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from frugal.tests import suite

ROOT = Path(__file__).resolve().parent.parent
TREES = [Path("trees/ComfyUI-1"), Path("trees/ComfyUI-2")]


def test_where_each_test_runs():
    listed = suite.runs(TREES, [])
    assert [run.title for run in listed] == [
        "workflows and browser in ComfyUI-1",
        "workflows and browser in ComfyUI-2",
        "nodes in ComfyUI-1",
        "nodes in ComfyUI-2",
        "without ComfyUI",
    ]
    assert listed[0].paths == ["tests/workflows", "tests/browser"]
    trees = [str(tree) for tree in TREES]
    assert [run.tree for run in listed] == [*trees, *trees, "none"]
    assert {"tests/kernels", "tests/test_dev.py"} <= set(listed[-1].paths)
    # Everything that holds a test is in one of them.
    held = {path.relative_to(ROOT).parts[1] for path in (ROOT / "tests").rglob("test_*.py")}
    assert {Path(path).name for run in listed for path in run.paths} == held - {"card"}


def test_named_tests_run_where_they_belong():
    one = "tests/nodes/test_pack.py::test_x"
    assert [(run.paths, run.tree) for run in suite.runs(TREES[:1], [one])] == [
        ([one], str(TREES[0]))
    ]
    [alone] = suite.runs(TREES, ["tests/test_dev.py"])
    assert (alone.paths, alone.tree) == (["tests/test_dev.py"], "none")


def test_runs_on_the_simulated_card(tmp_path):
    trees = [tmp_path / "older", tmp_path / "newer"]
    for tree, text in zip(trees, ("", '"--enable-dynamic-vram"'), strict=True):
        (tree / "comfy").mkdir(parents=True)
        (tree / "comfy" / "cli_args.py").write_text(text)
    listed = suite.card_runs(trees, [], "python-of-the-card", "results")
    assert [(run.more["FRUGAL_CARD"], Path(run.tree).name) for run in listed] == [
        ("static", "older"), ("lowvram", "older"), ("dynamic", "newer"), ("tight", "newer"),
        ("static", "newer"), ("lowvram", "newer"),
    ]  # fmt: skip
    assert {run.python for run in listed} == {"python-of-the-card"}
    assert listed[0].paths == ["tests/card"] and listed[2].paths == ["tests/card", "tests/nodes"]
    assert suite.card_runs(trees, ["tests/nodes"], "p", "r") == []
    [one, *_] = suite.card_runs(trees[:1], ["tests/card/test_runs.py"], "p", "r")
    assert one.paths == ["tests/card/test_runs.py"]


def test_levels_are_those_that_the_cpu_has(monkeypatch):
    flags = {"", "sse4_1", "avx2"}
    monkeypatch.setattr(suite, "cpu_flags", lambda: flags)
    listed = suite.level_runs(TREES, [])
    titles = [run.title for run in listed]
    assert "AVX2" in titles and "AVX-512" not in titles
    flags.add("avx512f")
    assert "AVX-512" in [run.title for run in suite.level_runs(TREES, [])]
    assert all(run.tree == str(TREES[1]) and "OMP_NUM_THREADS" in run.more for run in listed)
    [shaped, other] = [r for r in listed if "by-shape" in r.more["PYTEST_ADDOPTS"]]
    assert shaped.paths == other.paths
    folders = {Path(path).parts[1] for path in shaped.paths}
    assert folders == {"kernels", "nodes", "workflows"}
    [only] = {
        tuple(run.paths)
        for run in suite.level_runs(TREES, ["tests/kernels/formats/test_per_channel.py"])
    }
    assert only == ("tests/kernels/formats/test_per_channel.py",)


def test_a_fault_of_style_or_type_is_shown(tmp_path, capfd):
    for name in suite.CHECKS:
        pytest.importorskip(name)
    (tmp_path / "kernels").mkdir()
    (tmp_path / "pyproject.toml").write_bytes((ROOT / "pyproject.toml").read_bytes())
    source = tmp_path / "kernels" / "some.py"
    for text, codes in (("a: int = 1\n", [0, 0]), ("import os\na: int = ''\n", [1, 1])):
        source.write_text(f'"""Some."""\n\n{text}')
        assert suite.check_source(tmp_path) == codes
    said = capfd.readouterr().out
    assert "F401" in said and "reportAssignmentType" in said
    assert "ruff found the faults above" in said and "pyright found the faults above" in said


SAMPLE = """
import os, pytest
def test_a(): print("7 passed")
def test_b(): assert 0
def test_c(): pytest.skip("why: 3 failed")
def test_d(absent): pass
def test_e():
    if "CRASH" in os.environ: os._exit(int(os.environ["CRASH"]))
"""


def sample_run(tmp_path, title="some", **more) -> suite.Run:
    (tmp_path / "tests").mkdir(exist_ok=True)
    (tmp_path / "tests" / "test_sample.py").write_text(SAMPLE)
    lean = {"PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
    return suite.Run(title, ["tests/test_sample.py"], more=lean | more)


@pytest.fixture
def carry_out(tmp_path, monkeypatch):
    """suite.carry_out on a folder that holds SAMPLE."""
    monkeypatch.setattr(suite, "ROOT", tmp_path)
    quick = ["-p", "no:cacheprovider", "-rA", f"--rootdir={tmp_path}"]
    return lambda run, *arguments, several=False: suite.carry_out(
        run, [*quick, *arguments], 1, suite.Screen(several)
    )


def test_counts_come_from_pytest(carry_out, tmp_path):
    done = carry_out(sample_run(tmp_path))
    assert done.code == suite.FAILED_TESTS
    assert done.counts == {"passed": 2, "failed": 1, "errors": 1, "skipped": 1}
    assert [fault.split(" - ")[0] for fault in done.faults] == [
        "some: ERROR tests/test_sample.py::test_d",
        "some: FAILED tests/test_sample.py::test_b",
    ]
    done = carry_out(sample_run(tmp_path), "-k", "nothing")
    assert (done.code, sum(done.counts.values()), done.faults) == (suite.NO_TESTS, 0, [])


@pytest.mark.parametrize("status", [0, 1, 2, 77])
def test_a_run_that_ends_early_is_a_failure(carry_out, tmp_path, status):
    """Also with a status that pytest itself uses: without its closing line nothing has passed."""
    done = carry_out(sample_run(tmp_path, CRASH=str(status)))
    assert done.counts == {"passed": 0, "failed": 0, "errors": 1, "skipped": 0}
    assert done.code and f"(status {status})" in done.faults[0]


def test_side_by_side_only_finished_files_are_shown_at_once(carry_out, tmp_path, capfd):
    carry_out(sample_run(tmp_path, "one"), several=True)
    lines = capfd.readouterr().out.splitlines()
    ending = next(n for n, line in enumerate(lines) if line.startswith("[dev.py] pytest one: st"))
    assert lines[0] == "[dev.py] pytest one"
    assert [line.split(" [")[0].rstrip() for line in lines[1:ending]] == [
        "one: tests/test_sample.py .FsE."
    ]
    assert any("1 failed, 2 passed, 1 skipped, 1 error" in line for line in lines[ending:])


@pytest.mark.parametrize("crash", ["", "9"])
def test_the_last_line_sums_all_runs(tmp_path, monkeypatch, capfd, crash):
    more = {"CRASH": crash} if crash else {}
    listed = [sample_run(tmp_path, "one"), sample_run(tmp_path, "two", **more)]
    monkeypatch.setattr(suite, "ROOT", tmp_path)
    monkeypatch.setattr(suite, "runs", lambda *_: listed)
    monkeypatch.setattr(suite, "check_source", lambda _: [0, 0])
    arguments = ["-p", "no:cacheprovider", "-k", "test_a or test_e"]
    monkeypatch.setattr(sys, "argv", ["suite.py", *arguments])
    code = suite.main()
    last = capfd.readouterr().out.splitlines()[-1]
    if crash:
        assert (code, last) == (9, "2 passed, 1 failed, 0 skipped")
    else:
        assert (code, last) == (0, "4 passed, 0 failed, 0 skipped")
