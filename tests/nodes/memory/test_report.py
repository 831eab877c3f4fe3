"""The run report: what it measures, how it reads models, and that every run is measured again."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest
import torch

from frugal.kernels.errors import FrugalError
from frugal.kernels.memory import meter
from frugal.kernels.memory.meter import Memory, Meter
from frugal.kernels.memory.run_report import Frames, RunReport
from frugal.kernels.report import LoadReport
from frugal.nodes._comfy import REPORT_KEY
from frugal.nodes.memory import run_report_run
from frugal.nodes.memory.run_report import FrugalReport

CPU = torch.device("cpu")
MEMORY = Memory("process", "cpu", 3_000_000_000, 2_000_000_000, 8_000_000_000)


@pytest.fixture(autouse=True)
def _no_server(monkeypatch):
    monkeypatch.setattr("frugal.nodes.memory.run_report.show_text", lambda *_: None)


def execute(**inputs):
    node = FrugalReport.PREPARE_CLASS_CLONE({})
    return node.execute(**{"price_per_hour": 0.0, "currency": "USD"} | inputs)


def patcher():
    import comfy.model_patcher

    model = torch.nn.Sequential(torch.nn.Linear(8, 4), torch.nn.Linear(4, 2).half())
    return comfy.model_patcher.ModelPatcher(model, CPU, CPU)


def test_seconds_run_from_the_fingerprint_to_the_node(monkeypatch):
    now = [100.0]
    monkeypatch.setattr(meter, "time", SimpleNamespace(perf_counter=lambda: now[0]))
    FrugalReport.fingerprint_inputs(price_per_hour=0.0, currency="USD")
    now[0] += 12.5
    assert json.loads(execute()[1])["seconds"] == 12.5


def test_fingerprint_never_repeats():
    assert FrugalReport.fingerprint_inputs() != FrugalReport.fingerprint_inputs()


def test_an_unseen_start_is_said_and_costs_nothing():
    report = RunReport(Meter().seconds(), MEMORY, price_per_hour=2.0)
    assert report.cost is None
    assert "time: unknown" in report.text()
    assert "cost: unknown, the time is not known (at 2 USD" in report.text()


def test_cost_is_the_share_of_an_hour():
    report = RunReport(90.0, MEMORY, price_per_hour=2.4, currency="EUR")
    assert report.cost == pytest.approx(0.06)
    assert "cost: 0.060000 EUR at 2.4 EUR per hour typed in" in report.text()
    assert RunReport(90.0, MEMORY).to_dict()["cost"] is None


def test_text_and_json_hold_the_same_numbers():
    report = RunReport(12.5, MEMORY, (), Frames(25, 832, 480), 3.6, "USD")
    data = json.loads(report.json())
    assert data["frames"] == {"count": 25, "width": 832, "height": 480}
    assert data["seconds_per_frame"] == 0.5
    assert data["memory"]["peak"] == 3_000_000_000
    for part in ("12.50 s", "25 x 832 x 480 px, 0.50 s each", "3.00 GB at peak", "0.012500 USD"):
        assert part in report.text()


@pytest.mark.parametrize("price", [-1.0, float("nan"), float("inf")])
def test_a_senseless_price_is_refused(price):
    with pytest.raises(FrugalError, match="price_per_hour"):
        execute(price_per_hour=price)


@pytest.mark.parametrize("currency", ["", "   ", "thirteen char"])
def test_a_senseless_currency_is_refused(currency):
    with pytest.raises(FrugalError, match="currency"):
        execute(currency=currency)


def test_process_memory_follows_an_allocation():
    size = 200_000_000
    before = Meter().memory(CPU)
    block = torch.ones(size, dtype=torch.uint8)
    after = Meter().memory(CPU)
    assert after.now - before.now > 0.8 * size
    assert after.peak >= after.now
    assert after.total > after.now
    del block
    assert Meter().memory(CPU).peak > 0.99 * after.now  # the kernel counts in batches of pages


def test_a_load_report_on_the_model_is_used():
    left = LoadReport("Wan 2.1", {"wan.safetensors": 5_000_000}, {"fp8": 4_000_000}, 1.5, ("note",))
    model = patcher()
    model.set_attachments(REPORT_KEY, left)
    text, data = execute(model=model).args
    assert left.text() in text
    assert json.loads(data)["models"][0]["formats"] == {"fp8": 4_000_000}


def test_a_stock_model_is_read_off_itself():
    model = patcher()
    facts = run_report_run.model_facts(model)
    assert facts.formats == {"float32": 4 * 36, "float16": 2 * 10}
    assert facts.bytes == 4 * 36 + 2 * 10 == model.model_size()
    assert facts.title == "Sequential"


def test_both_models_and_the_frames_are_listed():
    images = torch.zeros(3, 16, 24, 3)
    data = json.loads(execute(model=patcher(), model_2=patcher(), images=images)[1])
    assert len(data["models"]) == 2
    assert data["frames"] == {"count": 3, "width": 24, "height": 16}


@pytest.mark.comfy
def test_every_run_on_a_server_is_measured_again(server):
    graph = {
        "1": {
            "class_type": "EmptyImage",
            "inputs": {"width": 64, "height": 32, "batch_size": 2, "color": 0},
        },
        "2": {
            "class_type": "FrugalReport",
            "inputs": {"images": ["1", 0], "price_per_hour": 3600.0, "currency": "EUR"},
        },
    }
    seconds = []
    for _ in range(2):
        result = server.run(graph)
        assert result.status == "success", result.errors
        assert "2" in result.executed
        data = json.loads(result.outputs["2"]["frugal_report"][0])
        assert data["frames"] == {"count": 2, "width": 64, "height": 32}
        assert data["cost"] == pytest.approx(data["seconds"])
        assert 0 < data["seconds"] <= result.seconds + 0.1
        assert f"{data['cost']:.6f} EUR" in result.outputs["2"]["text"][0]
        seconds.append(data["seconds"])
    assert seconds[0] != seconds[1]
