"""The fleet's HTTP side and its client, over a real socket; workers are pretended."""

from __future__ import annotations

import asyncio
import csv
import json
import urllib.error
import urllib.request
from types import SimpleNamespace

import pytest

pytest.importorskip("starlette")
pytest.importorskip("prometheus_client")
from frugal.kernels.errors import FrugalError
from frugal.servers import transport
from frugal.servers.fleet import client as client_module
from frugal.servers.fleet import command, token
from frugal.servers.fleet.client import FleetClient
from frugal.servers.transport import Reply
from frugal.tests.helpers.fleet import TOKEN, complains, dies, hangs, picture_graph, running, works
from frugal.tests.helpers.patience import HANG, comes, until

GRAPH = json.dumps(picture_graph(5)).encode()


def ask(url, method="GET", body=None, key=TOKEN, **headers):
    """(status, headers, body) as the server gave them, without any client of ours."""
    headers = {name.replace("_", "-"): value for name, value in headers.items()}
    if key is not None:
        headers["Authorization"] = f"Bearer {key}"
    request = urllib.request.Request(url, body, headers, method=method)
    try:
        with urllib.request.urlopen(request, timeout=HANG) as answer:
            return answer.status, answer.headers, answer.read()
    except urllib.error.HTTPError as error:
        return error.code, error.headers, error.read()


def form(*parts):
    """Body and content type of a form of (name, file name or None, bytes)."""
    lines = b""
    for name, file, data in parts:
        lines += b"--b\r\nContent-Disposition: form-data; name=" + f'"{name}"'.encode()
        lines += f'; filename="{file}"'.encode() if file is not None else b""
        lines += b"\r\n\r\n" + data + b"\r\n"
    return lines + b"--b--\r\n", "multipart/form-data; boundary=b"


def post(url, *parts, **headers):
    body, kind = form(*parts)
    return ask(f"{url}/v1/jobs", "POST", body, Content_Type=kind, **headers)


def ended(url, job):

    def found():
        return json.loads(ask(f"{url}/v1/jobs/{job}")[2])

    until(lambda: found()["status"] not in ("queued", "running"), found)
    return found()


def test_a_job_from_form_to_file(tmp_path):
    with running(tmp_path, works) as fleet:
        url = fleet.url
        status, headers, body = post(url, ("workflow", None, GRAPH), ("input", "a.png", b"data"))
        job = json.loads(body)
        assert status == 202 and headers["Location"] == f"/v1/jobs/{job['id']}"
        done = ended(url, job["id"])
        assert done["status"] == "completed" and done["outputs"] == {"2": {"text": ["x"]}}
        names = {file["name"]: file for file in done["files"]}
        status, headers, body = ask(url + names["out/p.txt"]["path"])
        assert (status, body) == (200, b"5")
        assert headers["X-Content-Type-Options"] == "nosniff"
        assert "attachment" in headers["Content-Disposition"]
        for other in (
            "out/q.txt",
            "../workflow.json",
            "%2e%2e/workflow.json",
            "..%2fworkflow.json",
        ):
            assert ask(f"{url}/v1/jobs/{job['id']}/files/{other}")[0] == 404, other
        assert ask(f"{url}/v1/jobs/{job['id']}", "DELETE")[0] == 200
        assert ask(f"{url}/v1/jobs/{job['id']}")[0] == 404
        assert ask(f"{url}/v1/jobs/{job['id']}", "DELETE")[0] == 404


def test_nothing_without_the_token(tmp_path):
    with running(tmp_path, works) as fleet:
        paths = ["/v1/jobs", "/v1/fleet", "/metrics", "/v1/jobs/x/files/y", "/nowhere", "/"]
        for path in paths:
            for key in (None, "", "wrong", TOKEN[:-1], TOKEN + "x"):
                status, headers, body = ask(fleet.url + path, key=key)
                assert status == 401 and headers["WWW-Authenticate"] == "Bearer", (path, key)
                assert TOKEN.encode() not in body
        body, kind = form(("workflow", None, GRAPH))
        assert ask(f"{fleet.url}/v1/jobs", "POST", body, "wrong", Content_Type=kind)[0] == 401
        assert ask(f"{fleet.url}/v1/jobs", key=None, Authorization=f"Basic {TOKEN}")[0] == 401
        assert json.loads(ask(f"{fleet.url}/v1/jobs")[2]) == {"jobs": []}
        assert ask(f"{fleet.url}/health", key=None)[::2] == (200, b'{"status":"ok"}')
        assert ask(f"{fleet.url}/nowhere")[0] == 404
        text = ask(f"{fleet.url}/metrics")[2].decode()
        assert f"frugal_fleet_refused_token_total {len(paths) * 5 + 2}.0" in text


