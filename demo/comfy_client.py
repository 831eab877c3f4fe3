"""Talks to a running ComfyUI: queue a graph, follow it over the websocket, fetch what it made."""

from __future__ import annotations

import asyncio
import contextlib
import json
import time
import urllib.error
import urllib.parse
import urllib.request
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

# For a machine that others keep busy: only a server that hangs comes to these limits.
ANSWER_SECONDS, HISTORY_TRIES = 300.0, 600
Progress = Callable[[str, int, int], None]
# A proxy named in the environment must not see loopback traffic.
_open = urllib.request.build_opener(urllib.request.ProxyHandler({})).open


class ServerError(RuntimeError):
    """The server did not start, refused a graph or died; the message holds what it said."""


@dataclass
class Result:
    """One finished prompt.

    status: success, error or interrupted. outputs: node id -> what the node showed. errors: one
    sentence each. seconds: from queueing to the end. executed: ids of the nodes that ran, in order
    (cached ones are absent). previews: pictures sent while it ran.
    """

    status: str
    outputs: dict[str, dict[str, Any]]
    errors: list[str]
    seconds: float
    executed: list[str] = field(default_factory=list)
    previews: int = 0

    def files(self) -> Iterator[tuple[str, dict[str, str]]]:
        """Every saved or previewed file as (node id, {filename, subfolder, type})."""
        for node, output in self.outputs.items():
            for entries in output.values():
                for entry in entries if isinstance(entries, list) else ():
                    if isinstance(entry, dict) and "filename" in entry:
                        yield node, entry


