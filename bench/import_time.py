"""What the pack adds to ComfyUI's start: python bench/import_time.py RESULT.json TREE [TREE ...]

One process per round brings ComfyUI to where it loads custom nodes (server and built-in nodes are
imported), then the pack, as ComfyUI does it: entry point, node list, schemas. Seconds are of the
processor, which a busy machine stretches for both alike; the ratio is what holds elsewhere. The
first round fills Python's caches and does not count.
"""

from __future__ import annotations

import asyncio
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import harness

ROUNDS = 3
# What the pack may add, in seconds of one idle core.
LIMIT = 0.3


def one_start(tree: str) -> None:
    """The child: prints the processor seconds of both parts as JSON."""
    sys.path.insert(0, tree)
    import comfy.cli_args

    comfy.cli_args.args.cpu = True
    comfy.cli_args.args.base_directory = tempfile.gettempdir()
    # What main.py has imported by then, in its order: `nodes` puts a folder with another `utils`
    # first on the path.
    importlib.import_module("utils.extra_config")
    import server  # noqa: F401

    import nodes

    asyncio.run(nodes.init_builtin_extra_nodes())
    before, known = time.process_time(), set(sys.modules)
    spec = importlib.util.spec_from_file_location(
        "frugal", harness.ROOT / "__init__.py", submodule_search_locations=[str(harness.ROOT)]
    )
    assert spec and spec.loader
    module = sys.modules["frugal"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)

    async def register() -> list[Any]:
        return await (await module.comfy_entrypoint()).get_node_list()

    found = asyncio.run(register())
    for node in found:
        node.GET_SCHEMA()
    pack = time.process_time() - before
    new = {name.partition(".")[0] for name in set(sys.modules) - known}
    print(json.dumps({"comfyui": before, "pack": pack, "nodes": len(found), "new": sorted(new)}))


def measure(tree: Path) -> dict[str, Any]:
    """The round in which the pack took least, and all of them."""
    command = [sys.executable, __file__, "--child", str(tree)]
    rounds = []
    with tempfile.TemporaryDirectory() as cache:
        # A user's second start finds compiled files, whatever this shell has switched off.
        environment = {**os.environ, "PYTHONPYCACHEPREFIX": cache}
        environment.pop("PYTHONDONTWRITEBYTECODE", None)
        for _ in range(ROUNDS + 1):
            done = subprocess.run(
                command, capture_output=True, text=True, cwd=tree, env=environment
            )
            if done.returncode:
                raise SystemExit(done.stderr[-3000:])
            rounds.append(json.loads(done.stdout.splitlines()[-1]))
    least = min(rounds[1:], key=lambda one: one["pack"])
    return {
        "tree": tree.name,
        "nodes": least["nodes"],
        "top_level_modules_added": least["new"],
        "comfyui_seconds": round(least["comfyui"], 3),
        "pack_seconds": round(least["pack"], 3),
        "ratio_to_start": round(least["pack"] / least["comfyui"], 4),
        "limit_seconds": LIMIT,
        "met_here": least["pack"] <= LIMIT,
        "rounds": [[round(one["comfyui"], 3), round(one["pack"], 3)] for one in rounds],
    }


def main() -> None:
    if sys.argv[1:2] == ["--child"]:
        return one_start(sys.argv[2])
    out, *trees = map(Path, sys.argv[1:])
    result = {
        "commit": harness.commit(),
        "python": sys.version.split()[0],
        "load_average": [round(each, 1) for each in os.getloadavg()],
        "rows": [measure(tree.resolve()) for tree in trees],
    }
    harness.write(out, result)
    for row in result["rows"]:
        print(f"{row['tree']}: {row['pack_seconds']} s, {row['ratio_to_start']:.1%} of the start")


if __name__ == "__main__":
    main()
