"""Chat endpoints: what is sent, to whom a key is shown, and what every kind of failure says."""

from __future__ import annotations

import asyncio
import base64
import socket
import threading

import pytest
from aiohttp import web

from frugal.kernels.errors import FrugalError
from frugal.servers import response_cache, transport
from frugal.servers.address import server
from frugal.servers.chat import Question, ask
from frugal.servers.prompt_rules import LANGUAGES, LONGEST, TASKS, cleaned, instructions
from frugal.servers.waiting import run
from frugal.tests.helpers.patience import FOREVER, HANG
from frugal.tests.helpers.servers import completion, scripted

QUESTION = Question("rewrite", "a cat", "m", seed=2**40 + 3)


@pytest.fixture(autouse=True)
def short_pauses(monkeypatch):
    monkeypatch.setattr(transport, "PAUSE", 0.01)


def put(url: str, question: Question = QUESTION, timeout: float = HANG, key: str = ""):
    return run(ask(server(url, key), question, timeout))


@pytest.mark.parametrize(
    "url",
    [
        "",
        "127.0.0.1:8000",
        "ftp://host/v1",
        "file:///etc/passwd",
        "http://",
        "http://[::1",
        "http:///v1",
    ],
)
def test_only_web_addresses(url):
    with pytest.raises(FrugalError, match="http"):
        server(url)


@pytest.mark.parametrize("url", ["http://me:secret@host/v1", "http://host/v1?key=secret"])
def test_a_secret_in_the_address_is_refused_and_not_shown(url):
    with pytest.raises(FrugalError, match="environment variable") as error:
        server(url)
    assert "secret" not in str(error.value)


def test_a_typed_key_is_refused_and_not_shown(monkeypatch):
    with pytest.raises(FrugalError, match="environment variable") as error:
        server("http://localhost/v1", "sk-12345-secret")
    assert "secret" not in str(error.value)
    # A variable that is no key, such as a password of the system, is not to be had either.
    monkeypatch.setenv("PATHLIKE", "value")
    with pytest.raises(FrugalError, match="_KEY"):
        server("http://localhost/v1", "PATHLIKE")


def test_a_key_goes_only_where_it_was_allowed(monkeypatch):
    monkeypatch.delenv("SOME_API_KEY", raising=False)
    with pytest.raises(FrugalError, match="no environment variable SOME_API_KEY"):
        server("http://localhost:1/v1", "SOME_API_KEY")
    monkeypatch.setenv("SOME_API_KEY", "abc")
    for url in ("http://localhost:1/v1", "http://127.0.0.1:1", "http://[::1]:1"):
        assert server(url, "SOME_API_KEY").headers == {"Authorization": "Bearer abc"}
    # A name that only looks like this machine must not count as it.
    for host in ("example.com", "127.0.0.1.example.com", "localhost.example.com"):
        with pytest.raises(FrugalError, match="SOME_API_KEY_HOST") as error:
            server(f"https://{host}/v1", "SOME_API_KEY")
        assert "abc" not in str(error.value)
    monkeypatch.setenv("SOME_API_KEY_HOST", "Example.com, other.org")
    assert server("https://example.com/v1/", "SOME_API_KEY").base == "https://example.com/v1"
    monkeypatch.setenv("SOME_API_KEY", "abc\r\nX-Header: 1")
    with pytest.raises(FrugalError, match="characters"):
        server("http://localhost/v1", "SOME_API_KEY")


def test_what_is_sent(monkeypatch):
    monkeypatch.setenv("SOME_API_KEY", "abc")

    async def handle(request, body):
        return completion("A cat walks.")

    question = Question("rewrite", "a cat", "m", image=b"PNG", seed=2**40 + 3, max_tokens=99)
    with scripted(handle) as stub:
        answer = put(f"{stub.url}/v1/", question, key="SOME_API_KEY")
    assert (answer.text, answer.model, answer.cut, answer.notes) == ("A cat walks.", "m", False, ())
    [(method, path, headers, body)] = stub.seen
    assert (method, path) == ("POST", "/v1/chat/completions")
    assert headers["Authorization"] == "Bearer abc"
    assert body["chat_template_kwargs"] == {"enable_thinking": False}
    assert (body["model"], body["max_tokens"], body["stream"]) == ("m", 99, False)
    assert 0 <= body["seed"] < 2**31
    system, user = body["messages"]
    assert system == {"role": "system", "content": "rewrite"}
    url = user["content"][0]["image_url"]["url"]
    assert base64.b64decode(url.removeprefix("data:image/png;base64,")) == b"PNG"
    assert user["content"][1] == {"type": "text", "text": "a cat"}


