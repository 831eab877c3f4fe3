"""The extension: collects the node families, one at a time.

A family whose dependency is missing costs that family and one log line; the others still load. Only
a missing module is forgiven: a mistake of our own must fail loudly.
"""

from __future__ import annotations

import importlib
import logging

from comfy_api.v0_0_2 import ComfyExtension, io

from . import _reports

FAMILIES = (
    "wan", "text", "vae", "causal", "memory", "sampling", "lora", "quantize", "tryon", "masks",
    "servers",
)  # fmt: skip


def _pack_name() -> str:
    return __name__.rpartition(".")[0]


class FrugalExtension(ComfyExtension):
    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        _reports.serve()
        found: list[type[io.ComfyNode]] = []
        for family in FAMILIES:
            try:
                module = importlib.import_module(f".{family}.nodes", __package__)
            except ModuleNotFoundError as error:
                if error.name is None or error.name.startswith(_pack_name()):
                    raise
                logging.warning(
                    "[Frugal] the %s nodes are off: install '%s' to get them.", family, error.name
                )
                continue
            found.extend(module.NODES)
        return found
