"""A video from a server's /v1/videos: created once, watched, fetched; given up properly.

A job costs minutes of a graphics card, so it must not be paid for twice. A request that may have
arrived is never simply sent again: the server's list is searched for the job first. And the job's
name is kept, so that a run that was broken off finds its job again.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
import re
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import aiohttp

from ..kernels.errors import FrugalError
from . import response_cache
from .address import Server
from .dialects import SGLANG, Dialect, VideoRequest, takes_images
from .transport import LATER, Reply, exchange, refusal
from .waiting import within

VIDEO_LIMIT = 10**9
POLL, PATIENCE = 2.0, 60.0
ANSWER, GOODBYE = 60.0, 5.0
DONE, FAILED = ("completed",), ("failed", "cancelled", "deleted")
# A name that goes into an address.
JOB = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]*")


@dataclass(frozen=True)
class RemoteVideo:
    """data: the file as it came. kind: its media type. server, job: where it was made. notes: what
    happened on the way.
    """

    data: bytes
    kind: str
    server: str
    job: str
    seconds: float
    notes: tuple[str, ...]


class LostServerError(FrugalError):
    """This server cannot go on; another may."""

    __module__ = FrugalError.__module__  # people see this one too

    @classmethod
    def of(cls, error: FrugalError) -> LostServerError:
        """The same sentence as this kind of error."""
        return cls(error.found, error.expected, error.do)


@dataclass(frozen=True)
class JobContext:
    """What all steps of one order share. progress: called with 0..100. folder: for the names of
    jobs. patience: seconds for the whole job.
    """

    session: aiohttp.ClientSession
    dialect: Dialect
    request: VideoRequest
    folder: Path
    progress: Callable[[float], None]
    patience: float
    notes: list[str]


async def order(
    servers: Sequence[Server],
    dialect: Dialect,
    request: VideoRequest,
    folder: Path,
    patience: float,
    progress: Callable[[float], None] = lambda share: None,
) -> RemoteVideo:
    """The video from the first of `servers` that makes it. Raises FrugalError if none does. When
    cancelled, the job is taken off its server.
    """
    async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=None)) as session:
        context = JobContext(session, dialect, request, folder, progress, patience, [])
        for place, server in enumerate(servers):
            try:
                return await _from(context, server)
            except LostServerError as error:
                if place + 1 == len(servers):
                    raise
                context.notes.append(f"{server.name} was skipped: {error}")
    raise FrugalError("no server", "at least one address", "type the address of a server")


async def _from(context: JobContext, server: Server) -> RemoteVideo:
    began = time.monotonic()
    name = response_cache.key(
        [context.dialect.name, server.base, _words(context.request)], context.request.image
    )
    job = await _known(context, server, name)
    if job is None:
        await _check_image(context, server)
        job = await _create(context, server)
        with contextlib.suppress(OSError):
            response_cache.write(context.folder, name, {"job": job})
    try:
        async with within(context.patience):
            await _watch(context, server, job)
        reply = await _fetch(context, server, job)
    except asyncio.CancelledError:
        await asyncio.shield(_remove(context, server, job))
        raise
    except asyncio.TimeoutError:
        raise FrugalError(
            f"job {job} on {server.name} is not done after {context.patience:g} s",
            "a video by then",
            "run it again to go on waiting for the same job, with a longer timeout if need be",
        ) from None
    seconds = time.monotonic() - began
    return RemoteVideo(reply.body, reply.kind, server.name, job, seconds, tuple(context.notes))


def _words(request: VideoRequest) -> dict[str, Any]:
    fields = asdict(request)
    del fields["image"]
    return fields


async def _known(context: JobContext, server: Server, name: str) -> str | None:
    """A job of an earlier run for the same request that the server still has and did not fail."""
    job = (response_cache.read(context.folder, name) or {}).get("job")
    if not isinstance(job, str) or not JOB.fullmatch(job):
        return None
    reply = await _ask(context, server, f"/videos/{job}")
    if reply.status >= 400 or _status(reply, server) in FAILED:
        return None
    context.notes.append(f"found the job of an earlier run again: {job}")
    return job


async def _check_image(context: JobContext, server: Server) -> None:
    wanted, takes = bool(context.request.image), None
    # SGLang tells the kind of its model beside the API, not in it.
    for each in (server, replace(server, base=server.base.removesuffix("/v1"))):
        reply = await _ask(context, each, "/models")
        if reply.status in (401, 403):
            raise refusal(server, reply)
        if reply.status < 400 and "json" in reply.kind:
            takes = takes_images(reply.json(server.name))
        if takes is not None or context.dialect.name != SGLANG:
            break
    if takes is None:
        context.notes.append("the server does not say whether its model takes a start image")
    elif takes != wanted:
        raise FrugalError(
            f"{server.name} has a model for {'image' if takes else 'text'} to video",
            "a start image" if takes else "no image, which it would silently ignore",
            "connect an image" if takes else "take the image off, or ask another server",
        )


async def _create(context: JobContext, server: Server) -> str:
    before = await _listed(context, server)
    try:
        reply = await exchange(
            context.session,
            server,
            "POST",
            "/videos",
            timeout=ANSWER,
            repeat=False,
            body=lambda: context.dialect.body(context.request),
        )
    except asyncio.CancelledError:
        await asyncio.shield(_take_off(context, server, before))
        raise
    except FrugalError as error:
        # It may have arrived all the same.
        job = await _arrived(context, server, before)
        if job is None:
            raise LostServerError.of(error) from None
        context.notes.append(f"the response was lost; the job was found in the list: {job}")
        return job
    if reply.status in LATER:
        raise LostServerError.of(refusal(server, reply))
    if reply.status >= 400:
        raise refusal(server, reply)
    said = reply.json(server.name)
    job = said.get("id") if isinstance(said, Mapping) else None
    if not isinstance(job, str) or not JOB.fullmatch(job):
        raise FrugalError(
            f"{server.name} accepted the job without a usable id: {reply.text()}",
            "a job with an id",
            "check that the address is that of the API, which often ends in /v1",
        )
    return job


async def _listed(context: JobContext, server: Server) -> dict[str, Mapping[str, Any]] | None:
    """The server's newest jobs, newest first; None where it does not tell."""
    try:
        reply = await exchange(
            context.session, server, "GET", "/videos?limit=20&order=desc", timeout=ANSWER
        )
        return {
            each["id"]: each
            for each in reply.json(server.name)["data"]
            if JOB.fullmatch(each["id"])
        }
    except (FrugalError, KeyError, TypeError):
        return None


