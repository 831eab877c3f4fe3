"""Turn a short description of a graph into ComfyUI's saved-graph format (version 0.4).

The order of a node's widgets is read from a running ComfyUI's `/object_info`, so no widget can
shift: a description that names an unknown node, input or output is refused.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from . import graph_layout

WIDGET_TYPES = {"INT", "FLOAT", "STRING", "BOOLEAN", "COMBO"}
# A choice that brings inputs of its own, which follow it among the widgets.
DYNAMIC_COMBO = "COMFY_DYNAMICCOMBO_V3"
WIDTH = 340
ROW, HEAD = 26, 46
MUTED = 2
# The page puts "control after generate" behind these, whether the node asks for it or not.
SEEDS = ("seed", "noise_seed")


@dataclass
class Node:
    """One node: values by widget name, links as input name -> (node key, output number).

    column: nodes of a column stand under each other in the order given. size: [width, height] of
    the node in canvas units, for nodes that show a picture or text; else as its widgets need.
    muted: the node does not run until its user wants it.
    """

    type: str
    column: int
    values: dict[str, Any] = field(default_factory=dict)
    links: dict[str, tuple[str, int]] = field(default_factory=dict)
    title: str = ""
    models: list[dict[str, str]] = field(default_factory=list)
    size: tuple[int, int] | None = None
    muted: bool = False


@dataclass
class Note:
    """A Markdown note on the canvas; left of all nodes, since that is what people look at first."""

    text: str
    size: tuple[int, int] = (420, 420)
    column: int = -1
    title: str = "Read me"


@dataclass
class Group:
    """A coloured frame round the columns first..last."""

    title: str
    first: int
    last: int
    color: str = "#3f789e"


def build(
    info: dict[str, Any], nodes: dict[str, Node], notes: list[Note], groups: list[Group]
) -> dict[str, Any]:
    """Saved graph of `nodes` with notes and groups; `info` is the answer of /object_info."""
    ids = {key: number for number, key in enumerate(nodes, 1)}
    links: list[list[Any]] = []
    placed = {key: _place(info, key, node, ids[key]) for key, node in nodes.items()}
    for key, node in nodes.items():
        for name, (source, slot) in node.links.items():
            number = len(links) + 1
            kind = placed[source]["outputs"][slot]["type"]
            place = next(
                (i for i, entry in enumerate(placed[key]["inputs"]) if entry["name"] == name), None
            )
            if place is None:
                raise KeyError(f"{node.type} has no input {name}")
            placed[key]["inputs"][place]["link"] = number
            placed[source]["outputs"][slot]["links"].append(number)
            links.append([number, ids[source], slot, ids[key], place, kind])
    extra = [_note(note, len(nodes) + 1 + i) for i, note in enumerate(notes)]
    columns: dict[int, list[dict[str, Any]]] = {}
    for item, made in [
        *zip(nodes.values(), placed.values(), strict=True),
        *zip(notes, extra, strict=True),
    ]:
        columns.setdefault(item.column, []).append(made)
    graph_layout.stand_in_columns(columns)
    return {
        "last_node_id": len(nodes) + len(notes),
        "last_link_id": len(links),
        "nodes": [*placed.values(), *extra],
        "links": links,
        "groups": [
            {
                "id": i + 1,
                "title": g.title,
                "bounding": graph_layout.frame(
                    [n for c in range(g.first, g.last + 1) for n in columns[c]]
                ),
                "color": g.color,
                "font_size": 24,
                "flags": {},
            }
            for i, g in enumerate(groups)
        ],
        "config": {},
        "extra": {"ds": graph_layout.view(), **graph_layout.routed(columns, links)},
        "version": 0.4,
    }


def _place(info: dict[str, Any], key: str, node: Node, number: int) -> dict[str, Any]:
    if node.type not in info:
        raise KeyError(f"{key}: this ComfyUI has no node {node.type}")
    schema = info[node.type]
    declared = {**schema["input"].get("required", {}), **schema["input"].get("optional", {})}
    unknown = (set(node.values) | set(node.links)) - set(declared)
    if unknown:
        raise KeyError(f"{node.type} has no input {sorted(unknown)}; it has {sorted(declared)}")
    inputs, widgets = [], []
    for name, (kind, *rest) in declared.items():
        options = rest[0] if rest else {}
        if kind == DYNAMIC_COMBO:
            widgets += _first_choice(options)
            continue
        widget = (isinstance(kind, list) or kind in WIDGET_TYPES) and not options.get("forceInput")
        if not widget:
            entry: dict[str, Any] = {"name": name, "type": kind, "link": None}
            if name in schema["input"].get("optional", {}):
                entry["shape"] = 7
            inputs.append(entry)
            continue
        if name in node.links:
            inputs.append(
                {
                    "name": name,
                    "type": "COMBO" if isinstance(kind, list) else kind,
                    "widget": {"name": name},
                    "link": None,
                }
            )
        widgets.append(node.values.get(name, _default(kind, options)))
        if kind == "INT" and options.get("control_after_generate", name in SEEDS):
            widgets.append("fixed")
    if any(rest and rest[0].get("image_upload") for _, *rest in declared.values()):
        widgets.append("image")  # the upload button, which the page adds after all others
    outputs = [
        {"name": name, "type": kind, "links": [], "slot_index": i}
        for i, (name, kind) in enumerate(zip(schema["output_name"], schema["output"], strict=True))
    ]
    properties: dict[str, Any] = {"Node name for S&R": node.type}
    if node.type.startswith("Frugal"):
        properties |= {"cnr_id": "comfyui-frugal", "ver": "0.1.0"}
    else:
        properties |= {"cnr_id": "comfy-core", "ver": "0.3.75"}
    if node.models:
        properties["models"] = node.models
    height = HEAD + ROW * (max(len(inputs), len(outputs)) + len(widgets))
    return {
        "id": number,
        "type": node.type,
        "pos": [0, 0],
        "size": list(node.size or (WIDTH, height)),
        "flags": {},
        "order": number - 1,
        "mode": MUTED if node.muted else 0,
        "inputs": inputs,
        "outputs": outputs,
        **({"title": node.title} if node.title else {}),
        "properties": properties,
        "widgets_values": widgets,
    }


def _first_choice(options: dict[str, Any]) -> list[Any]:
    """The values of a DYNAMIC_COMBO's first choice and of the inputs that come with it."""
    choice, values = options["options"][0], []
    for kind, *rest in choice["inputs"].get("required", {}).values():
        more = rest[0] if rest else {}
        values += _first_choice(more) if kind == DYNAMIC_COMBO else [_default(kind, more)]
    return [choice["key"], *values]


def _default(kind: Any, options: dict[str, Any]) -> Any:
    if "default" in options:
        return options["default"]
    if isinstance(kind, list):
        return kind[0] if kind else ""
    if kind == "COMBO":
        return (options.get("options") or [""])[0]
    return {"INT": 0, "FLOAT": 0.0, "STRING": "", "BOOLEAN": False}[kind]


def _note(note: Note, number: int) -> dict[str, Any]:
    return {
        "id": number,
        "type": "MarkdownNote",
        "pos": [0, 0],
        "size": list(note.size),
        "flags": {},
        "order": number - 1,
        "mode": 0,
        "inputs": [],
        "outputs": [],
        "title": note.title,
        "properties": {},
        "widgets_values": [note.text],
        # Black: on the page's own yellow, the blue that it writes code in cannot be read.
        "color": "#222",
        "bgcolor": "#000",
    }