def test_a_full_queue_says_when_to_come_again(tmp_path):
    with running(tmp_path, hangs, queue=2) as fleet:
        for _ in range(2):
            assert post(fleet.url, ("workflow", None, GRAPH))[0] == 202
        status, headers, body = post(fleet.url, ("workflow", None, GRAPH))
        assert status == 503 and 1 <= int(headers["Retry-After"]) <= 300
        assert "2 jobs wait or run" in json.loads(body)["error"]
        jobs = json.loads(ask(f"{fleet.url}/v1/jobs")[2])["jobs"]
        assert len(jobs) == 2
        assert ask(f"{fleet.url}/v1/jobs/{jobs[0]['id']}", "DELETE")[0] == 409
        found = json.loads(ask(f"{fleet.url}/v1/jobs/{jobs[0]['id']}/cancel", "POST")[2])
        assert found["cancelled"] and found["status"] == "cancelled"
        assert post(fleet.url, ("workflow", None, GRAPH))[0] == 202
        assert ask(f"{fleet.url}/v1/jobs/none/cancel", "POST")[0] == 404


def test_a_key_gives_its_job_again(tmp_path):
    with running(tmp_path, works) as fleet:
        first = post(fleet.url, ("workflow", None, GRAPH), Idempotency_Key="k")
        again = post(fleet.url, ("workflow", None, GRAPH), Idempotency_Key="k")
        assert (first[0], again[0]) == (202, 200)
        assert json.loads(first[2])["id"] == json.loads(again[2])["id"]
        other = json.dumps(picture_graph(6)).encode()
        assert post(fleet.url, ("workflow", None, other), Idempotency_Key="k")[0] == 422
        assert post(fleet.url, ("workflow", None, other), Idempotency_Key="a b")[0] == 400
        assert len(fleet.pretended.begun) == 1


def test_a_plan_that_does_not_fit(tmp_path):
    plan = json.dumps({"totals": {"sample": 9 * 10**9}}).encode()
    with running(tmp_path, works, memory=8 * 10**9) as fleet:
        status, _, body = post(fleet.url, ("workflow", None, GRAPH), ("plan", None, plan))
        assert status == 413 and "needs 9.00 GB and a worker has 8.00 GB" in body.decode()
        assert not fleet.pretended.begun
    with running(tmp_path, works) as fleet:
        status, headers, _ = post(fleet.url, ("workflow", None, GRAPH), ("plan", None, plan))
        assert status == 503 and headers["Retry-After"]


@pytest.mark.parametrize(
    ("parts", "status", "told"),
    [
        ([("workflow", None, b"no")], 400, "no JSON"),
        ([], 400, "no JSON"),
        ([("workflow", None, b'{"nodes": []}')], 400, "Export (API)"),
        ([("workflow", None, GRAPH), ("other", None, b"")], 400, "unknown part"),
        ([("workflow", None, GRAPH), ("input", None, b"text")], 400, "unknown part"),
        ([("workflow", None, GRAPH), ("input", "../a.png", b"")], 400, "input file called"),
        ([("workflow", None, GRAPH), ("input", "a", b"1"), ("input", "a", b"2")], 400, "two files"),
        ([("workflow", None, GRAPH), ("input", "a", b"x" * 60000)], 413, "larger than 0.1 MB"),
    ],
)
def test_refused_forms(tmp_path, parts, status, told):
    with running(tmp_path, works, largest=50000) as fleet:
        got, _, body = post(fleet.url, *parts)
        assert got == status and told in json.loads(body)["error"]
        assert not list(fleet.scheduler.store.jobs.iterdir())


