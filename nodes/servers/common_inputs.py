"""Inputs that several nodes of this family have."""

from __future__ import annotations

from comfy_api.v0_0_2 import io

from .._comfy import ADVANCED


def key_input() -> io.String.Input:
    """Which environment variable holds the key."""
    return io.String.Input(
        "key_variable",
        default="",
        tooltip=(
            "NAME of the environment variable that holds the server's API key, never the key "
            "itself: widgets are saved into workflows. A server on another machine also needs the "
            "variable <NAME>_HOST with its host name."
        ),
        **ADVANCED,
    )