def test_a_key_that_the_server_repeats_is_taken_out(monkeypatch):
    monkeypatch.setenv("SOME_API_KEY", "sk-very-secret")

    async def handle(request, body):
        said = f"unknown header {request.headers['Authorization']}"
        return web.json_response({"error": {"message": said}}, status=400)

    with scripted(handle) as stub, pytest.raises(FrugalError, match="unknown header") as error:
        put(f"{stub.url}/v1", key="SOME_API_KEY")
    assert "secret" not in str(error.value) and "Bearer [the key]" in str(error.value)


def test_wishes_that_a_server_names_are_dropped():
    async def handle(request, body):
        for name in ("chat_template_kwargs", "max_tokens", "seed"):
            if name in body:
                said = {"error": {"message": f"Unrecognized request argument: {name}"}}
                return web.json_response(said, status=400)
        return completion(f"{body['max_completion_tokens']} tokens")

    with scripted(handle) as stub:
        answer = put(stub.url)
    assert answer.text == "512 tokens"
    assert [note.split()[-4] for note in answer.notes] == ["chat_template_kwargs:", "seed:"]
    assert len(stub.seen) == 4


def test_the_only_model_is_found():
    async def handle(request, body):
        if request.path.endswith("/models"):
            return web.json_response({"data": [{"id": name} for name in names]})
        return completion(body["model"])

    question = Question("rewrite", "a cat")
    with scripted(handle) as stub:
        names = ["one"]
        assert put(stub.url, question).text == "one"
        for names in ([], ["one", "two"]):
            with pytest.raises(FrugalError, match=f"lists {len(names)} models"):
                put(stub.url, question)


@pytest.mark.parametrize(
    ("status", "said", "remedy"),
    [
        (401, "bad key", "name of the environment variable"),
        (404, "no such model", "model's name"),
        (400, "too long", "change what it complains about"),
        (500, "boom", "server's log"),
    ],
)
def test_refusals_carry_what_the_server_said_and_a_remedy(status, said, remedy):
    async def handle(request, body):
        return web.json_response({"error": {"message": said}}, status=status)

    with scripted(handle) as stub, pytest.raises(FrugalError, match=remedy) as error:
        put(stub.url)
    assert f"{status}: {said}" in str(error.value)
    assert str(error.value).isascii() and len(stub.seen) == 1


def test_busy_servers_are_asked_again_and_then_given_up():
    async def handle(request, body):
        if len(stub.seen) < busy:
            return web.Response(status=429, headers={"Retry-After": "0"})
        return completion("now")

    with scripted(handle) as stub:
        busy = 3
        assert put(stub.url).text == "now"
        stub.seen.clear()
        busy = 99
        with pytest.raises(FrugalError, match="429"):
            put(stub.url)
        assert len(stub.seen) == transport.TRIES


async def slow(request, body):
    await asyncio.sleep(FOREVER)
    return completion("late")


async def broken_off(request, body):
    response = web.StreamResponse(headers={"Content-Length": "1000"})
    await response.prepare(request)
    await response.write(b'{"choices": [')
    request.transport.abort()
    return response


