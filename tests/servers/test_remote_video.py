"""Videos from a server: what is asked in each dialect, and that no failure pays twice."""

from __future__ import annotations

import asyncio
import base64
import json
from contextlib import ExitStack, contextmanager
from dataclasses import replace

import pytest
from aiohttp import web

from frugal.kernels.errors import FrugalError
from frugal.servers import transport, videos
from frugal.servers.address import server
from frugal.servers.dialects import (
    DIALECTS,
    SGLANG,
    TRTLLM,
    VLLM,
    VideoRequest,
    checked,
    takes_images,
)
from frugal.servers.waiting import run
from frugal.tests.helpers.patience import FOREVER, HANG
from frugal.tests.helpers.servers import scripted
from frugal.tests.helpers.video_server import Videos

WISH = VideoRequest("a cat", "blur", "m", 64, 32, 5, 16, 7, 5.5, 0.0, 2**33 + 5)


@pytest.fixture(autouse=True)
def short_pauses(monkeypatch):
    monkeypatch.setattr(transport, "PAUSE", 0.01)
    monkeypatch.setattr(videos, "POLL", 0.01)
    monkeypatch.setattr(videos, "PATIENCE", 0.2)


@contextmanager
def served(*handlers):
    """The handlers' addresses."""
    with ExitStack() as stack:
        yield [stack.enter_context(scripted(handler)).url + "/v1" for handler in handlers]


def put(urls, folder, request=WISH, dialect=VLLM, patience=20.0, **more):
    servers = [server(url) for url in urls]
    return run(videos.order(servers, DIALECTS[dialect], request, folder, patience, **more))


@pytest.mark.parametrize("dialect", DIALECTS)
def test_every_field_is_sent(dialect, tmp_path):
    one, seen = Videos(dialect), []
    with served(one) as urls:
        made = put(urls, tmp_path, dialect=dialect, progress=seen.append)
    assert made.data[4:8] == b"ftyp" and made.job == "video_gen_0" and seen[-1] == 100
    [fields] = one.asked
    wanted = {
        "prompt": "a cat", "negative_prompt": "blur", "model": "m", "size": "64x32",
        "num_frames": 5, "fps": 16, "num_inference_steps": 7, "guidance_scale": 5.5, "seed": 5,
    }  # fmt: skip
    assert {k: str(v) for k, v in fields.items()} == {k: str(v) for k, v in wanted.items()}


@pytest.mark.parametrize("dialect", DIALECTS)
def test_a_first_image_goes_along(dialect, tmp_path):
    one = Videos(dialect, "Wan2.1-I2V-14B")
    with served(one) as urls:
        put(urls, tmp_path, replace(WISH, image=b"PNG"), dialect)
    [fields] = one.asked
    if dialect == TRTLLM:
        said = fields["image_reference"]["content"].removeprefix("data:image/png;base64,")
        assert base64.b64decode(said) == b"PNG"
    else:
        assert fields["input_reference"] == b"PNG"


def test_flow_shift_is_sent_or_refused(tmp_path):
    one, request = Videos(VLLM), replace(WISH, flow_shift=3.0)
    with served(one) as urls:
        put(urls, tmp_path, request)
    assert one.asked[0]["flow_shift"] == "3.0"
    for other in (TRTLLM, SGLANG):
        with pytest.raises(FrugalError, match="flow_shift"):
            checked(request, DIALECTS[other])


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"prompt": " "}, "empty prompt"),
        ({"width": 60}, "use 48x32"),
        ({"frames": 80}, "use 77 or 81"),
    ],
)
def test_what_a_server_would_change_is_refused(change, says):
    with pytest.raises(FrugalError, match=says):
        checked(replace(WISH, **change), DIALECTS[VLLM])
    assert checked(replace(WISH, prompt=" a "), DIALECTS[VLLM]).prompt == "a"


@pytest.mark.parametrize(
    ("listed", "takes"),
    [
        ({"data": [{"id": "Wan2.1-T2V-1.3B"}]}, False),
        ({"data": [{"id": "wan", "root": "/models/Wan2.1-I2V-14B-480P"}]}, True),
        ({"data": [{"id": "Wan2.2-TI2V-5B"}]}, True),
        ({"model_path": "x", "task_type": "T2V"}, False),
        ({"data": [{"id": "wan"}]}, None),
        ({"data": [{"id": "t2v"}, {"id": "i2v"}]}, None),
        (None, None),
    ],
)
def test_what_a_model_takes(listed, takes):
    assert takes_images(listed) is takes


