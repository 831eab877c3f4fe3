"""One HTTP exchange with a named server: time-out, size limit, no redirects, errors with a remedy.

Where a request may be repeated, replies that say "later" (429, 502, 503, 504), connections that
fail and answers that break off are tried again a few times; all else is the caller's to judge.
"""

from __future__ import annotations

import asyncio
import re
import socket
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import aiohttp

from ..kernels import json_text
from ..kernels.errors import FrugalError
from .address import Server
from .waiting import within

LATER = (429, 502, 503, 504)
TRIES = 3
PAUSE, LONGEST_PAUSE = 1.0, 30.0
JSON_LIMIT = 8 * 10**6
SHOWN = 300
UNPACKED = ("", "identity", "gzip", "deflate")
SHORTEST_KEY = 8  # what is shorter may be in any answer by chance


@dataclass(frozen=True)
class Reply:
    """status, media type in lower case, body."""

    status: int
    kind: str
    body: bytes

    def json(self, where: str) -> Any:
        """The body as JSON. Raises FrugalError naming `where` if it is none."""
        try:
            return json_text.parse(self.body)
        except ValueError:
            raise FrugalError(
                f"{where} answered {self.status} with {self.kind or 'no type'}: {self.text()}",
                "JSON",
                "check that the address is that of the API, which often ends in /v1",
            ) from None

    def text(self) -> str:
        """What the server said about an error, as short ASCII."""
        said: Any = self.body[: 4 * SHOWN].decode("utf-8", "replace")
        try:
            said = json_text.parse(self.body)
        except ValueError:
            said = re.sub(r"<[^>]*>", " ", said)
        for key in ("error", "message", "detail"):
            if isinstance(said, Mapping) and said.get(key):
                said = said[key]
        words = " ".join(str(said).split())
        return ascii(words)[1:-1][:SHOWN] or "nothing"


async def exchange(
    session: aiohttp.ClientSession,
    server: Server,
    method: str,
    path: str,
    *,
    timeout: float,
    limit: int = JSON_LIMIT,
    repeat: bool = True,
    body: Callable[[], Mapping[str, Any]] = dict,
) -> Reply:
    """`method` on server.base + path; `body` makes the arguments `json=` or `data=` again for each
    try. timeout: seconds for all tries together; limit: bytes of the answer; repeat: whether the
    request may be sent again.

    Raises FrugalError where no whole answer came.
    """
    where = f"{server.name}{path}"

    async def attempts() -> Reply:
        for left in reversed(range(TRIES if repeat else 1)):
            pause = PAUSE
            try:
                reply, pause = await _once(session, server, method, path, limit, body())
            except (aiohttp.ClientConnectionError, aiohttp.ClientPayloadError, ConnectionError):
                if not left:
                    raise
            else:
                if reply.status not in LATER or not left:
                    return reply
            await asyncio.sleep(pause)
        raise AssertionError("the last attempt returns or raises")

    try:
        async with within(timeout):
            return await attempts()
    # A name of its own before Python 3.11.
    except asyncio.TimeoutError:
        raise FrugalError(
            f"no answer from {where} within {timeout:g} s",
            "an answer in time",
            "raise timeout_s, or look whether the server is busy",
        ) from None
    except aiohttp.ClientPayloadError:
        raise FrugalError(
            f"the answer of {where} broke off", "a whole answer", "run the node again"
        ) from None
    except (aiohttp.ClientError, ConnectionError) as error:
        raise _unreachable(server, error) from None


async def _once(
    session: aiohttp.ClientSession,
    server: Server,
    method: str,
    path: str,
    limit: int,
    body: Mapping[str, Any],
) -> tuple[Reply, float]:
    # Some versions of aiohttp unpack a whole piece of brotli at once, however large it becomes.
    headers = {**server.headers, "Accept-Encoding": "gzip, deflate"}
    async with session.request(
        method, server.base + path, headers=headers, allow_redirects=False, **body
    ) as answer:
        packed = answer.headers.get("Content-Encoding", "identity").strip().lower()
        if packed not in UNPACKED:
            raise FrugalError(
                f"{server.name}{path} sent an answer packed as {ascii(packed)[1:-1][:40]}",
                "a plain answer, or one in gzip or deflate",
                "switch that compression off at the server or its proxy",
            )
        pieces, size = [], 0
        async for piece in answer.content.iter_chunked(1 << 16):
            size += len(piece)
            if size > limit:
                raise FrugalError(
                    f"{server.name}{path} sent more than {limit} bytes",
                    "a shorter answer",
                    "check that the address is that of the API",
                )
            pieces.append(piece)
        if 300 <= answer.status < 400:
            raise FrugalError(
                f"{server.name}{path} sends the request on to another address",
                "an answer from the address that was typed in",
                "type the address that answers itself",
            )
        kind, said = answer.content_type.lower(), b"".join(pieces)
        key = server.headers.get("Authorization", "").removeprefix("Bearer ").encode()
        if len(key) >= SHORTEST_KEY and ("json" in kind or kind.startswith("text/")):
            # A server that repeats the request would bring the key into logs and saved graphs.
            said = said.replace(key, b"[the key]")
        reply = Reply(answer.status, kind, said)
        return reply, _pause(answer.headers.get("Retry-After", ""))


def _pause(asked: str) -> float:
    return min(float(asked), LONGEST_PAUSE) if asked.isdecimal() else PAUSE


def _unreachable(server: Server, error: BaseException) -> FrugalError:
    cause = getattr(error, "os_error", error)
    if isinstance(cause, ConnectionRefusedError):
        reason = "nothing listens there"
    elif isinstance(cause, socket.gaierror):
        reason = "the name is not known"
    else:
        reason = ascii(str(error) or type(error).__name__)[1:-1][:SHOWN]
    return FrugalError(
        f"{server.name} cannot be reached ({reason})",
        "a running server there",
        "start the server, or correct its address",
    )


def refusal(server: Server, reply: Reply) -> FrugalError:
    """The error for an answer with a status of 400 or more."""
    said = f"{server.name} answered {reply.status}: {reply.text()}"
    if reply.status in (401, 403):
        remedy = "type the name of the environment variable that holds this server's key"
        return FrugalError(said, "a key that the server knows", remedy)
    if reply.status == 404:
        remedy = "correct the address (it often ends in /v1) or the model's name"
        return FrugalError(said, "a server that knows this address and model", remedy)
    if reply.status in LATER:
        return FrugalError(said, "a server with room for the request", "run the node again later")
    if reply.status >= 500:
        return FrugalError(said, "an answer without an error", "look into the server's log")
    return FrugalError(said, "a request that the server takes", "change what it complains about")