async def huge(request, body):
    response = web.StreamResponse()
    await response.prepare(request)
    for _ in range(transport.JSON_LIMIT // 10**6 + 2):
        await response.write(b"x" * 10**6)
    return response


async def elsewhere(request, body):
    raise web.HTTPFound("http://127.0.0.1:1/other")


async def page(request, body):
    return web.Response(text="<html>Welcome \u2014 proxy</html>", content_type="text/html")


async def no_choices(request, body):
    return web.json_response({"choices": []})


@pytest.mark.parametrize(
    ("handle", "says"),
    [
        (slow, "no answer from .* within 0.5 s"),
        (broken_off, "broke off|cannot be reached"),
        (huge, "more than 8000000 bytes"),
        (elsewhere, "another address"),
        (page, "text/html: Welcome .* proxy; expected JSON"),
        (no_choices, "choices"),
    ],
)
def test_answers_that_are_none(handle, says):
    with scripted(handle) as stub, pytest.raises(FrugalError, match=says) as error:
        put(stub.url, timeout=0.5 if handle is slow else HANG)
    assert str(error.value).isascii()


def test_nobody_there():
    with pytest.raises(FrugalError, match=r"cannot be reached \(nothing listens there\)"):
        put("http://127.0.0.1:9/v1")


def test_a_name_that_no_one_knows(monkeypatch):
    def unknown(*_, **__):
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", unknown)
    with pytest.raises(FrugalError, match=r"cannot be reached \(the name is not known\)"):
        put("http://gpu-box/v1")


def test_cancel_ends_the_wait_and_the_connection():
    gone = threading.Event()

    async def handle(request, body):
        try:
            await asyncio.sleep(FOREVER)
        finally:
            gone.set()

    class Cancelled(BaseException):
        pass

    def check():
        if stub.seen:
            raise Cancelled

    with scripted(handle) as stub:
        with pytest.raises(Cancelled):
            run(ask(server(stub.url), QUESTION, HANG), check, 0.02)
        assert gone.wait(HANG)
    assert not [t for t in threading.enumerate() if t.name == "frugal-remote"]


def test_a_loop_that_cannot_begin_is_an_error_and_no_endless_wait(monkeypatch):
    def no_loop(main):
        main.close()
        raise OSError("too many open files")

    monkeypatch.setattr(asyncio, "run", no_loop)
    found = []

    def asked():
        with pytest.raises(OSError, match="too many open files"):
            run(asyncio.sleep(0))
        found.append(True)

    thread = threading.Thread(target=asked, daemon=True)
    thread.start()
    thread.join(HANG)
    assert found


def test_every_task_and_language_has_instructions():
    made = {instructions(task, language) for task in TASKS for language in LANGUAGES}
    assert len(made) == len(TASKS) * len(LANGUAGES)
    assert instructions(TASKS[0], "English", " 16 mm\nfilm ").endswith("wanted: 16 mm film.")


@pytest.mark.parametrize(
    ("answer", "text"),
    [
        ("A cat.", "A cat."),
        ("<think>\nhm\n</think>\n\nA cat.", "A cat."),
        ("hm, the user wants</think> A cat.", "A cat."),
        ('"A cat."', "A cat."),
        ('"Hi" says "the cat"', '"Hi" says "the cat"'),
        ("```text\nA cat.\n```", "A cat."),
        ("A cat.\n\nIt  walks.", "A cat. It walks."),
    ],
)
def test_only_the_prompt_is_taken(answer, text):
    assert cleaned(answer) == (text, ())


def test_thoughts_without_an_end_take_no_time():
    """Work that grows with the square of this would take hours."""
    with pytest.raises(FrugalError, match="raise max_tokens"):
        cleaned("<think>" * 600_000)
    assert cleaned("<THINK>a</Think>" * 50_000 + "A cat.") == ("A cat.", ())


@pytest.mark.parametrize("answer", ["", "  \n", "<think>on and on", "<think>so</think>", '""'])
def test_no_answer_is_an_error(answer):
    with pytest.raises(FrugalError):
        cleaned(answer)


def test_long_and_cut_answers_end_with_a_sentence():
    text, notes = cleaned("The cat walks. " * 300)
    assert len(text) <= LONGEST and text.endswith("walks.") and "shortened" in notes[0]
    text, notes = cleaned("The cat walks. It sees a bird and st", cut=True)
    assert text == "The cat walks. It sees a bird and st"[: len(text)] and "max_tokens" in notes[0]
    text, _ = cleaned("The cat walks along the wall. It st", cut=True)
    assert text == "The cat walks along the wall."


def test_kept_answers(tmp_path):
    name = response_cache.key(["a", 1], b"x")
    assert name != response_cache.key(["a", 1], b"y") != response_cache.key(["a"], b"1xx")
    assert response_cache.read(tmp_path / "new", name) is None
    response_cache.write(tmp_path / "new", name, {"text": "\u00e9"})
    assert response_cache.read(tmp_path / "new", name) == {"text": "\u00e9"}
    for bad in ("", "[1]", "{"):
        (tmp_path / "new" / f"{name}.json").write_text(bad)
        assert response_cache.read(tmp_path / "new", name) is None
    assert response_cache.failures(tmp_path, "f") == 0
    response_cache.failed(tmp_path, "f")
    response_cache.failed(tmp_path, "f")
    assert response_cache.failures(tmp_path, "f") == 2
    assert not list(tmp_path.rglob("*.part"))