def test_an_image_that_would_be_ignored_is_refused_before_the_order(tmp_path):
    one = Videos(VLLM, "Wan2.1-T2V-14B")
    with served(one) as urls, pytest.raises(FrugalError, match="take the image off"):
        put(urls, tmp_path, replace(WISH, image=b"PNG"))
    one.model = "Wan2.1-I2V-14B"
    with served(one) as urls, pytest.raises(FrugalError, match="connect an image"):
        put(urls, tmp_path)
    assert not one.asked
    one.model = "wan"
    with served(one) as urls:
        assert "does not say" in put(urls, tmp_path).notes[0]


def test_sglang_tells_its_kind_beside_the_api(tmp_path):
    one = Videos(SGLANG, "wan")

    async def handle(request, body):
        if request.path == "/models":
            return web.json_response({"model_path": "wan", "task_type": "T2V"})
        return await one(request, body)

    with served(handle) as urls, pytest.raises(FrugalError, match="take the image off"):
        put(urls, tmp_path, replace(WISH, image=b"PNG"), SGLANG)


def test_a_lost_answer_to_the_order_is_not_paid_twice(tmp_path):
    one = Videos(VLLM)

    async def take_and_hang_up(request):
        form = await request.post()
        one.add(dict(form))
        request.transport.abort()
        return web.Response()

    one.on_create = take_and_hang_up
    with served(one) as urls:
        made = put(urls, tmp_path)
    assert len(one.asked) == 1 and "found in the list" in " ".join(made.notes)


def test_an_order_that_never_arrived_is_not_taken_for_the_one_before(tmp_path):
    """Which has the same prompt and size, and another seed."""
    one = Videos(VLLM)

    async def hang_up(request):
        request.transport.abort()
        return web.Response()

    with served(one) as urls:
        put(urls, tmp_path)
        one.on_create = hang_up
        with pytest.raises(FrugalError, match=r"cannot be reached|broke off"):
            put(urls, tmp_path, replace(WISH, seed=1))
    assert len(one.asked) == 1


def test_a_run_that_was_broken_off_finds_its_job_again(tmp_path):
    one = Videos(VLLM, polls=10**9)
    with served(one) as urls:
        with pytest.raises(FrugalError, match="run it again to go on waiting"):
            put(urls, tmp_path, patience=0.3)
        assert not one.deleted
        one.polls = 0
        made = put(urls, tmp_path)
        assert len(one.asked) == 1 and "earlier run" in " ".join(made.notes)
        # Another wish is another job, and so is the same one once the server forgot it.
        put(urls, tmp_path, replace(WISH, seed=1))
        assert len(one.asked) == 2
        one.jobs.clear()
        put(urls, tmp_path)
        assert len(one.asked) == 3


def test_cancel_takes_the_job_off_the_server(tmp_path):
    one = Videos(VLLM, polls=10**9)

    class Cancelled(BaseException):
        pass

    def check():
        if any(job["looks"] for job in one.jobs.values()):
            raise Cancelled

    with served(one) as urls, pytest.raises(Cancelled):
        work = videos.order([server(urls[0])], DIALECTS[VLLM], WISH, tmp_path, HANG)
        run(work, check, 0.02)
    assert one.deleted == ["video_gen_0"]


def test_cancel_while_the_order_is_on_its_way_takes_it_off_too(tmp_path):
    one = Videos(VLLM)

    class Cancelled(BaseException):
        pass

    async def take_and_think(request):
        one.add(dict(await request.post()))
        await asyncio.sleep(FOREVER)

    def check():
        if one.jobs:
            raise Cancelled

    one.on_create = take_and_think
    with served(one) as urls, pytest.raises(Cancelled):
        work = videos.order([server(urls[0])], DIALECTS[VLLM], WISH, tmp_path, HANG)
        run(work, check, 0.02)
    assert one.deleted == ["video_gen_0"]


def test_the_next_server_is_asked_when_one_is_gone_or_full(tmp_path):
    async def full(request):
        return web.json_response({"detail": "busy"}, status=503, headers={"Retry-After": "0"})

    first, second = Videos(VLLM), Videos(VLLM)
    first.on_create = full
    with served(first, second) as urls:
        made = put(["http://127.0.0.1:9/v1", *urls], tmp_path)
    assert len(second.asked) == 1 and not first.asked and len(made.notes) == 2


def test_a_server_that_dies_in_the_middle_is_left(tmp_path):
    async def dead(request):
        request.transport.abort()
        return web.Response()

    first, second = Videos(VLLM), Videos(VLLM)
    first.on_poll = dead
    with served(first, second) as urls:
        made = put(urls, tmp_path)
        assert len(first.asked) == len(second.asked) == 1
        assert made.server in urls[1] and "was skipped" in made.notes[0]