def test_a_body_without_a_length_is_counted_too(tmp_path):
    with running(tmp_path, works, largest=50000) as fleet:
        body, kind = form(("workflow", None, GRAPH), ("input", "a", b"x" * 60000))
        pieces = iter([body[:30000], body[30000:]])
        assert ask(f"{fleet.url}/v1/jobs", "POST", pieces, Content_Type=kind)[0] == 413
        assert ask(f"{fleet.url}/v1/jobs", "POST", b"x", Content_Type="text/plain")[0] == 415
        bare = "multipart/form-data"
        assert ask(f"{fleet.url}/v1/jobs", "POST", b"x", Content_Type=bare)[0] == 400


def test_results_stay_over_a_restart(tmp_path):
    with running(tmp_path, works) as fleet:
        job = json.loads(post(fleet.url, ("workflow", None, GRAPH))[2])["id"]
        assert ended(fleet.url, job)["status"] == "completed"
    with running(tmp_path, works) as fleet:
        done = ended(fleet.url, job)
        assert ask(fleet.url + done["files"][1]["path"])[2] == b"5"
        assert b"frugal_fleet_completed_total 1.0" in ask(f"{fleet.url}/metrics")[2]


def test_metrics_are_what_prometheus_reads(tmp_path):
    from prometheus_client.parser import text_string_to_metric_families as read

    with running(tmp_path, dies, works) as fleet:
        ended(fleet.url, json.loads(post(fleet.url, ("workflow", None, GRAPH))[2])["id"])
        _, headers, body = ask(f"{fleet.url}/metrics")
    assert headers["Content-Type"].startswith("text/plain")
    found = {
        (sample.name, *sample.labels.values()): sample.value
        for family in read(body.decode())
        for sample in family.samples
    }
    assert found["frugal_fleet_jobs", "completed"] == 1
    assert found["frugal_fleet_workers_lost_total",] == 1
    assert found["frugal_fleet_result_bytes",] == 1


def test_the_client_waits_for_room(tmp_path):
    async def main():
        async with FleetClient(fleet.url, TOKEN) as client:
            first = await client.submit(GRAPH, {}, "one")
            waiting = asyncio.ensure_future(client.submit(GRAPH, {}, "two", patience=HANG))
            await refused(fleet, 1)
            assert not waiting.done()
            await client.cancel(first["id"])
            assert (await waiting)["status"] == "queued"
            with pytest.raises(FrugalError, match="503"):
                await client.submit(GRAPH, {}, "three")

    with running(tmp_path, hangs, queue=1) as fleet:
        fleet.scheduler.retry_after = lambda: 0
        asyncio.run(main())


async def refused(fleet, times):
    """So many more orders have found the queue full."""
    told = fleet.scheduler.store.counters
    before = told().get("refused_full", 0)
    await comes(lambda: told().get("refused_full", 0) >= before + times, told)


def silent(client, monkeypatch, times):
    """The client's next requests find nobody, so many times."""
    real, left = client._exchange, [times]

    async def exchange(*arguments, **more):
        if left[0]:
            left[0] -= 1
            raise FrugalError("nobody there", "a running server there", "start it")
        return await real(*arguments, **more)

    monkeypatch.setattr(client, "_exchange", exchange)


def test_the_client_waits_while_the_fleet_is_away(tmp_path, monkeypatch):
    monkeypatch.setattr(client_module, "LONGEST_POLL", 0.05)

    async def main():
        async with FleetClient(fleet.url, TOKEN) as client:
            silent(client, monkeypatch, 4)
            job = await client.submit(GRAPH, {}, "one", patience=HANG)
            silent(client, monkeypatch, 4)
            assert (await client.wait(job["id"], HANG))["status"] == "completed"
            silent(client, monkeypatch, 1)
            with pytest.raises(FrugalError, match="nobody there"):
                await client.submit(GRAPH, {}, "two")
            monkeypatch.setattr(client_module, "OUTAGE", 0.3)
            silent(client, monkeypatch, 10**6)
            with pytest.raises(FrugalError, match="nobody there"):
                await client.wait(job["id"], HANG)
        async with FleetClient(fleet.url, TOKEN) as client:
            with pytest.raises(FrugalError, match="404"):
                await client.wait("none", HANG)

    with running(tmp_path, works) as fleet:
        asyncio.run(main())


