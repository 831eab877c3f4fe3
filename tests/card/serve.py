"""Runs ComfyUI's main.py on the simulated card, with its arguments and in its folder.

FRUGAL_CARD names the mode.
"""

from __future__ import annotations

import importlib.util
import os
import runpy
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def register_pack() -> None:
    spec = importlib.util.spec_from_file_location(
        "frugal", ROOT / "__init__.py", submodule_search_locations=[str(ROOT)]
    )
    assert spec is not None
    sys.modules["frugal"] = importlib.util.module_from_spec(spec)


def main() -> None:
    # The folder of this file comes first; ComfyUI expects its own there.
    sys.path[0] = os.getcwd()
    register_pack()
    from frugal.tests.card import modes

    modes.prepare()
    sys.argv[0] = "main.py"
    modes.serve()
    runpy.run_path("main.py", run_name="__main__")


if __name__ == "__main__":
    main()
