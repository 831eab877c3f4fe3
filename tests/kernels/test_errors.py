"""The one error text, and log lines: what to do first, and writable to any console."""

from __future__ import annotations

import io
import logging

import pytest

from frugal.kernels.errors import FrugalError
from frugal.kernels.log import LOG

NAMES = ("plain.safetensors", "\ud800.safetensors", "\u732b.png", "caf\xe9\n.gguf")


@pytest.mark.parametrize("name", NAMES)
def test_an_error_can_be_written_to_any_console(name):
    error = FrugalError(f"{name} is a cake", "a model", "choose a model.")
    said = str(error)
    assert said.isascii() and said.startswith("choose a model: ") and said.endswith("a model.")
    assert ("plain" in said) == (name == NAMES[0])


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("encoding", ["ascii", "cp1252", "utf-8"])
def test_a_log_line_can_be_written_to_any_console(name, encoding):
    held = io.BytesIO()
    stream = io.TextIOWrapper(held, encoding=encoding, write_through=True)
    handler = logging.StreamHandler(stream)
    # ComfyUI's handler raises instead of telling the console.
    handler.handleError = lambda record: pytest.fail(f"not written: {record.getMessage()!a}")
    LOG.addHandler(handler)
    try:
        LOG.warning("[Frugal] %s has %d keys", name, 3)
    finally:
        LOG.removeHandler(handler)
    assert held.getvalue().decode(encoding).rstrip("\r\n").endswith("has 3 keys")
