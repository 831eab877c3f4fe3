"""Every socket call of a process, written down by Python itself.

Python tells an audit hook of each bind, connect, datagram and name look-up before it happens.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

HOOK = """
import json, os, sys
out = os.open(os.environ["FRUGAL_SOCKET_LOG"], os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
names = {"socket.bind", "socket.connect", "socket.sendto", "socket.sendmsg", "socket.getaddrinfo",
         "socket.gethostbyname", "socket.gethostbyaddr"}
def hook(event, values):
    if event in names:
        line = json.dumps([event, *[repr(v) for v in values[1 if "get" not in event else 0:]]])
        os.write(out, line.encode() + b"\\n")
sys.addaudithook(hook)
"""


class SocketLog:
    """What processes started within `watching` did, one call a line. folder: for hook and log."""

    def __init__(self, folder: Path):
        self.path = folder / "sockets.log"
        (folder / "hook").mkdir()
        (folder / "hook" / "sitecustomize.py").write_text(HOOK)

    @contextmanager
    def watching(self) -> Iterator[None]:
        hook = str(self.path.parent / "hook")
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("FRUGAL_SOCKET_LOG", str(self.path))
            patch.setenv("PYTHONPATH", hook, prepend=os.pathsep)
            yield

    def calls(self) -> list[tuple[str, ...]]:
        """(event, its values as text) in the order of the calls."""
        return [tuple(json.loads(line)) for line in self.path.read_text().splitlines()]
