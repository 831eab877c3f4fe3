"""The pack opens no port and no connection: a real ComfyUI with it, every socket call written down.

Python tells an audit hook of each bind, connect, datagram and name look-up before it happens; the
system is asked which ports the process listens on.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

import psutil
import pytest

from frugal.demo.comfy_server import ComfyServer

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


@pytest.fixture(scope="module")
def watched(comfy_tree, tmp_path_factory):
    """A server that has the pack and the hook, and the file the hook writes to."""
    folder = tmp_path_factory.mktemp("ports")
    (folder / "hook").mkdir()
    (folder / "hook" / "sitecustomize.py").write_text(HOOK)
    log = folder / "sockets.log"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FRUGAL_SOCKET_LOG", str(log))
        there = os.environ.get("PYTHONPATH")
        patch.setenv("PYTHONPATH", os.pathsep.join(filter(None, [str(folder / "hook"), there])))
        with ComfyServer(comfy_tree, folder / "base") as server:
            yield server, log


def seen(log: Path) -> set[tuple[str, ...]]:
    return {tuple(json.loads(line)) for line in log.read_text().splitlines()}


def test_loading_and_using_the_pack_opens_nothing(watched):
    server, log = watched
    port = int(server.url.rpartition(":")[2])
    graph = {
        "1": {"class_type": "SolidMask", "inputs": {"value": 1.0, "width": 64, "height": 64}},
        "2": {"class_type": "FrugalMaskClean", "inputs": {"mask": ["1", 0]}},
        "3": {"class_type": "MaskToImage", "inputs": {"mask": ["2", 0]}},
        "4": {"class_type": "SaveImage", "inputs": {"images": ["3", 0], "filename_prefix": "m"}},
        "5": {"class_type": "FrugalDoctor", "inputs": {}},
    }
    for number in ("2", "5"):
        wanted = server.object_info()[graph[number]["class_type"]]["input"].get("required", {})
        for name, spec in wanted.items():
            if name not in graph[number]["inputs"]:
                options = spec[1] if len(spec) > 1 else {}
                first = spec[0][0] if isinstance(spec[0], list) else options.get("options", [""])[0]
                graph[number]["inputs"][name] = options.get("default", first)
    result = server.run(graph)
    assert result.status == "success", result.errors
    told = seen(log)
    # ComfyUI's own port stands there, or the hook would not have worked.
    own = ("socket.bind", repr(("127.0.0.1", port)))
    assert own in told
    asked = ("socket.getaddrinfo", "'127.0.0.1'")
    # urllib3, which ComfyUI imports, tries whether there is IPv6: bound and closed at once.
    probe = ("socket.bind", repr(("::1", 0)))
    more = {each for each in told - {own, probe} if each[:2] != asked}
    assert not more, f"ComfyUI with the pack did this: {sorted(more)}"
    process = psutil.Process(server.process.pid)
    family = [process, *process.children(recursive=True)]
    open_now = [each for one in family for each in one.net_connections("inet")]
    listening = {each.laddr.port for each in open_now if each.status == psutil.CONN_LISTEN}
    assert listening == {port}
    others = {each for each in open_now if each.raddr and each.raddr.ip != "127.0.0.1"}
    assert not others