async def _arrived(
    context: JobContext, server: Server, before: Mapping[str, Any] | None
) -> str | None:
    """The newest job in the server's list that is this request and was not there `before`: one from
    before may have another seed, which lists do not tell.
    """
    wanted = context.request.prompt, context.request.size
    now = None if before is None else await _listed(context, server)
    for job, said in (now or {}).items():
        if job not in (before or {}) and (said.get("prompt"), said.get("size")) == wanted:
            return job
    return None


async def _watch(context: JobContext, server: Server, job: str) -> None:
    """Until the job is done. Raises FrugalError if it failed, LostServerError if nobody answers."""
    heard = time.monotonic()
    while True:
        try:
            reply = await _ask(context, server, f"/videos/{job}")
        except FrugalError as error:
            if time.monotonic() - heard > PATIENCE:
                raise LostServerError.of(error) from None
            await asyncio.sleep(POLL)
            continue
        heard = time.monotonic()
        if reply.status == 404:
            raise LostServerError(
                f"{server.name} does not know job {job} any more", "the job", "run the node again"
            )
        status = _status(reply, server)
        if status in FAILED:
            raise FrugalError(
                f"job {job} on {server.name} {status}: {reply.text()}",
                "a video",
                "change what it complains about, or look into the server's log",
            )
        if status in DONE:
            context.progress(100.0)
            return
        with contextlib.suppress(TypeError, ValueError):
            share = float(reply.json(server.name).get("progress") or 0)
            if math.isfinite(share):
                context.progress(min(max(share, 0.0), 100.0))
        await asyncio.sleep(POLL)


def _status(reply: Reply, server: Server) -> str:
    said = reply.json(server.name)
    status = said.get("status") if isinstance(said, Mapping) else None
    # vLLM-Omni sends a failed job with an error status and the job as body.
    if not isinstance(status, str):
        raise refusal(server, reply)
    return status


async def _ask(context: JobContext, server: Server, path: str) -> Reply:
    try:
        reply = await exchange(context.session, server, "GET", path, timeout=ANSWER)
    except FrugalError as error:
        raise LostServerError.of(error) from None
    if reply.status in LATER:
        raise LostServerError.of(refusal(server, reply))
    return reply


async def _fetch(context: JobContext, server: Server, job: str) -> Reply:
    reply = await exchange(
        context.session,
        server,
        "GET",
        f"/videos/{job}/content",
        timeout=max(ANSWER, context.patience),
        limit=VIDEO_LIMIT,
    )
    if reply.status >= 400:
        raise refusal(server, reply)
    if not (reply.kind.startswith("video/") or reply.kind == "application/octet-stream"):
        raise FrugalError(
            f"{server.name} sent {reply.kind or 'no type'} for job {job}: {reply.text()}",
            "a video",
            "look into the server's log",
        )
    return reply


async def _take_off(context: JobContext, server: Server, before: Mapping[str, Any] | None) -> None:
    """Remove what an order that was cancelled on its way has become."""
    job = None
    with contextlib.suppress(asyncio.TimeoutError):
        async with within(GOODBYE):
            job = await _arrived(context, server, before)
    if job is not None:
        await _remove(context, server, job)


async def _remove(context: JobContext, server: Server, job: str) -> None:
    with contextlib.suppress(FrugalError):
        await exchange(
            context.session, server, "DELETE", f"/videos/{job}", timeout=GOODBYE, repeat=False
        )
