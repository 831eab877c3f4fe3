"""The pack opens no port and no connection: every socket call of the shared server, with its start.

The system is asked which ports the process listens on.
"""

from __future__ import annotations

import psutil


def test_loading_and_using_the_pack_opens_nothing(server, sockets):
    port = int(server.url.rpartition(":")[2])
    # ComfyUI's own port stands there, or the hook would not have worked.
    own = ("socket.bind", repr(("127.0.0.1", port)))
    earlier = sockets.calls()
    booted = earlier.index(own) + 1
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
    told = sockets.calls()
    # urllib3, which ComfyUI imports, tries whether there is IPv6: bound and closed at once.
    probe = ("socket.bind", repr(("::1", 0)))

    def asked(call, connects=False):
        event, *values = call
        if event == "socket.getaddrinfo":
            return values[0] == "'127.0.0.1'"
        if connects and event == "socket.connect":
            return values[0].startswith("('127.0.0.1', ")
        return call in (own, probe)

    more = {call for call in told[:booted] + told[len(earlier) :] if not asked(call)}
    # Nodes of the tests before may have called servers of those tests, here as all are.
    more |= {call for call in told if not asked(call, connects=True)}
    assert not more, f"ComfyUI with the pack did this: {sorted(more)}"
    process = psutil.Process(server.process.pid)
    family = [process, *process.children(recursive=True)]
    open_now = [each for one in family for each in one.net_connections("inet")]
    listening = {each.laddr.port for each in open_now if each.status == psutil.CONN_LISTEN}
    assert listening == {port}
    others = {each for each in open_now if each.raddr and each.raddr.ip != "127.0.0.1"}
    assert not others
