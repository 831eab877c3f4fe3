"""A table of jobs: each row of a CSV file fills one copy of a workflow.

A column sets one input of one node. Its name says which: `12.image` (node id and input),
`Person.image` (node title and input), or `Person` alone where that node has just one input that is
not a link. A cell goes in as a file where the workflow holds a file name there, else as a value of
the type that the workflow has there.
"""

from __future__ import annotations

import copy
import csv
import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...kernels.errors import FrugalError
from .job_request import JobRequest, order

FILE = re.compile(r".*\.(png|jpe?g|webp|bmp|gif|tiff?|mp4|mov|mkv|webm|wav|mp3|flac)", re.I)
LINK_PARTS = 2


@dataclass(frozen=True)
class Row:
    """number: of the row, from 1. name: for the folder of its results. key: the same whenever the
    same row is handed in again.
    """

    number: int
    name: str
    order: JobRequest
    key: str


def rows(table: Path, workflow: bytes, named: Mapping[str, str] | None = None) -> list[Row]:
    """The jobs of a CSV file. named: column -> NODE.INPUT, for columns whose own name does not say
    it. A column `name` that sets nothing names the rows. Raises FrugalError before anything is
    sent.
    """
    base = order(workflow, {}).workflow
    with table.open(encoding="utf-8-sig", newline="") as file:
        read = csv.reader(file)
        header = [cell.strip() for cell in next(read, [])]
        lines = [line for line in read if any(cell.strip() for cell in line)]
    if not lines:
        raise FrugalError(
            f"{table.name} has no rows", "a header and a row per job", "fill in the table"
        )
    if len(set(header)) != len(header) or "" in header:
        raise FrugalError(
            f"{table.name} has an empty column name, or one twice",
            "different ones",
            "rename the columns",
        )
    if unknown := sorted(set(named or {}) - set(header)):
        raise FrugalError(
            f"--set names {', '.join(unknown)}", f"columns of {table.name}", "correct the names"
        )
    places = {}
    for column in header:
        wanted = (named or {}).get(column, column)
        if column != "name" or column in (named or {}):
            places[column] = _place(base, wanted, column)
    return [
        _row(number, dict(zip(header, line, strict=False)), header, base, places, table.parent)
        for number, line in enumerate(lines, 1)
    ]


def _row(
    number: int,
    cells: Mapping[str, str],
    header: Sequence[str],
    base: Mapping[str, Any],
    places: Mapping[str, tuple[str, str]],
    folder: Path,
) -> Row:
    if len(cells) != len(header):
        raise FrugalError(
            f"row {number} has {len(cells)} cells", f"{len(header)}", "fill in the missing ones"
        )
    filled, files = copy.deepcopy(dict(base)), {}
    for column, (node, field) in places.items():
        text, now = cells[column].strip(), base[node]["inputs"][field]
        where = f"row {number}, column {column}"
        if isinstance(now, str) and FILE.fullmatch(now):
            name, data = _file(folder / text, where)
            files[name] = data
            filled[node]["inputs"][field] = name
        else:
            filled[node]["inputs"][field] = _value(text, now, where)
    ready = order(json.dumps(filled), files)
    label = re.sub(r"[^A-Za-z0-9._-]+", "_", cells.get("name", "").strip()).strip("._")
    name = f"{number:04d}" + (f"_{label[:60]}" if label else "")
    return Row(number, name, ready, f"sheet-{ready.digest()}")


def _file(path: Path, where: str) -> tuple[str, bytes]:
    try:
        data = path.read_bytes()
    except OSError as error:
        raise FrugalError(
            f"{where}: {path} cannot be read ({error.strerror})",
            "a file, its path counted from the table's folder",
            "correct the cell",
        ) from None
    # Two folders may hold different files of one name.
    stem = re.sub(r"[^A-Za-z0-9._-]+", "_", path.name).lstrip("._-")[-80:]
    return f"{hashlib.sha256(data).hexdigest()[:12]}_{stem}", data


def _value(text: str, now: Any, where: str) -> Any:
    kind = type(now)
    try:
        if kind is bool:
            return {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}[
                text.lower()
            ]
        if kind is int:
            return int(text)
        if kind is float:
            return float(text)
    except (ValueError, KeyError):
        raise FrugalError(
            f"{where} holds {ascii(text)[:40]}", f"a value like {now!r}", "correct the cell"
        ) from None
    return text


def _place(workflow: Mapping[str, Any], wanted: str, column: str) -> tuple[str, str]:
    """Node id and input that `wanted` means."""
    # Titles hold dots, inputs do not.
    name, _, field = wanted.rpartition(".")
    tries = [(name, field)] if name else []
    tries.append((wanted, ""))
    for title, given in tries:
        nodes = [title] if title in workflow else _titled(workflow, title)
        if len(nodes) > 1:
            raise FrugalError(
                f"column {column}: {len(nodes)} nodes are called {title!a} ({', '.join(nodes)})",
                "one",
                f"use the node's number, say {nodes[0]}.{given or 'image'}",
            )
        if nodes:
            return nodes[0], _field(workflow[nodes[0]], nodes[0], given, column)
    raise FrugalError(
        f"column {column}: the workflow has no node {ascii(wanted)[:60]}",
        "a column called NODE.INPUT, by the node's number or title",
        f"rename the column, or say --set {column}=NODE.INPUT",
    )


def _titled(workflow: Mapping[str, Any], title: str) -> list[str]:
    wanted = title.strip().lower()
    return [
        name
        for name, node in workflow.items()
        if str(node.get("_meta", {}).get("title", "")).strip().lower() == wanted
    ]


def _field(node: Mapping[str, Any], name: str, given: str, column: str) -> str:
    inputs = node["inputs"]
    free = [each for each, value in inputs.items() if not _is_link(value)]
    files = [
        each for each in free if isinstance(inputs[each], str) and FILE.fullmatch(inputs[each])
    ]
    if given:
        if given in free:
            return given
    elif len(files) == 1 or len(free) == 1:
        return (files or free)[0]
    raise FrugalError(
        f"column {column}: node {name} ({node['class_type']}) has the inputs "
        f"{', '.join(free) or 'none that is no link'}",
        "the name of one of them" if free else "a node with a value to set",
        f"call the column {name}.{free[0]}" if free else "name another node",
    )


def _is_link(value: Any) -> bool:
    return isinstance(value, list) and len(value) == LINK_PARTS and isinstance(value[0], str)
