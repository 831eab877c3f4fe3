"""The fleet's HTTP side: routes, token, limits; what is said with which status.

POST   /v1/jobs                multipart: workflow (JSON), plan (JSON, optional), input (files)
GET    /v1/jobs[?status=]      the newest
GET    /v1/jobs/{id}           one
GET    /v1/jobs/{id}/files/N   a result
POST   /v1/jobs/{id}/cancel
DELETE /v1/jobs/{id}           an ended one, its results and its key
GET    /v1/fleet               limits and numbers
GET    /metrics                the same for Prometheus
GET    /health                 200, without a token: that it answers, nothing else
"""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import Any
from urllib.parse import quote

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.formparsers import MultiPartException, MultiPartParser
from starlette.requests import Request
from starlette.responses import FileResponse, JSONResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send

from ...kernels.errors import FrugalError
from ...kernels.report import megabytes
from . import metrics
from .job_request import LARGEST_WORKFLOW, checked_key, order
from .scheduler import JobScheduler, NotYetError, TooLargeError
from .store import ENDED, OPEN, FullError, Job, KeyReusedError

MOST_FILES, LONGEST_LIST = 64, 1000
LARGEST_BODY = 256 * 10**6


def hashed(token: str) -> str:
    """How a token is handed around inside: SHA-256 as hex."""
    return hashlib.sha256(token.encode()).hexdigest()


def application(
    scheduler: Callable[[], JobScheduler], token: str, largest: int = LARGEST_BODY
) -> ASGIApp:
    """The ASGI app. token: as `hashed` gives it; empty: everybody may. largest: bytes
    of a request.
    """
    pages = Pages(scheduler, largest)
    routes = [
        Route("/health", pages.health, methods=["GET"]),
        Route("/metrics", pages.metrics, methods=["GET"]),
        Route("/v1/fleet", pages.fleet, methods=["GET"]),
        Route("/v1/jobs", pages.submit, methods=["POST"]),
        Route("/v1/jobs", pages.list, methods=["GET"]),
        Route("/v1/jobs/{job}", pages.show, methods=["GET"]),
        Route("/v1/jobs/{job}", pages.delete, methods=["DELETE"]),
        Route("/v1/jobs/{job}/cancel", pages.cancel, methods=["POST"]),
        Route("/v1/jobs/{job}/files/{name:path}", pages.file, methods=["GET"]),
    ]
    handlers = {FrugalError: _refuse, HTTPException: _plain, Exception: _broken}
    return Guarded(Starlette(routes=routes, exception_handlers=handlers), scheduler, token)


class Guarded:
    """Nothing but /health is answered without the token; a wrong path neither."""

    def __init__(self, app: ASGIApp, scheduler: Callable[[], JobScheduler], token: str):
        self.app, self.scheduler, self.token = app, scheduler, token

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and self.token and scope["path"] != "/health":
            given = dict(scope["headers"]).get(b"authorization", b"").decode("latin-1")
            kind, _, key = given.partition(" ")
            # Digests have one length, and comparing them takes one time.
            if kind.lower() != "bearer" or not hmac.compare_digest(hashed(key.strip()), self.token):
                # In memory alone: a stranger's request must not cost a write to the disk.
                self.scheduler().store.note("refused_token")
                answer = _error(
                    401,
                    "send the token that the fleet was started with: no valid token; expected the "
                    "header Authorization: Bearer TOKEN.",
                    {"WWW-Authenticate": "Bearer"},
                )
                await answer(scope, receive, send)
                return
        await self.app(scope, receive, send)


def _error(status: int, said: str, headers: dict[str, str] | None = None) -> Response:
    return JSONResponse({"error": said}, status, headers)


