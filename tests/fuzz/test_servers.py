"""Answers of servers, tables and workflows that are damaged or hostile."""

from __future__ import annotations

import copy
import json
from functools import partial

import pytest

from frugal.kernels import json_text
from frugal.servers import chat
from frugal.servers.address import server
from frugal.servers.dialects import takes_images
from frugal.servers.fleet import csv_jobs
from frugal.servers.fleet.job_request import needs, order
from frugal.servers.prompt_rules import cleaned
from frugal.servers.transport import Reply, refusal
from frugal.tests.fuzz.mutations import damaged, strange_json
from frugal.tests.fuzz.watch import Watch, cases

NUMBER = 400
ANSWER = {
    "id": "x",
    "choices": [{"message": {"role": "assistant", "content": "<think>a</think> A cat."},
                 "finish_reason": "stop"}],
    "usage": {"total_tokens": 7},
}  # fmt: skip
MODELS = {"data": [{"id": "wan-i2v", "task_type": "I2V", "root": "/models"}], "object": "list"}
FAILURE = {"error": {"message": "no room", "details": [{"type": "memory"}]}}
GRAPH = {
    "1": {"class_type": "LoadImage", "inputs": {"image": "a.png"}, "_meta": {"title": "Person"}},
    "2": {"class_type": "SaveImage", "inputs": {"images": ["1", 0], "steps": 4, "on": True}},
}
PLAN = {"totals": {"sample": 10, "decode": 5}}


def texts(kind: str, value, chance) -> bytes:
    """`value` as a text with a fault in its JSON or in its bytes."""
    if chance.random() < 0.6:
        value = strange_json(copy.deepcopy(value), chance)
        return json.dumps(value).encode()
    return damaged(json.dumps(value).encode(), chance)


def asked(raw: bytes) -> str:
    where = server("http://localhost:1/v1", "")
    said = Reply(200, "application/json", raw).json("there")
    content = chat._answer(where, said, "m", ()).text
    return cleaned(content)[0]


def models(raw: bytes):
    return takes_images(Reply(200, "application/json", raw).json("there")) or True


def complained(raw: bytes):
    raise refusal(server("http://localhost:1/v1", ""), Reply(500, "application/json", raw))


TARGETS = {
    "chat answers": (ANSWER, asked),
    "lists of models": (MODELS, models),
    "errors of servers": (FAILURE, complained),
    "workflows": (GRAPH, lambda raw: order(raw, {}).digest()),
    "plans": (PLAN, needs),
}


@pytest.mark.parametrize("kind", TARGETS)
def test_texts(kind):
    value, read = TARGETS[kind]
    with Watch(kind) as watch:
        for number, chance in enumerate(cases(kind, NUMBER)):
            raw = texts(kind, value, chance)
            watch(f"case {number}: {raw[:200]!r}", partial(read, raw))
    print(f"{kind}: {watch.read} read, {watch.refused} refused")  # noqa: T201


@pytest.mark.parametrize("depth", [99, 101, 500, 900, 100_000])
@pytest.mark.parametrize("kind", TARGETS)
def test_texts_nested_deeply(kind, depth):
    _, read = TARGETS[kind]
    opened, closed = '{"data": ' * depth, "}" * depth
    with Watch(kind) as watch:
        for raw in (f"{opened}1{closed}", "[" * depth + "]" * depth, "[" * depth, opened):
            watch(raw[:40], partial(read, raw.encode()))


def test_brackets_in_words_are_no_depth():
    assert json_text.parse(json.dumps(["[" * 5000, '\\"[' * 300])) == ["[" * 5000, '\\"[' * 300]
    with pytest.raises(ValueError, match="nested deeper"):
        json_text.parse("[" * 101 + "]" * 101)


def test_tables(tmp_path):
    path = tmp_path / "jobs.csv"
    (tmp_path / "a.png").write_bytes(b"picture")
    good = b'name,Person,2.steps,2.on\nfirst,a.png,4,yes\n"two, quoted",a.png,5,no\n'
    graph = json.dumps(GRAPH).encode()
    path.write_bytes(good)
    assert len(csv_jobs.rows(path, graph)) == 2
    with Watch("tables") as watch:
        for number, chance in enumerate(cases("tables", NUMBER)):
            path.write_bytes(damaged(good, chance))
            watch(f"case {number}", lambda: csv_jobs.rows(path, graph))
    print(f"tables: {watch.read} read, {watch.refused} refused")  # noqa: T201


@pytest.mark.parametrize(
    ("encoding", "text"),
    [
        ("utf-8", "caf\u00e9 \u732b"),
        ("utf-8-sig", "caf\u00e9 \u732b"),
        ("utf-16", "caf\u00e9 \u732b"),
        ("cp1252", "caf\u00e9 \u2013 \u20ac"),
    ],
)
@pytest.mark.parametrize("delimiter", [",", ";", "\t"])
def test_tables_as_spreadsheets_save_them(tmp_path, encoding, text, delimiter):
    workflow = {"1": {"class_type": "Text", "inputs": {"text": "", "steps": 1}}}
    lines = [("name", "1.text", "1.steps"), ("a", text, "7")]
    path = tmp_path / "jobs.csv"
    path.write_text("\r\n".join(map(delimiter.join, lines)), encoding=encoding, newline="")
    (row,) = csv_jobs.rows(path, json.dumps(workflow).encode())
    assert row.order.workflow["1"]["inputs"] == {"text": text, "steps": 7}
