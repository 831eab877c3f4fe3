"""Saved workflows keep working: no node id, input, choice or output goes away or changes its type.

`node_schemas.json` holds what was shipped. After adding a node or an input, rewrite it with the
oldest ComfyUI, whose choices all others have:

    FRUGAL_WRITE_SCHEMAS=1 FRUGAL_COMFYUI_TREE=<ComfyUI> python -P -m pytest \
        tests/nodes/test_node_schemas.py

A workflow stores widget values by place, so a new input belongs behind the others of its kind.
"""

from __future__ import annotations

import importlib
import json
import os
from pathlib import Path

import pytest

from frugal.nodes import FAMILIES

SHIPPED = Path(__file__).with_name("node_schemas.json")
WRITING = os.environ.get("FRUGAL_WRITE_SCHEMAS") == "1"
KINDS = ("required", "optional")


def schemas() -> dict:
    """Node id -> its inputs by kind as [name, type, choices], its outputs as [name, type]."""
    found = {}
    for family in FAMILIES:
        for cls in importlib.import_module(f"frugal.nodes.{family}.nodes").NODES:
            outputs = cls.GET_SCHEMA().outputs
            info = cls.GET_NODE_INFO_V1()
            given = {
                kind: [described(*item) for item in info["input"].get(kind, {}).items()]
                for kind in KINDS
            }
            found[info["name"]] = given | {"outputs": [[o.id, o.get_io_type()] for o in outputs]}
    return found


def described(name: str, entry) -> list:
    kind, *options = entry
    if isinstance(kind, list):
        kind, choices = "COMBO", kind
    else:
        choices = (options[0] if options else {}).get("options", [])
    return [name, str(kind), [str(choice) for choice in choices]]


def faults(shipped: dict, now: dict) -> list[str]:
    """What a workflow saved with `shipped` would trip over, as sentences."""
    found = [f"{node}: is gone" for node in shipped if node not in now]
    for node, old in shipped.items():
        new = now.get(node)
        if new is None:
            continue
        for kind in KINDS:
            found += [f"{node}.{each}" for each in input_faults(old[kind], new[kind])]
        before = {name for kind in KINDS for name, *_ in old[kind]}
        asked = [name for name, *_ in new["required"] if name not in before]
        found += [f"{node}.{name}: a new input must be optional" for name in asked]
        if new["outputs"][: len(old["outputs"])] != old["outputs"]:
            found.append(f"{node}: outputs {old['outputs']} became {new['outputs']}")
    return found


def input_faults(old: list, new: list) -> list[str]:
    places = {name: (place, kind, choices) for place, (name, kind, choices) in enumerate(new)}
    found = []
    for place, (name, kind, choices) in enumerate(old):
        if name not in places:
            found.append(f"{name}: is gone")
            continue
        new_place, new_kind, new_choices = places[name]
        if new_kind != kind:
            found.append(f"{name}: {kind} became {new_kind}")
        if new_place != place:
            found.append(f"{name}: moved from place {place} to {new_place}")
        lost = [choice for choice in choices if choice not in new_choices]
        if lost:
            found.append(f"{name}: lost the choices {lost}")
    return found


@pytest.fixture(scope="module")
def now(comfy_tree) -> dict:
    return schemas()


def write(now: dict) -> None:
    lines = [f"{json.dumps(node)}: {json.dumps(each)}" for node, each in sorted(now.items())]
    SHIPPED.write_text("{\n" + ",\n".join(lines) + "\n}\n", encoding="utf-8")


def test_what_was_shipped_still_works(now):
    if WRITING:
        write(now)
    shipped = json.loads(SHIPPED.read_text("utf-8"))
    assert faults(shipped, now) == []
    unlisted = sorted(set(now) - set(shipped))
    assert not unlisted, f"rewrite node_schemas.json: {unlisted} are not in it"


def test_each_kind_of_fault_is_seen():
    def node(**changed):
        whole = {
            "required": [["model", "MODEL", []], ["kind", "COMBO", ["a", "b"]]],
            "optional": [["steps", "INT", []]],
            "outputs": [["model", "MODEL"]],
        }
        return {"N": whole | changed}

    assert faults(node(), node()) == []
    more = node(
        required=[["model", "MODEL", []], ["kind", "COMBO", ["b", "c", "a"]]],
        optional=[["steps", "INT", []], ["seed", "INT", []]],
        outputs=[["model", "MODEL"], ["report", "STRING"]],
    )
    assert faults(node(), more) == []
    assert faults(node(), {}) == ["N: is gone"]
    assert faults(node(), node(optional=[])) == ["N.steps: is gone"]
    changed = node(optional=[["steps", "FLOAT", []]])
    assert faults(node(), changed) == ["N.steps: INT became FLOAT"]
    fewer = node(required=[["model", "MODEL", []], ["kind", "COMBO", ["a"]]])
    assert faults(node(), fewer) == ["N.kind: lost the choices ['b']"]
    first = node(optional=[["seed", "INT", []], ["steps", "INT", []]])
    assert faults(node(), first) == ["N.steps: moved from place 0 to 1"]
    wanted = node(required=[*node()["N"]["required"], ["vae", "VAE", []]])
    assert faults(node(), wanted) == ["N.vae: a new input must be optional"]
    assert len(faults(node(), node(outputs=[["report", "STRING"], ["model", "MODEL"]]))) == 1