def test_a_moment_of_silence_is_no_death(tmp_path):
    one, left = Videos(VLLM), [3]

    async def silent(request):
        if left[0]:
            left[0] -= 1
            return web.Response(status=503)
        return None

    one.on_poll = silent
    with served(one) as urls:
        assert put(urls, tmp_path).job == "video_gen_0"
    assert len(one.asked) == 1


def failing(status, message):
    async def answer(request):
        return web.json_response({"error": {"message": message}}, status=status)

    return answer


@pytest.mark.parametrize("status", [400, 401, 404, 422, 500])
def test_a_refused_order_says_why(status, tmp_path):
    one = Videos(VLLM)
    one.on_create = failing(status, "no such thing")
    with served(one) as urls, pytest.raises(FrugalError, match=f"{status}: no such thing"):
        put(urls, tmp_path)


@pytest.mark.parametrize("error", [{"code": "x", "message": "out of memory"}, "out of memory"])
@pytest.mark.parametrize("status", [200, 500])
def test_a_failed_job_says_why(error, status, tmp_path):
    """vLLM-Omni has an object there and an error status, TensorRT-LLM a sentence and 200."""
    one = Videos(VLLM)

    async def failed(request):
        return web.json_response({"id": "x", "status": "failed", "error": error}, status=status)

    one.on_poll = failed
    with served(one) as urls, pytest.raises(FrugalError, match="failed: out of memory"):
        put(urls, tmp_path)


@pytest.mark.parametrize("number", ["NaN", "1e999", "-1e999", '"soon"', "500"])
def test_progress_that_is_no_share_costs_no_job(number, tmp_path):
    one, told = Videos(VLLM), []

    async def poll(request):
        if len(told) > 1:
            return None
        told.append(None)
        said = f'{{"id": "x", "status": "in_progress", "progress": {number}}}'
        return web.Response(text=said, content_type="application/json")

    one.on_poll = poll
    with served(one) as urls:
        put(urls, tmp_path, progress=told.append)
    assert all(0 <= share <= 100 for share in told if share is not None) and told[-1] == 100


def test_a_download_that_breaks_off_is_fetched_again(tmp_path):
    one, left = Videos(VLLM), [2]

    async def broken(request):
        if not left[0]:
            return None
        left[0] -= 1
        response = web.StreamResponse(headers={"Content-Length": "100000"})
        await response.prepare(request)
        await response.write(b"x" * 1000)
        request.transport.abort()
        return response

    one.on_content = broken
    with served(one) as urls:
        assert put(urls, tmp_path).data[4:8] == b"ftyp"
    left[0] = 99
    with served(one) as urls, pytest.raises(FrugalError, match=r"broke off|cannot be reached"):
        put(urls, tmp_path)


def test_the_page_shows_no_path_before_the_sentence(tmp_path):
    with pytest.raises(FrugalError, match="cannot be reached") as caught:
        put(["http://127.0.0.1:9/v1"], tmp_path)
    assert (caught.type.__name__, caught.type.__module__) == ("LostServerError", "frugal")


def test_what_is_no_video_is_refused(tmp_path, monkeypatch):
    one = Videos(VLLM)

    async def page(request):
        return web.Response(text="<html>Login</html>", content_type="text/html")

    async def large(request):
        return web.Response(body=b"x" * 5000, content_type="video/mp4")

    one.on_content = page
    with served(one) as urls, pytest.raises(FrugalError, match="text/html"):
        put(urls, tmp_path)
    one.on_content = large
    monkeypatch.setattr(videos, "VIDEO_LIMIT", 4000)
    with served(one) as urls, pytest.raises(FrugalError, match="more than 4000 bytes"):
        put(urls, tmp_path)


@pytest.mark.parametrize("job", ["../../admin", "..", "a?b", "", 7, None])
def test_an_id_that_would_lead_elsewhere_is_refused(job, tmp_path):
    async def handle(request, body):
        await asyncio.sleep(0)
        return web.json_response({"id": job, "status": "queued"})

    with served(handle) as urls, pytest.raises(FrugalError, match="usable id"):
        put(urls, tmp_path)


def test_a_spoiled_note_of_a_job_is_no_job(tmp_path):
    one = Videos(VLLM)
    with served(one) as urls:
        put(urls, tmp_path)
        [note] = tmp_path.glob("*.json")
        for said in ("", "[]", json.dumps({"job": 7}), json.dumps({"job": "../x"})):
            note.write_text(said)
            put(urls, tmp_path)
    assert len(one.asked) == 5
