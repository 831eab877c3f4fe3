"""The command that measures on a card, without one: parts that fail, hang or come too late, what is
kept of them, and runs that only pretend a card.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

ROOT = Path(__file__).resolve().parent.parent
CARD = {"device": "NVIDIA", "torch": "2", "cuda": "13.0", "simulated": False}
PROCESSOR = CARD | {"device": "cpu"}


@pytest.fixture
def gpu(monkeypatch):
    """bench/gpu.py as a module, its parts to be replaced."""
    monkeypatch.syspath_prepend(str(ROOT / "bench"))
    for name in ("gpu", "gpu_graphs", "gpu_files", "harness"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    import gpu as module

    yield module
    for name in ("gpu", "gpu_graphs", "gpu_files", "harness"):
        sys.modules.pop(name, None)


@pytest.fixture
def given(gpu, tmp_path):
    (tmp_path / "work").mkdir()
    return gpu.Given(tmp_path / "tree", tmp_path / "work", False)


def part(gpu, name, code, limit=60.0, read=None):
    return gpu.Part(
        name, limit, lambda given: ["-c", code, given.result(name)], read or gpu.read_json
    )


def writes(result, after="") -> str:
    return f"import sys; open(sys.argv[1], 'w').write({json.dumps(json.dumps(result))}); {after}"


def test_no_part_ends_the_others(gpu, given, tmp_path, monkeypatch):
    parts = (
        part(gpu, "environment", writes(CARD)),
        part(gpu, "raises", writes({"half": 1}, "raise SystemExit('no such kernel')")),
        part(gpu, "crashes", "import os; os.abort()"),
        part(gpu, "hangs", writes({"rows": [1]}, "import time; time.sleep(600)"), 12),
        part(gpu, "silent", "pass"),
        part(gpu, "unreadable", writes({}), read=lambda _: 1 / 0),
        part(gpu, "last", writes({"fine": True})),
    )
    monkeypatch.setattr(gpu, "PARTS", parts)
    seen, write = [], gpu.harness.write
    monkeypatch.setattr(
        gpu.harness,
        "write",
        lambda path, held: (write(path, held), seen.append(len(held["parts"]))),
    )
    out = tmp_path / "out.json"
    gpu.measure(given, out, [each.name for each in parts], 8)
    held = json.loads(out.read_text("utf-8"))
    found = {name: entry["state"] for name, entry in held["parts"].items()}
    assert found == {
        "environment": gpu.DONE,
        "raises": gpu.FAILED,
        "crashes": gpu.FAILED,
        "hangs": gpu.TIMED_OUT,
        "silent": gpu.FAILED,
        "unreadable": gpu.FAILED,
        "last": gpu.DONE,
    }
    assert held["parts"]["raises"]["result"] == {"half": 1}
    assert "no such kernel" in held["parts"]["raises"]["log"][-1]
    assert held["parts"]["hangs"]["result"] == {"rows": [1]}
    assert "ZeroDivisionError" in held["parts"]["unreadable"]["error"]
    assert held["parts"]["last"]["result"] == {"fine": True}
    assert not held["simulated"] and seen == list(range(1, len(parts) + 1))


def test_what_a_part_started_ends_with_it(gpu, given):
    mark = "import time; time.sleep(601)"
    start = f"import subprocess, sys, time; subprocess.Popen([sys.executable, '-c', {mark!r}]); "
    entry = gpu.run(part(gpu, "parent", start + "time.sleep(600)", 12), given, 60)
    assert entry["state"] == gpu.TIMED_OUT
    left = [
        each for each in psutil.process_iter(["cmdline"]) if mark in (each.info["cmdline"] or ())
    ]
    assert not left


def test_time_that_is_over(gpu, given, tmp_path, monkeypatch):
    parts = (part(gpu, "environment", writes(CARD)), part(gpu, "late", writes({})))
    monkeypatch.setattr(gpu, "PARTS", parts)
    monkeypatch.setattr(gpu, "SHORTEST", 1e9)
    monkeypatch.setattr(gpu, "refuse", lambda *_: None)
    held = gpu.measure(given, tmp_path / "out.json", ["late"], 8)
    assert held["parts"]["late"]["state"] == gpu.NOT_RUN


@pytest.mark.parametrize(
    ("found", "tiny", "inside", "says"),
    [
        (CARD, False, True, None),
        (PROCESSOR, False, False, "sees no graphics card"),
        (PROCESSOR, True, False, None),
        (PROCESSOR, True, True, "outside bench/results"),
        (CARD | {"simulated": True}, False, False, None),
        (CARD | {"simulated": True}, False, True, "outside bench/results"),
        (None, False, False, "cannot be read"),
    ],
)
def test_figures_are_those_of_a_card_or_marked(gpu, tmp_path, found, tiny, inside, says):
    out = (gpu.harness.RESULTS if inside else tmp_path) / "gpu.json"
    held = {"tiny": tiny, "simulated": tiny}
    if says:
        with pytest.raises(SystemExit, match=says):
            gpu.refuse(held, {"result": found}, out)
        return
    gpu.refuse(held, {"result": found}, out)
    assert held["simulated"] == (tiny or found["simulated"])


def test_no_committed_result_is_of_a_pretended_card(gpu):
    for path in gpu.harness.RESULTS.glob("*.json"):
        held = json.loads(path.read_text("utf-8"))
        assert not (isinstance(held, dict) and held.get("simulated")), path.name


def test_what_tests_recorded_is_read(gpu, tmp_path):
    source = tmp_path / "test_some.py"
    source.write_text(
        "import pytest\n"
        "def test_good(record_property): record_property('peak', 3)\n"
        "def test_bad(): assert 1 == 2, 'off'\n"
        "@pytest.mark.skip(reason='no card')\n"
        "def test_left(): pass\n"
    )
    report = tmp_path / "report.xml"
    command = [sys.executable, "-m", "pytest", "-q", str(source), f"--junitxml={report}"]
    subprocess.run(command, cwd=tmp_path, capture_output=True)
    found = gpu.read_tests(report)
    assert found["passed"] == 1 and found["skipped"] == {"test_some::test_left": "no card"}
    assert "off" in found["failed"]["test_some::test_bad"]
    assert found["recorded"] == {"test_some::test_good": {"peak": "3"}}
    assert gpu.read_tests(tmp_path / "none.xml") is None


@pytest.mark.parametrize("name", ["wan_14b_w4a8", "wan_1.3b"])
def test_the_native_graph_has_no_node_of_ours(gpu, name):
    graphs = sys.modules["gpu_graphs"]
    graph, *_ = graphs.WAN[name]
    ours = graphs.wan_graph(graph, "some.safetensors", 2, 12.0, True, False)
    kinds = {node["class_type"] for node in ours.values()}
    assert {"FrugalLoadWan", "FrugalMemoryPlan", "FrugalSampler", "FrugalBenchClock"} <= kinds
    theirs = graphs.native_graph(ours)
    kinds = {node["class_type"] for node in theirs.values()}
    shared = {"FrugalBenchClock", "FrugalBenchEnd", "FrugalLoadTextEmbeds"}
    assert {kind for kind in kinds if kind.startswith("Frugal")} == shared
    for prompt in (ours, theirs):
        links = [at[0] for node in prompt.values() for at in node["inputs"].values()
                 if isinstance(at, list)]  # fmt: skip
        assert set(links) <= set(prompt)
    [sampler] = [node["inputs"] for node in theirs.values() if node["class_type"] == "KSampler"]
    [frugal] = [node["inputs"] for node in ours.values() if node["class_type"] == "FrugalSampler"]
    for same in ("seed", "steps", "cfg", "sampler_name", "scheduler"):
        assert sampler[same] == frugal[same]
    assert theirs["clock"]["inputs"]["label"] == graphs.NATIVE


def test_measured_memory_beside_the_plan(gpu):
    graphs = sys.modules["gpu_graphs"]
    plan = {"totals": {"sampling, each step": 200, "decoding": 900}, "fits": True}
    found = graphs.planned(plan, {"torch_peak": 150, "dynamic_vram_peak": 60})
    assert found["sampling_measured"] == 210 and found["measured_to_planned"] == 1.05
    assert "measured_to_planned" not in graphs.planned(plan, {})
