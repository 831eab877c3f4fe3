"""A server that speaks the three dialects of /v1/videos as their documentation has them."""

from __future__ import annotations

import io
import time
from fractions import Fraction

import numpy as np
from aiohttp import web

from frugal.servers.dialects import SGLANG, TRTLLM, VLLM


def film(frames: int, width: int, height: int, fps: int = 16) -> bytes:
    """An MP4 that gets brighter from frame to frame."""
    import av

    file = io.BytesIO()
    with av.open(file, "w", format="mp4") as container:
        stream = container.add_stream("libx264", rate=Fraction(fps))
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        for place in range(frames):
            level = np.full((height, width, 3), round(40 + 150 * place / max(1, frames)), np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(level, "rgb24")))
        container.mux(stream.encode())
    return file.getvalue()


class Videos:
    """The handler. A job is done after `polls` looks at it. `asked`: the fields of each order;
    `jobs`: id -> job; `deleted`: ids. Set `on_create`, `on_poll` or `on_content` to a handler that
    answers in place of the usual one, or None to go on.
    """

    def __init__(self, dialect: str, model: str = "Wan2.1-T2V", polls: int = 2):
        self.dialect, self.model, self.polls = dialect, model, polls
        self.asked, self.jobs, self.deleted = [], {}, []
        self.on_create = self.on_poll = self.on_content = None

    async def __call__(self, request: web.Request, body) -> web.StreamResponse:
        path = request.path
        if path.endswith("/models"):
            return web.json_response({"data": [{"id": self.model}]})
        if path == "/v1/videos":
            return await (self.create if request.method == "POST" else self.list)(request, body)
        job = self.jobs.get(path.split("/")[3])
        if job is None:
            return web.json_response({"detail": "not found"}, status=404)
        if request.method == "DELETE":
            self.deleted.append(job["id"])
            return web.json_response({"id": job["id"], "deleted": True})
        if path.endswith("/content"):
            return await self.content(request, job)
        return await self.poll(request, job)

    async def create(self, request, body) -> web.StreamResponse:
        early = self.on_create and await self.on_create(request)
        if early is not None:
            return early
        if isinstance(body, dict):
            fields = dict(body)
        else:
            form = await request.post()
            fields = {k: v if isinstance(v, str) else v.file.read() for k, v in form.items()}
        multipart = request.content_type == "multipart/form-data"
        wanted = {VLLM: True, TRTLLM: False, SGLANG: "input_reference" in fields}[self.dialect]
        if multipart != wanted or not fields.get("prompt"):
            return web.json_response({"detail": "wrong kind of body"}, status=422)
        job = self.add(fields)
        return web.json_response(job, status=202 if self.dialect == TRTLLM else 200)

    def add(self, fields) -> dict:
        """Take an order."""
        self.asked.append(fields)
        name = f"video_gen_{len(self.jobs)}"
        said = {"prompt": fields["prompt"], "size": fields["size"], "created_at": int(time.time())}
        self.jobs[name] = {"id": name, "status": "queued", "progress": 0, "looks": 0, **said}
        self.jobs[name]["fields"] = {k: v for k, v in fields.items() if isinstance(v, (str, int))}
        return self.jobs[name]

    async def list(self, request, body) -> web.StreamResponse:
        return web.json_response({"data": list(self.jobs.values())[::-1]})

    async def poll(self, request, job) -> web.StreamResponse:
        job["looks"] += 1
        early = self.on_poll and await self.on_poll(request)
        if early is not None:
            return early
        if job["looks"] > self.polls:
            job.update(status="completed", progress=100)
        return web.json_response(job)

    async def content(self, request, job) -> web.StreamResponse:
        early = self.on_content and await self.on_content(request)
        if early is not None:
            return early
        if job["status"] != "completed":
            return web.json_response({"detail": "in progress"}, status=404)
        width, height = map(int, job["size"].split("x"))
        frames = int(job["fields"]["num_frames"])
        return web.Response(body=film(frames, width, height), content_type="video/mp4")