def test_a_fleet_that_goes_away_while_its_queue_is_full_is_waited_for_too(tmp_path, monkeypatch):
    """An outage is counted from when the fleet was last heard of."""
    monkeypatch.setattr(client_module, "LONGEST_POLL", 0.05)
    now = [0.0]
    monkeypatch.setattr(client_module, "time", SimpleNamespace(monotonic=lambda: now[0]))

    async def main():
        async with FleetClient(fleet.url, TOKEN) as client:
            first = await client.submit(GRAPH, {}, "one")
            waiting = asyncio.ensure_future(client.submit(GRAPH, {}, "two", patience=HANG))
            await refused(fleet, 1)
            now[0] += 2 * client_module.OUTAGE
            # More than one client's attempts: it has heard of the fleet at the new time.
            await refused(fleet, transport.TRIES + 1)
            silent(client, monkeypatch, 2)
            await refused(fleet, transport.TRIES + 1)
            assert not waiting.done()
            await FleetClient.cancel(client, first["id"])
            assert (await waiting)["status"] == "queued"

    with running(tmp_path, hangs, queue=1) as fleet:
        fleet.scheduler.retry_after = lambda: 0
        asyncio.run(main())


def test_a_fleet_that_fails_for_a_moment_loses_no_row(tmp_path, monkeypatch):
    """When its scheduler dies the proxy before it answers 500, at every step of a job."""
    monkeypatch.setattr(client_module, "LONGEST_POLL", 0.05)
    asked = []

    async def main():
        async with FleetClient(fleet.url, TOKEN) as client:
            real = client._exchange

            async def exchange(method, path, *arguments, **more):
                asked.append(path)
                if asked.count(path) == 1:
                    return Reply(500, "text/plain", b"Internal Server Error")
                if asked.count(path) == 2:
                    raise FrugalError("nobody there", "a running server there", "start it")
                return await real(method, path, *arguments, **more)

            monkeypatch.setattr(client, "_exchange", exchange)
            job = await client.submit(GRAPH, {}, "one", patience=HANG)
            job = await client.wait(job["id"], HANG)
            fetched = await client.fetch(job, tmp_path / "results")
            assert len(fetched) == len(job["files"]) > 0

    with running(tmp_path, works) as fleet:
        asyncio.run(main())


def run(fleet, *words):
    return command.main([*words, "--url", fleet.url])


@pytest.fixture
def table(tmp_path, monkeypatch):
    """A workflow and a table with three rows."""
    monkeypatch.setenv(command.TOKEN, TOKEN)
    place = tmp_path / "table"
    place.mkdir()
    graph = picture_graph()
    graph["3"] = {
        "class_type": "LoadImage",
        "inputs": {"image": "example.png"},
        "_meta": {"title": "Person"},
    }
    (place / "graph.json").write_text(json.dumps(graph))
    for name in ("ann", "bob"):
        (place / f"{name}.png").write_bytes(name.encode())
    rows = [["name", "person", "1.color"], ["Ann / red", "ann.png", "1"], ["", "bob.png", "2"],
            ["x", "ann.png", "3"]]  # fmt: skip
    with (place / "jobs.csv").open("w", newline="") as file:
        csv.writer(file).writerows(rows)
    return place


