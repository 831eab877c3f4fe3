"""Compiling in the background: what it covers, how it ends, what it costs who uses no mask."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from frugal.kernels.masks import warm
from frugal.tests.helpers.patience import HANG

ROOT = Path(__file__).resolve().parents[3]
PRELUDE = """
import importlib, importlib.util, sys
root = sys.argv[1]
spec = importlib.util.spec_from_file_location(
    "frugal", root + "/__init__.py", submodule_search_locations=[root])
sys.modules["frugal"] = importlib.util.module_from_spec(spec)
from frugal.kernels.masks import warm
assert "numba" not in sys.modules and "llvmlite" not in sys.modules
"""
COVERED = """
thread = warm.start()
assert warm.start() is thread
thread.join()
import ast, pathlib
called = set()
for file in ("numba_chain", "numba_agnostic"):
    text = pathlib.Path(root, "kernels", "masks", file + ".py").read_text()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
            if isinstance(node.func.value, ast.Name):
                called.add((node.func.value.id, node.func.attr))
for name, function in sorted(called):
    if (pathlib.Path(root) / "kernels" / "masks" / (name + ".py")).exists():
        module = importlib.import_module("frugal.kernels.masks." + name)
        kernel = getattr(module, function, None)
        if getattr(kernel, "signatures", None) == []:
            print("not compiled:", name, function)
        elif hasattr(kernel, "signatures"):
            print("compiled", name, function)
"""
LEAVES = """
import itertools, threading, time
begun = threading.Event()
def call():
    with open(sys.argv[2], "a") as file:
        file.write("(")
        file.flush()
        begun.set()
        time.sleep(0.01)
        file.write(")")
warm.rehearsals = lambda: itertools.repeat(call)
warm.start()
begun.wait()
"""
WITHOUT = """
sys.modules["numba"] = None
warm.rehearsals = lambda: [lambda: print("ran")]
warm.start().join()
"""


def process(code: str, *more: str, **variables: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", PRELUDE + code, str(ROOT), *more],
        capture_output=True,
        text=True,
        env=os.environ | variables,
        timeout=HANG,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


def test_every_kernel_that_python_calls_is_compiled_by_the_warm_up():
    lines = process(COVERED).splitlines()
    assert len(lines) > 20
    assert not [line for line in lines if line.startswith("not")]


def test_the_end_of_the_process_ends_the_thread_after_the_call_it_is_in(tmp_path):
    pytest.importorskip("numba")
    process(LEAVES, str(tmp_path / "calls"))
    made = (tmp_path / "calls").read_text()
    assert made and made == "()" * (len(made) // 2)


def test_without_numba_nothing_runs():
    assert process(WITHOUT) == ""


def test_it_stops_between_calls():
    stop, made = threading.Event(), []

    def call():
        made.append(1)
        if len(made) == 2:
            stop.set()

    assert warm.run([call] * 5, stop) == 2 == len(made)
    assert warm.run([call] * 5, stop) == 0
