"""Reports on nodes: which workflow they belong to, how much is shown, how many are kept."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from frugal.nodes import _comfy, _reports

pytestmark = pytest.mark.comfy


class Queue:
    """ComfyUI's queue with one prompt of the page's that runs."""

    def get_current_queue_volatile(self):
        data = {"extra_pnginfo": {"workflow": {"id": "mine"}}, "client_id": "tab"}
        return [(0, "prompt", {}, data, ["7"], {})], []


@pytest.fixture
def sent(monkeypatch):
    messages = []
    server = SimpleNamespace(
        prompt_queue=Queue(), send_sync=lambda event, data: messages.append((event, data))
    )
    monkeypatch.setattr(_reports, "_server", lambda: server)
    monkeypatch.setattr(_reports, "REPORTS", _reports.Reports())
    return messages


def test_a_report_is_sent_and_kept_with_its_workflow(sent):
    _comfy.show_text("7:3", "fits\nin 8 GB")
    expected = {"workflow": "mine", "node": "7:3", "text": "fits\nin 8 GB"}
    assert sent == [(_reports.EVENT, expected)]
    assert _reports.REPORTS.of("mine") == {"7:3": "fits\nin 8 GB"}
    assert _reports.REPORTS.of("another") == {}


def test_a_later_report_takes_the_place_of_an_earlier_one(sent):
    _comfy.show_text("7", "writing")
    _comfy.show_text("7", "cancelled")
    assert _reports.REPORTS.of("mine") == {"7": "cancelled"}


def test_no_more_than_six_lines_are_shown(sent):
    _comfy.show_text("7", "\n".join(f"line {n}" for n in range(45)))
    lines = sent[0][1]["text"].splitlines()
    assert len(lines) == 6 and lines[0] == "line 0"
    assert lines[-1] == "(40 more lines in the report output)"


def test_the_latest_workflows_are_kept():
    kept = _reports.Reports()
    for number in range(_reports.WORKFLOWS + 1):
        kept.add(str(number), "1", "text")
    assert kept.of("0") == {} and kept.of(str(_reports.WORKFLOWS)) == {"1": "text"}


def test_without_a_server_nothing_happens(monkeypatch):
    monkeypatch.setattr(_reports, "_server", lambda: None)
    _comfy.show_text("7", "text")