async def _plain(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    return _error(
        error.status_code, f"{request.url.path}: {error.detail}", dict(error.headers or {})
    )


async def _broken(request: Request, error: Exception) -> Response:
    what = f"{type(error).__name__}: {error}"
    return _error(500, f"the fleet itself failed ({ascii(what)[1:-1][:300]}); send it again.")


async def _refuse(request: Request, error: Exception) -> Response:
    status = {KeyReusedError: 422, TooLargeError: 413}.get(type(error), 400)
    return _error(status, str(error))


class Pages:
    """One method per route."""

    def __init__(self, scheduler: Callable[[], JobScheduler], largest: int):
        self.scheduler, self.largest = scheduler, largest

    async def health(self, request: Request) -> Response:
        return JSONResponse({"status": "ok"})

    async def metrics(self, request: Request) -> Response:
        return Response(metrics.text(self.scheduler()), media_type=metrics.KIND)

    async def fleet(self, request: Request) -> Response:
        scheduler = self.scheduler()
        return JSONResponse(
            {
                "jobs": scheduler.store.counts(),
                "counters": scheduler.store.counters(),
                "rules": asdict(scheduler.rules),
                "worker_memory": scheduler.memory,
                "largest_request": self.largest,
                "retry_after": scheduler.retry_after(),
            }
        )

    async def submit(self, request: Request) -> Response:
        scheduler = self.scheduler()
        key = request.headers.get("idempotency-key", "")
        key = checked_key(key) if key else ""
        try:
            workflow, files, plan = await self._parts(request)
        except MultiPartException as error:
            return _error(
                400, f"the form cannot be read ({error.message}); send multipart/form-data."
            )
        if isinstance(workflow, Response):
            return workflow
        try:
            job, new = scheduler.accept(order(workflow, files, plan), key)
        except (FullError, NotYetError) as error:
            return _error(503, str(error), {"Retry-After": str(scheduler.retry_after())})
        return JSONResponse(shown(job), 202 if new else 200, {"Location": f"/v1/jobs/{job.id}"})

    async def _parts(self, request: Request) -> Any:
        too_large = _error(
            413, f"the request is larger than {megabytes(self.largest)}; send smaller files."
        )
        if int(request.headers.get("content-length") or 0) > self.largest:
            return too_large, {}, b""
        kind = request.headers.get("content-type", "")
        if not kind.startswith("multipart/form-data"):
            return _error(415, "the body is no multipart/form-data; send it as a form."), {}, b""
        size, whole = 0, True

        async def counted():
            nonlocal size, whole
            async for piece in request.stream():
                size += len(piece)
                if size > self.largest:
                    whole = False
                    return
                yield piece

        parser = MultiPartParser(
            request.headers, counted(), max_files=MOST_FILES, max_fields=8,
            max_part_size=LARGEST_WORKFLOW,
        )  # fmt: skip
        try:
            form = await parser.parse()
        except MultiPartException:
            if not whole:
                return too_large, {}, b""
            raise
        try:
            if not whole:
                return too_large, {}, b""
            return await self._sorted(form.multi_items())
        finally:
            await form.close()

    async def _sorted(self, items: Sequence[tuple[str, Any]]) -> Any:
        texts, files = {"workflow": b"", "plan": b""}, {}
        for name, value in items:
            data = value.encode() if isinstance(value, str) else await value.read()
            if name in texts:
                texts[name] = data
            elif name != "input" or isinstance(value, str):
                said = (
                    f"send workflow, plan and input files only: an unknown part {ascii(name)[:60]}."
                )
                return _error(400, said), {}, b""
            elif value.filename in files:
                return _error(400, f"two files {value.filename!a}; rename one."), {}, b""
            else:
                files[value.filename or ""] = data
        return texts["workflow"], files, texts["plan"]

    async def list(self, request: Request) -> Response:
        status = request.query_params.get("status", "")
        limit = request.query_params.get("limit", "100")
        if (status and status not in (*OPEN, *ENDED)) or not limit.isdecimal():
            return _error(400, f"expected status among {', '.join((*OPEN, *ENDED))}, whole limit.")
        jobs = self.scheduler().store.list(status, min(int(limit), LONGEST_LIST))
        return JSONResponse({"jobs": [shown(job) for job in jobs]})

    async def show(self, request: Request) -> Response:
        try:
            return JSONResponse(shown(self.scheduler().store.job(request.path_params["job"])))
        except KeyError:
            return _unknown(request)

    async def file(self, request: Request) -> Response:
        try:
            path = self.scheduler().store.file(
                request.path_params["job"], request.path_params["name"]
            )
        except KeyError:
            return _unknown(request)
        # Never shown as a page: a result may be HTML that somebody else's graph wrote.
        return FileResponse(path, filename=path.name, headers={"X-Content-Type-Options": "nosniff"})

    async def cancel(self, request: Request) -> Response:
        job = request.path_params["job"]
        try:
            cancelled = await self.scheduler().cancel(job)
            return JSONResponse(shown(self.scheduler().store.job(job)) | {"cancelled": cancelled})
        except KeyError:
            return _unknown(request)

    async def delete(self, request: Request) -> Response:
        job = request.path_params["job"]
        try:
            if self.scheduler().store.job(job).status in OPEN:
                return _error(409, f"job {job} has not ended; cancel it first.")
            self.scheduler().store.delete(job)
        except KeyError:
            return _unknown(request)
        return JSONResponse({"id": job, "deleted": True})


def _unknown(request: Request) -> Response:
    return _error(404, f"{request.url.path!a} is not here; it may have been deleted.")


def shown(job: Job) -> dict[str, Any]:
    """A job as clients see it."""
    fields = asdict(job)
    fields["outputs"] = fields.pop("shown")
    for file in fields["files"]:
        file["path"] = f"/v1/jobs/{job.id}/files/{quote(file['name'])}"
    return fields