def test_a_table_is_worked_through_and_resumed(tmp_path, table, capsys):
    out = tmp_path / "out"
    words = ["submit", str(table / "graph.json"), "--csv", str(table / "jobs.csv"), "--out",
             str(out), "--delete"]  # fmt: skip
    with running(tmp_path / "store", works) as fleet:
        assert run(fleet, *words) == 0
        assert "3 of 3 done" in capsys.readouterr().out
        for number, name in enumerate(["0001_Ann_red", "0002", "0003_x"], 1):
            assert (out / name / "out" / "p.txt").read_bytes() == str(number).encode()
        with (out / "results.csv").open(newline="") as file:
            told = list(csv.DictReader(file))
        assert [row["status"] for row in told] == ["completed"] * 3
        assert fleet.scheduler.store.list() == [], "--delete forgets what was fetched"
        assert run(fleet, *words) == 0 and len(fleet.pretended.begun) == 3
        assert capsys.readouterr().err.count("was here already") == 3
        (out / "0002" / "out" / "p.txt").unlink()
        (table / "ann.png").write_bytes(b"another picture")
        assert run(fleet, *words) == 0 and len(fleet.pretended.begun) == 6


def test_a_row_that_fails_stops_no_other(tmp_path, table, capsys):
    out = tmp_path / "out"
    with running(tmp_path / "store", complains, works) as fleet:
        words = [str(table / "graph.json"), "--csv", str(table / "jobs.csv"), "--out", str(out)]
        assert run(fleet, "submit", *words, "--at-once", "1") == 1
        said = capsys.readouterr()
        assert "row 1 failed: node 1 (EmptyImage): no" in said.err and "2 of 3 done" in said.out
        assert run(fleet, "status") == 0
        said = capsys.readouterr().out
        assert "2 completed, 1 failed" in said and "no" in said
        (failed,) = fleet.scheduler.store.list("failed")
        assert run(fleet, "status", failed.id) == 0
        assert json.loads(capsys.readouterr().out)["error"] == "node 1 (EmptyImage): no"
        done = fleet.scheduler.store.list("completed")[0].id
        assert run(fleet, "fetch", done, "--out", str(tmp_path / "again")) == 0
        assert (tmp_path / "again" / "out" / "p.txt").is_file()
        assert run(fleet, "cancel", done) == 0
        assert "it had ended: completed" in capsys.readouterr().out
        assert run(fleet, "delete", done) == 0
        assert run(fleet, "status", done) == 1
        assert "404" in capsys.readouterr().err


def test_a_wrong_token_and_a_dead_fleet_are_told(tmp_path, table, monkeypatch, capsys):
    monkeypatch.setattr("frugal.servers.transport.PAUSE", 0.01)
    with running(tmp_path / "store", works) as fleet:
        monkeypatch.setenv(command.TOKEN, "x" * 20)
        assert run(fleet, "status") == 1 and "401" in capsys.readouterr().err
    assert run(fleet, "status") == 1 and "cannot be reached" in capsys.readouterr().err
    monkeypatch.delenv(command.TOKEN)
    assert run(fleet, "status") == 1 and "no usable token" in capsys.readouterr().err


def test_a_made_token_is_its_owners_alone(tmp_path):
    path = tmp_path / "token"
    made = token.kept(path)
    assert len(made) >= 40 and path.stat().st_mode & 0o777 == 0o600 and token.kept(path) == made
    path.chmod(0o644)
    with pytest.raises(FrugalError, match="can be read by others"):
        token.kept(path)


@pytest.mark.parametrize(
    ("header", "cells", "told"),
    [
        ("ghost", "1", "no node 'ghost'"),
        ("1", "1", "has the inputs width, height, batch_size, color"),
        ("1.ghost", "1", "has the inputs width"),
        ("2.images", "1", "has the inputs filename_prefix"),
        ("1.color", "red", "row 1, column 1.color holds 'red'"),
        ("person", "gone.png", "cannot be read"),
        ("1.color,person", "1", "row 1 has 1 cells"),
        ("1.color,1.color", "1,2", "a column name"),
        ("1.color", "", "has no rows"),
    ],
)
def test_tables_that_cannot_be_meant(table, capsys, header, cells, told):
    (table / "jobs.csv").write_text(f"{header}\n{cells}\n")
    words = ["submit", str(table / "graph.json"), "--csv", str(table / "jobs.csv")]
    assert command.main([*words, "--url", "http://127.0.0.1:9"]) == 1
    error = capsys.readouterr().err
    assert told.replace("a column name", "an empty column name") in error
    assert len(error.strip().splitlines()) == 1
