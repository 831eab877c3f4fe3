"""Reports on nodes: sent to the page, and kept for a page that is loaded again.

ComfyUI's own progress text is gone when the job ends, and a node that was cancelled or has already
finished has no output to carry one. web/reports.js shows what comes from here.
"""

from __future__ import annotations

import sys
from collections import OrderedDict
from typing import Any

EVENT, ROUTE = "frugal.report", "/frugal/reports"
WORKFLOWS = 64  # remembered, the latest ones
LINES = 6


def on_node(text: str) -> str:
    """As much of a report as a node has room for; the rest is in its output and in the log."""
    lines = [line.rstrip() for line in text.strip().splitlines() if line.strip()]
    if len(lines) <= LINES:
        return "\n".join(lines)
    more = len(lines) - LINES + 1
    return "\n".join([*lines[: LINES - 1], f"({more} more lines in the report output)"])


class Reports:
    """The latest report of each node, by workflow."""

    def __init__(self) -> None:
        self._texts: OrderedDict[str, dict[str, str]] = OrderedDict()

    def add(self, workflow: str, node: str, text: str) -> None:
        self._texts.setdefault(workflow, {})[node] = text
        self._texts.move_to_end(workflow)
        while len(self._texts) > WORKFLOWS:
            self._texts.popitem(last=False)

    def of(self, workflow: str) -> dict[str, str]:
        """Text by node id."""
        return dict(self._texts.get(workflow, {}))


REPORTS = Reports()


def send(node: str, text: str) -> None:
    """Show `text` on a node of the graph that runs; silent outside a server."""
    server = _server()
    if server is None:
        return
    workflow, text = _running_workflow(server), on_node(text)
    REPORTS.add(workflow, node, text)
    server.send_sync(EVENT, {"workflow": workflow, "node": node, "text": text})


def serve() -> None:
    """Let the page ask for the reports of a workflow."""
    server = _server()
    if server is None:
        return
    from server import web  # ComfyUI itself has it, whatever the pack was installed with

    @server.routes.get(ROUTE)
    async def reports(request):
        return web.json_response(REPORTS.of(request.query.get("workflow", "")))


def _server() -> Any:
    """ComfyUI's server, where one runs in this process: it has imported the module then."""
    return getattr(getattr(sys.modules.get("server"), "PromptServer", None), "instance", None)


def _running_workflow(server: Any) -> str:
    """Id of the workflow that is executed, as its page wrote it; empty for a prompt without one."""
    running, _ = server.prompt_queue.get_current_queue_volatile()
    for _, _, _, extra_data, *_ in running:
        workflow = (extra_data.get("extra_pnginfo") or {}).get("workflow") or {}
        return str(workflow.get("id", ""))
    return ""
