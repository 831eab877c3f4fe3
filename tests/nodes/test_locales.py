"""The names of the nodes in other languages: none missing, none of a node that is gone."""

from __future__ import annotations

import importlib
import json
from pathlib import Path

import pytest

from frugal.nodes import FAMILIES

LOCALES = Path(__file__).resolve().parents[2] / "locales"
LANGUAGES = ("ja", "ko", "zh", "zh-TW")


@pytest.fixture(scope="module")
def schemas(comfy_tree) -> dict:
    families = [importlib.import_module(f"frugal.nodes.{name}.nodes") for name in FAMILIES]
    return {node.GET_SCHEMA().node_id: node.GET_SCHEMA() for f in families for node in f.NODES}


def faults(schemas: dict, told: dict) -> list[str]:
    """What a translation lacks and what it has too much: nodes, inputs and outputs."""
    found = [f"{node}: no display_name" for node in schemas if not told.get(node, {}).get(NAME)]
    for node, entry in told.items():
        if node not in schemas:
            found.append(f"{node}: is gone")
            continue
        inputs = {each.id for each in schemas[node].inputs}
        found += [f"{node}.{name}: no such input" for name in set(entry.get("inputs", {})) - inputs]
    names = [entry.get(NAME) for entry in told.values()]
    return found + [f"{name}: two nodes" for name in {*names} if names.count(name) > 1]


NAME = "display_name"


def test_the_languages_are_there():
    assert {path.name for path in LOCALES.iterdir()} == set(LANGUAGES)


@pytest.mark.parametrize("language", LANGUAGES)
def test_every_node_has_its_name(schemas, language):
    told = json.loads((LOCALES / language / "nodeDefs.json").read_text("utf-8"))
    assert faults(schemas, told) == []


def test_each_fault_is_seen(schemas):
    told = {node: {NAME: node} for node in schemas}
    assert faults(schemas, told) == []
    assert faults(schemas, told | {"FrugalGone": {NAME: "x"}}) == ["FrugalGone: is gone"]
    assert faults(schemas, told | {"FrugalSampler": {}}) == ["FrugalSampler: no display_name"]
    stale = told | {"FrugalSampler": {NAME: "x", "inputs": {"gone": {"name": "y"}}}}
    assert faults(schemas, stale) == ["FrugalSampler.gone: no such input"]
    twice = told | {"FrugalSampler": {NAME: "FrugalTryOn"}}
    assert faults(schemas, twice) == ["FrugalTryOn: two nodes"]