class ComfyClient:
    """The HTTP side of one ComfyUI at `url`."""

    def __init__(self, url: str):
        self.url = url
        self._object_info: dict[str, Any] | None = None

    def check(self) -> None:
        """Called while a prompt runs; a subclass raises ServerError when its server is gone."""

    # What the server knows

    def object_info(self, fresh: bool = False) -> dict[str, Any]:
        """Every node's schema. Combos list the files present when asked: `fresh` asks again."""
        if self._object_info is None or fresh:
            self._object_info = self._get("/object_info", timeout=ANSWER_SECONDS)
        return self._object_info

    def convert(self, graph: dict[str, Any]) -> dict[str, Any]:
        """A saved graph (nodes and links) -> the API form that /prompt takes."""
        from comfy_cli.workflow_to_api import convert_ui_to_api

        return convert_ui_to_api(graph, self.object_info(fresh=True))

    # Running a graph

    def run(
        self, prompt: dict[str, Any], on_progress: Progress | None = None, timeout: float = 1800
    ) -> Result:
        """Queue an API graph and follow it to its end.

        on_progress(node id, value, maximum) is called when a node starts (0, 0) and on each step.
        Raises ServerError when the server refuses any part of the graph, dies, or `timeout` seconds
        pass. A node that fails does not raise: see Result.status and Result.errors.
        """
        self.check()
        return asyncio.run(self._follow(prompt, on_progress, timeout))

    async def _follow(
        self, prompt: dict[str, Any], on_progress: Progress | None, timeout: float
    ) -> Result:
        import aiohttp

        client, result = uuid.uuid4().hex, Result("running", {}, [], 0.0)
        address = f"{self.url}/ws?clientId={client}"
        # Connected before queueing: messages of a prompt go to its client only, once.
        async with (
            aiohttp.ClientSession() as session,
            session.ws_connect(address, max_msg_size=0) as stream,
        ):
            start = time.perf_counter()
            prompt_id = self._queue(prompt, client)
            try:
                while not await self._next_event(stream, prompt_id, result, on_progress):
                    if time.perf_counter() - start > timeout:
                        raise ServerError(f"The graph did not finish within {timeout:.0f} s.")
            except BaseException:
                with contextlib.suppress(OSError):
                    self.interrupt()
                raise
        result.seconds = time.perf_counter() - start
        self._read_history(prompt_id, result)
        return result

    async def _next_event(
        self, stream: Any, prompt_id: str, result: Result, on_progress: Progress | None
    ) -> bool:
        """Take in one message; True when the prompt has ended."""
        from aiohttp import WSMsgType

        self.check()
        try:
            message = await stream.receive(timeout=2)
        except asyncio.TimeoutError:
            # An end message can be lost; the history is not. When it is there, one more round takes
            # in what was still on its way.
            ended, was_ending = bool(self.history(prompt_id)), result.status == "ending"
            result.status = "ending" if ended else "running"
            return ended and was_ending
        if message.type == WSMsgType.BINARY:
            result.previews += 1
            return False
        if message.type != WSMsgType.TEXT:
            self.check()
            raise ServerError("The server closed the connection.")
        event = json.loads(message.data)
        data = event.get("data") or {}
        if data.get("prompt_id") != prompt_id:
            return False
        if event["type"] == "executing":
            if data["node"] is None:
                return True
            result.executed.append(data["node"])
            if on_progress:
                on_progress(data["node"], 0, 0)
        elif event["type"] == "progress" and on_progress:
            on_progress(data.get("node") or "", data["value"], data["max"])
        return False

    def _queue(self, prompt: dict[str, Any], client: str) -> str:
        try:
            answer = self._post("/prompt", {"prompt": prompt, "client_id": client})
        except urllib.error.HTTPError as error:
            body = error.read().decode("utf-8", "replace")
            raise ServerError(f"ComfyUI refused the graph: {_readable(body)}") from None
        if answer.get("node_errors"):
            # ComfyUI runs the valid part and drops the rest, which would pass for a full result.
            self._post("/queue", {"delete": [answer["prompt_id"]]})
            self.interrupt()
            raise ServerError(f"ComfyUI refused part of the graph: {_readable(json.dumps(answer))}")
        return answer["prompt_id"]

    def _read_history(self, prompt_id: str, result: Result) -> None:
        for _ in range(HISTORY_TRIES):
            entry = self.history(prompt_id)
            if entry:
                break
            time.sleep(0.1)
        else:
            raise ServerError("The graph ended but left no history.")
        result.status, result.outputs = entry["status"]["status_str"], entry.get("outputs", {})
        for kind, data in entry["status"]["messages"]:
            if kind == "execution_interrupted":
                result.status = "interrupted"
            elif kind == "execution_error":
                result.errors.append(f"{data['node_type']}: {data['exception_message'].strip()}")

    def history(self, prompt_id: str) -> dict[str, Any]:
        """The finished prompt's entry, or an empty dict while it waits or runs."""
        return self._get(f"/history/{prompt_id}").get(prompt_id, {})

    def interrupt(self) -> None:
        self._post("/interrupt", {})

    def free(self) -> None:
        """Unload the models and drop cached results."""
        self._post("/free", {"unload_models": True, "free_memory": True})

    # Files

    def upload(self, path: Path | str) -> str:
        """Put a picture into the input folder; returns the name that LoadImage knows it by."""
        path, mark = Path(path), uuid.uuid4().hex
        head = (
            f'--{mark}\r\nContent-Disposition: form-data; name="image"; filename="{path.name}"\r\n'
            "Content-Type: application/octet-stream\r\n\r\n"
        )
        body = head.encode() + path.read_bytes() + f"\r\n--{mark}--\r\n".encode()
        kind = f"multipart/form-data; boundary={mark}"
        request = urllib.request.Request(
            f"{self.url}/upload/image", data=body, headers={"Content-Type": kind}
        )
        with _open(request, timeout=ANSWER_SECONDS) as answer:
            return json.load(answer)["name"]

    def view(self, filename: str, subfolder: str = "", type: str = "output") -> bytes:
        """The bytes of a result file; takes the entries of Result.files() as keywords."""
        query = urllib.parse.urlencode({"filename": filename, "subfolder": subfolder, "type": type})
        with _open(f"{self.url}/view?{query}", timeout=ANSWER_SECONDS) as answer:
            return answer.read()

    def _get(self, path: str, timeout: float = ANSWER_SECONDS) -> Any:
        with _open(self.url + path, timeout=timeout) as answer:
            return json.load(answer)

    def _post(self, path: str, data: dict[str, Any]) -> Any:
        request = urllib.request.Request(
            self.url + path,
            data=json.dumps(data).encode(),
            headers={"Content-Type": "application/json"},
        )
        with _open(request, timeout=ANSWER_SECONDS) as answer:
            body = answer.read()
        return json.loads(body) if body.strip() else None


def _readable(body: str) -> str:
    """The sentences in an error answer of /prompt; the raw text when it has another shape."""
    try:
        answer = json.loads(body)
        lines = [answer["error"]["message"]] if answer.get("error") else []
        for node, entry in (answer.get("node_errors") or {}).items():
            for fault in entry["errors"]:
                what = f"{fault['message']}: {fault['details']}"
                lines.append(f"node {node} ({entry['class_type']}): {what}")
        return "; ".join(lines) or body
    except (ValueError, KeyError, TypeError, AttributeError):
        return body
