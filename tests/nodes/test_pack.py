"""How the pack registers: every family, with and without numba; one log line per lost family."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from pathlib import Path

import pytest

from frugal.demo.comfy_server import pack_node_ids

ROOT = Path(__file__).resolve().parents[2]
REGISTER = """
import asyncio, importlib.util, json, logging, sys
sys.path.insert(0, {tree!r})
import comfy.cli_args
comfy.cli_args.args.cpu = True
comfy.cli_args.args.base_directory = {base!r}
logging.basicConfig(stream=sys.stderr)
{before}
spec = importlib.util.spec_from_file_location(
    "frugal", {init!r}, submodule_search_locations=[{root!r}])
module = importlib.util.module_from_spec(spec)
sys.modules["frugal"] = module
spec.loader.exec_module(module)
async def register():
    return await (await module.comfy_entrypoint()).get_node_list()
nodes = asyncio.run(register())
print(json.dumps([[n.GET_SCHEMA().node_id for n in nodes], "numba" in sys.modules]))
"""


def register(tree: Path, base: Path, before: str = "") -> tuple[list[str], bool, str]:
    """Load the pack in a fresh process: node ids, whether numba got imported, the log."""
    code = REGISTER.format(
        tree=str(tree),
        base=str(base),
        before=before,
        init=str(ROOT / "__init__.py"),
        root=str(ROOT),
    )
    done = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    ids, numba = json.loads(done.stdout.splitlines()[-1])
    return ids, numba, done.stderr


def test_all_nodes_register_and_numba_waits(comfy_tree, tmp_path):
    """Importing numba costs seconds; it has to wait for the first node that needs it."""
    ids, numba, _ = register(comfy_tree, tmp_path)
    assert set(ids) == pack_node_ids()
    assert not numba


def test_a_missing_module_costs_one_family_and_one_line(comfy_tree, tmp_path):
    """One family cannot find a foreign module: the others load, the log says what to do. Numba is
    missing too and costs nothing.
    """
    before = """
import builtins
real = builtins.__import__
def fake(name, globals=None, *rest, **more):
    if (globals or {}).get("__name__") == "frugal.nodes.servers.nodes":
        raise ModuleNotFoundError("No module named 'absent'", name="absent")
    return real(name, globals, *rest, **more)
builtins.__import__ = fake
sys.modules["numba"] = None
"""
    ids, _, log = register(comfy_tree, tmp_path, before)
    trees = [ast.parse(path.read_text("utf-8")) for path in (ROOT / "nodes/servers").glob("*.py")]
    remote = {c.value for tree in trees for c in ast.walk(tree) if isinstance(c, ast.Constant)}
    assert set(ids) == pack_node_ids() - remote and remote & pack_node_ids()
    lines = [line for line in log.splitlines() if "[Frugal]" in line]
    assert len(lines) == 1 and "servers" in lines[0] and "'absent'" in lines[0]


def test_a_mistake_of_our_own_is_loud(comfy_tree, tmp_path):
    before = "sys.modules['frugal.kernels.errors'] = None"
    with pytest.raises(AssertionError, match=r"frugal\.kernels\.errors"):
        register(comfy_tree, tmp_path, before)
