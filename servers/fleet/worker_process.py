"""One ComfyUI process that lives and dies with its owner, and runs one graph at a time.

Graphs run in a process of their own because a CUDA error spoils the process that it happens in.
Models and custom nodes are those of the given ComfyUI; inputs, outputs and the rest are its own.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import socket
import sys
import time
import uuid
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aiohttp

from ...kernels import json_text
from ...kernels.errors import FrugalError
from .job_request import JobRequest
from .scheduler import Event
from .worker_dir import WorkerDir

BOOT_SECONDS, STOP_SECONDS = 600.0, 20.0
POLL, LONGEST_POLL = 0.1, 1.0
LOG_SHOWN = 15
# What a question to it raises when no usable answer comes.
UNHEARD = (OSError, aiohttp.ClientError, asyncio.TimeoutError, ValueError)
# What of the owner's environment custom nodes have no business with.
PRIVATE = re.compile(r"RAY_.*|FRUGAL_FLEET_.*|PYTHONSAFEPATH")
# Messages after which the process can do nothing more with its card.
POISONED = re.compile(
    r"CUDA error|AcceleratorError|cudaError|device-side assert|unspecified launch"
)
# An input that no node has: ComfyUI does not pass it on, but a node that saves is then another one
# for its cache in each attempt, and runs.
MARK = "frugal_fleet_attempt"
# Linux ends the child with its parent, even when that is killed.
LAUNCH = (
    "import ctypes, os, sys\n"
    "ctypes.CDLL(None).prctl(1, 9)\n"
    "if os.getppid() != int(sys.argv[1]): os._exit(1)\n"
    "os.execv(sys.argv[2], sys.argv[2:])\n"
)


class LostError(RuntimeError):
    """The process ended, or is of no more use."""


@dataclass(frozen=True)
class Recipe:
    """comfyui: its folder. python: its interpreter; empty: this one. base: folder for the workers'
    own folders. arguments: further ones for main.py. cpu: no card. job_seconds: time limit of one
    graph. secrets: names of variables that ComfyUI does not get to see.
    """

    comfyui: str
    base: str
    python: str = ""
    arguments: tuple[str, ...] = ()
    cpu: bool = False
    job_seconds: float = 3600.0
    secrets: tuple[str, ...] = ()


class Comfy:
    """Start it with `start`; `alive` afterwards says whether it still runs."""

    def __init__(self, recipe: Recipe):
        self.recipe = recipe
        self.place = WorkerDir(Path(recipe.base))
        self.name, self.memory = self.place.name, 0
        self.process: asyncio.subprocess.Process | None = None
        self._url = ""
        self._savers: set[str] = set()
        self._session: aiohttp.ClientSession | None = None

    async def start(self) -> None:
        """Raises FrugalError where it does not come up."""
        main = Path(self.recipe.comfyui) / "main.py"
        if not main.is_file():
            raise FrugalError(
                f"no main.py in {self.recipe.comfyui}", "a ComfyUI folder", "name that"
            )
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        self._url = f"http://127.0.0.1:{port}"
        with self.place.log.open("wb") as log:
            self.process = await asyncio.create_subprocess_exec(
                *self._command(port),
                cwd=self.recipe.comfyui,
                env=self._environment(),
                stdin=asyncio.subprocess.DEVNULL,
                stdout=log,
                stderr=log,
            )
        # A proxy named in the environment must not see loopback traffic: aiohttp asks none.
        self._session = aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=60))
        await self._wait_until_up()

    def _environment(self) -> dict[str, str]:
        return {
            name: value
            for name, value in os.environ.items()
            if not PRIVATE.fullmatch(name) and name not in self.recipe.secrets
        }

    def _command(self, port: int) -> list[str]:
        python = self.recipe.python or sys.executable
        command = [python, "main.py", "--listen", "127.0.0.1", "--port", str(port)]
        command += ["--disable-auto-launch", "--database-url", "sqlite:///:memory:"]
        command += self.place.arguments()
        if self.recipe.cpu:
            command.append("--cpu")
        command += self.recipe.arguments
        if sys.platform == "linux":
            return [sys.executable, "-c", LAUNCH, str(os.getpid()), *command]
        return command

    async def _wait_until_up(self) -> None:
        end = time.monotonic() + BOOT_SECONDS
        while time.monotonic() < end:
            if not self.alive():
                raise FrugalError(
                    f"ComfyUI ended with status {self.process and self.process.returncode} while "
                    f"it started ({self.log_tail()})",
                    "a ComfyUI that starts",
                    f"read {self.place.log}",
                )
            try:
                stats = await self._ask("GET", "/system_stats")
                known = await self._ask("GET", "/object_info")
            except UNHEARD:
                await asyncio.sleep(0.3)
                continue
            device = (stats.get("devices") or [{}])[0]
            self.memory = int(device.get("vram_total") or 0)
            self._savers = {name for name, info in known.items() if info.get("output_node")}
            return
        raise FrugalError(
            f"ComfyUI did not answer within {BOOT_SECONDS:g} s",
            "one that starts",
            f"read {self.place.log}",
        )

    def alive(self) -> bool:
        return self.process is not None and self.process.returncode is None

    def log_tail(self) -> str:
        """Its last lines, as one."""
        try:
            lines = self.place.log.read_text("utf-8", "replace").splitlines()[-LOG_SHOWN:]
        except OSError:
            return "no log"
        return " | ".join(ascii(line.strip())[1:-1] for line in lines if line.strip())[-1500:]

    async def stop(self) -> None:
        """End the process and remove its folder; the log stays."""
        if self._session is not None:
            await self._session.close()
        if self.process is not None and self.process.returncode is None:
            self.process.terminate()
            try:
                await asyncio.wait_for(self.process.wait(), STOP_SECONDS)
            except asyncio.TimeoutError:
                self.process.kill()
                await self.process.wait()
        self.place.remove()

    # One graph

    async def run(self, job: str, order: JobRequest) -> AsyncIterator[Event]:
        """Events of one order (see scheduler.py). Raises LostError when the process is lost."""
        # Begun on a process that the job before took down, a job would lose an attempt for nothing.
        try:
            await self._ask("GET", "/prompt")
        except UNHEARD as error:
            raise self._lost(error) from None
        self.place.lay(order.files)
        yield {"kind": "started", "worker": self.name, "memory": self.memory}
        try:
            ended = await self._graph(order.workflow)
            if ended["kind"] == "done":
                for name, data in self.place.results():
                    yield {"kind": "file", "name": name, "data": data}
            yield ended
        finally:
            self.place.clear()

    async def _graph(self, workflow: Mapping[str, Any]) -> Event:
        prompt = str(uuid.uuid4())
        marked = {
            name: {**node, "inputs": {**node["inputs"], MARK: prompt}}
            if node["class_type"] in self._savers
            else node
            for name, node in workflow.items()
        }
        body = {"prompt": marked, "prompt_id": prompt, "client_id": self.name}
        refused = await self._queue(body)
        if refused:
            return {"kind": "failed", "error": refused}
        try:
            return await asyncio.wait_for(self._watch(prompt), self.recipe.job_seconds)
        except asyncio.TimeoutError:
            await self._interrupt(prompt)
            limit = self.recipe.job_seconds
            error = f"the graph ran longer than {limit:g} s and was stopped; raise job_seconds."
            return {"kind": "failed", "error": error}
        except asyncio.CancelledError:
            await asyncio.shield(self._interrupt(prompt))
            raise

    async def _queue(self, body: Mapping[str, Any]) -> str:
        try:
            assert self._session is not None
            async with self._session.post(f"{self._url}/prompt", json=body) as answer:
                text = await answer.text()
                if answer.status == 200:
                    return ""
        except (OSError, aiohttp.ClientError, asyncio.TimeoutError) as error:
            raise self._lost(error) from None
        return f"ComfyUI refused the graph: {_refusal(text)}"

    async def _watch(self, prompt: str) -> Event:
        pause = POLL
        while True:
            await asyncio.sleep(pause)
            pause = min(1.2 * pause, LONGEST_POLL)
            try:
                history = await self._ask("GET", f"/history/{prompt}")
            except asyncio.TimeoutError:
                # A node that holds the interpreter: the limit of the job's time ends this.
                history = {}
            except (OSError, aiohttp.ClientError, ValueError) as error:
                raise self._lost(error) from None
            if prompt in history:
                # Tidying only: it must not turn a graph that has ended into another end.
                with contextlib.suppress(*UNHEARD):
                    await self._ask("POST", "/history", {"delete": [prompt]})
                return self._outcome(history[prompt])

    def _outcome(self, entry: Mapping[str, Any]) -> Event:
        status = entry.get("status") or {}
        if status.get("status_str") == "success":
            return {"kind": "done", "shown": entry.get("outputs") or {}}
        for name, facts in status.get("messages", ()):
            if name == "execution_error":
                what = f"{facts.get('exception_type')}: {facts.get('exception_message')}".strip()
                if POISONED.search(what):
                    raise LostError(f"{self.name}: {ascii(what)[1:-1][:300]}")
                where = f"node {facts.get('node_id')} ({facts.get('node_type')})"
                return {"kind": "failed", "error": f"{where}: {what}"[:4000]}
        return {"kind": "failed", "error": "the graph was interrupted"}

    async def _interrupt(self, prompt: str) -> None:
        """Stop the graph; a process that does not listen is killed."""
        try:
            await self._ask("POST", "/queue", {"delete": [prompt]})
            await self._ask("POST", "/interrupt", {"prompt_id": prompt})
            await asyncio.wait_for(self._watch(prompt), STOP_SECONDS)
        except (*UNHEARD, LostError):
            if self.process is not None and self.alive():
                self.process.kill()

    async def _ask(self, method: str, path: str, body: Any = None) -> Any:
        assert self._session is not None
        async with self._session.request(method, self._url + path, json=body) as answer:
            data = await answer.read()
            return json_text.parse(data) if data.strip() else {}

    def _lost(self, error: BaseException) -> LostError:
        return LostError(
            f"{self.name} does not answer ({type(error).__name__}); its log ends: {self.log_tail()}"
        )


def _refusal(text: str) -> str:
    """What ComfyUI's answer to /prompt complains about, as one line."""
    try:
        said = json_text.parse(text)
        first = said["error"]
        parts = [f"{first['message']} {first.get('details', '')}".strip()]
        for node, found in said.get("node_errors", {}).items():
            told: Sequence[Any] = found.get("errors", ())
            parts += [
                f"node {node} ({found.get('class_type')}): {e['message']}: {e['details']}"
                for e in told
            ]
    except (ValueError, KeyError, TypeError, AttributeError):
        return " ".join(text.split())[:1000]
    return "; ".join(parts)[:4000]
