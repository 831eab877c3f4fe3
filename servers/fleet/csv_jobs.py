"""A table of jobs: each row of a CSV file fills one copy of a workflow.

A column sets one input of one node. Its name says which: `12.image` (node id and input),
`Person.image` (node title and input), or `Person` alone where that node has just one input that is
not a link. A cell goes in as a file where the workflow holds a file name there, else as a value of
the type that the workflow has there.
"""

from __future__ import annotations

import codecs
import contextlib
import copy
import csv
import hashlib
import io
import json
import locale
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...kernels.errors import FrugalError
from ...kernels.log import LOG
from .job_request import JobRequest, is_link, order

MARKS = {
    codecs.BOM_UTF8: "utf-8-sig",
    codecs.BOM_UTF16_LE: "utf-16",
    codecs.BOM_UTF16_BE: "utf-16",
}
# The first of equals is taken, so a header of one column is one column.
DELIMITERS = ",;\t"
SAVE = "save the table as CSV UTF-8"
FILE = re.compile(r".*\.(png|jpe?g|webp|bmp|gif|tiff?|mp4|mov|mkv|webm|wav|mp3|flac)", re.I)


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
    read = _cells(table)
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


def _cells(table: Path) -> Iterator[list[str]]:
    """Rows of cells, as Excel saves them too: UTF-8 with a mark or without, UTF-16, the Windows
    code page of western Europe; commas, semicolons or tabs.
    """
    raw = table.read_bytes()
    text = None
    for mark, encoding in MARKS.items():
        if raw.startswith(mark):
            text = raw.decode(encoding, "replace")
    if text is None:
        text = _without_mark(raw, table.name)
    if "\0" in text:
        raise FrugalError(f"{table.name} is no text", "a CSV file", SAVE)
    first = text.partition("\n")[0]
    delimiter = max(DELIMITERS, key=first.count)
    try:
        yield from csv.reader(io.StringIO(text, newline=""), delimiter=delimiter)
    except csv.Error as error:
        raise FrugalError(f"{table.name} cannot be read ({error})", "a CSV file", SAVE) from None


def _without_mark(raw: bytes, name: str) -> str:
    for encoding in ("utf-8", locale.getpreferredencoding(False), "cp1252"):
        with contextlib.suppress(UnicodeDecodeError, LookupError):
            text = raw.decode(encoding)
            if encoding != "utf-8":
                LOG.warning("[Frugal] %s is no UTF-8; it is read as %s", name, encoding)
            return text
    raise FrugalError(f"{name} is text of an unknown encoding", "UTF-8", SAVE)


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
    free = [each for each, value in inputs.items() if not is_link(value)]
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
