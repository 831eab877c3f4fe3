"""What a program says to a fleet: hand in, wait, fetch, delete."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any
from urllib.parse import quote

import aiohttp

from ...kernels.atomic_write import atomic_write
from ...kernels.errors import FrugalError
from ..address import Server, server
from ..transport import Reply, exchange, refusal
from .store import ENDED

JOBS = "/v1/jobs"
ANSWER, TRANSFER = 120.0, 1800.0
POLL, LONGEST_POLL = 0.3, 3.0
# Ray starts a lost scheduler or proxy again; on a busy machine that takes a while.
OUTAGE = 180.0
LARGEST_RESULT = 4 * 10**9
# The status of a queue without room.
FULL = 503


class FleetClient:
    """`async with FleetClient(url, token) as fleet`. Every method raises FrugalError where the
    fleet refuses or does not answer. Sending an order again under its key makes no second job, so
    what fails on the way is simply sent again.
    """

    def __init__(self, url: str, token: str):
        headers = {"Authorization": f"Bearer {token}"} if token else {}
        self.server = Server(server(url).base, headers)
        self._session: aiohttp.ClientSession | None = None

    async def __aenter__(self) -> FleetClient:
        self._session = aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=None))
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._session is not None:
            await self._session.close()

    async def submit(
        self,
        workflow: bytes,
        files: Mapping[str, bytes],
        key: str,
        plan: bytes = b"",
        patience: float = 0.0,
    ) -> dict[str, Any]:
        """The job. A full queue is waited for up to `patience` seconds, and so is a fleet that does
        not answer, for at most OUTAGE.
        """

        def body() -> Mapping[str, Any]:
            form = aiohttp.FormData(default_to_multipart=True)
            form.add_field("workflow", workflow, content_type="application/json")
            if plan:
                form.add_field("plan", plan, content_type="application/json")
            for name, data in files.items():
                form.add_field("input", data, filename=name)
            return {"data": form}

        keyed = Server(self.server.base, {**self.server.headers, "Idempotency-Key": key})
        heard = time.monotonic()
        end = heard + patience
        while True:
            reply = await self._unless_away(
                min(heard + OUTAGE, end), "POST", JOBS, to=keyed, answers=(FULL,),
                timeout=TRANSFER, body=body,
            )  # fmt: skip
            if reply is None:
                await asyncio.sleep(LONGEST_POLL)
                continue
            heard = time.monotonic()
            if reply.status != FULL or heard > end:
                return self._read(reply)

    async def job(self, job: str) -> dict[str, Any]:
        """One job as it is now."""
        return self._read(await self._exchange("GET", f"{JOBS}/{quote(job)}"))

    async def jobs(self, status: str = "", limit: int = 100) -> list[dict[str, Any]]:
        """The newest jobs."""
        asked = f"?limit={limit}" + (f"&status={quote(status)}" if status else "")
        return self._read(await self._exchange("GET", JOBS + asked))["jobs"]

    async def fleet(self) -> dict[str, Any]:
        """Limits and numbers of the fleet."""
        return self._read(await self._exchange("GET", "/v1/fleet"))

    async def cancel(self, job: str) -> dict[str, Any]:
        """The job, with `cancelled`: False if it had ended."""
        return self._read(await self._exchange("POST", f"{JOBS}/{quote(job)}/cancel"))

    async def delete(self, job: str) -> None:
        """Forget an ended job there."""
        reply = await self._exchange("DELETE", f"{JOBS}/{quote(job)}")
        # A repeated request may find it gone already.
        if reply.status != 404:
            self._read(reply)

    async def wait(self, job: str, patience: float) -> dict[str, Any]:
        """The job when it has ended. A fleet that does not answer is waited for up to OUTAGE."""
        heard = time.monotonic()
        end, pause = heard + patience, POLL
        while True:
            reply = await self._unless_away(heard + OUTAGE, "GET", f"{JOBS}/{quote(job)}")
            if reply is not None:
                heard, found = time.monotonic(), self._read(reply)
                if found["status"] in ENDED:
                    return found
            if time.monotonic() > end:
                raise FrugalError(
                    f"job {job} has not ended after {patience:g} s",
                    "a result by then",
                    "wait longer; the job goes on",
                )
            await asyncio.sleep(pause)
            pause = min(1.3 * pause, LONGEST_POLL)

    async def _unless_away(
        self, until: float, method: str, path: str, answers: tuple[int, ...] = (), **more: Any
    ) -> Reply | None:
        """The reply, or None where the fleet does not answer, or says that it failed, before the
        moment `until`. answers: statuses from 500 on that say something else.
        """
        try:
            reply = await self._exchange(method, path, **more)
        except FrugalError:
            if time.monotonic() > until:
                raise
            return None
        failed = reply.status >= 500 and reply.status not in answers
        return None if failed and time.monotonic() < until else reply

    async def fetch(self, job: Mapping[str, Any], folder: Path) -> list[Path]:
        """The results of an ended job, written to `folder` under their names. A fleet that does not
        answer is waited for up to OUTAGE.
        """
        root, written = folder.resolve(), []
        for file in job["files"]:
            path = (root / file["name"]).resolve()
            if not path.is_relative_to(root):
                raise FrugalError(
                    f"a result called {ascii(file['name'])[:80]}",
                    "a name below the folder for it",
                    "do not trust this server",
                )
            address = f"{JOBS}/{quote(job['id'])}/files/{quote(file['name'])}"
            until = time.monotonic() + OUTAGE
            while True:
                reply = await self._unless_away(
                    until, "GET", address, timeout=TRANSFER, limit=LARGEST_RESULT
                )
                if reply is not None:
                    break
                await asyncio.sleep(LONGEST_POLL)
            if reply.status >= 400:
                raise refusal(self.server, reply)
            if len(reply.body) != file["bytes"]:
                raise FrugalError(
                    f"{file['name']} came with {len(reply.body)} bytes",
                    f"{file['bytes']}",
                    "fetch the result again",
                )
            path.parent.mkdir(parents=True, exist_ok=True)
            with atomic_write(path) as unfinished:
                unfinished.write_bytes(reply.body)
            written.append(path)
        return written

    async def _exchange(
        self, method: str, path: str, to: Server | None = None, **more: Any
    ) -> Reply:
        if self._session is None:
            raise RuntimeError("use FleetClient in `async with`")
        return await exchange(
            self._session, to or self.server, method, path, **{"timeout": ANSWER, **more}
        )

    def _read(self, reply: Reply) -> Any:
        if reply.status >= 400:
            raise refusal(self.server, reply)
        return reply.json(self.server.name)


async def settled(client: FleetClient, job: str, patience: float) -> dict[str, Any]:
    """Like `wait`; a job that is given up (Ctrl-C) is cancelled there."""
    try:
        return await client.wait(job, patience)
    except asyncio.CancelledError:
        with contextlib.suppress(FrugalError):
            await asyncio.shield(client.cancel(job))
        raise
