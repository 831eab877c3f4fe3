"""A ComfyUI server whose process runs on the simulated card."""

from __future__ import annotations

from pathlib import Path

from frugal.demo.comfy_server import ComfyServer
from frugal.tests.card import modes

LAUNCHER = Path(__file__).with_name("serve.py")


class CardServer(ComfyServer):
    """In the mode of this process."""

    def __init__(self, tree: Path, base: Path):
        super().__init__(tree, base, cpu=not modes.ON_CARD, arguments=modes.server_arguments())

    def _command(self, port: int) -> list[str]:
        command = super()._command(port)
        command[command.index("main.py")] = str(LAUNCHER)
        return command
