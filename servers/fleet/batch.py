"""Many jobs for one person: handed in a few at a time, fetched, noted in a table; resumable."""

from __future__ import annotations

import asyncio
import contextlib
import csv
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...kernels import json_text
from ...kernels.atomic_write import atomic_write
from ...kernels.errors import FrugalError
from .client import FleetClient, settled
from .csv_jobs import Row

DONE = "job.json"
TABLE = "results.csv"
COLUMNS = ("row", "name", "status", "attempts", "seconds", "job", "files", "error")


@dataclass(frozen=True)
class Result:
    """status: completed, failed, cancelled, refused, lost. kept: it was there from an earlier
    run.
    """

    row: Row
    status: str
    job: str = ""
    attempts: int = 0
    seconds: float = 0.0
    files: tuple[str, ...] = ()
    error: str = ""
    kept: bool = False


async def send(
    client: FleetClient,
    rows: Sequence[Row],
    out: Path,
    at_once: int,
    patience: float,
    progress: Callable[[Result], None] = lambda result: None,
    delete: bool = False,
    plan: bytes = b"",
) -> list[Result]:
    """Hand in every row, `at_once` at a time, and fetch its results to out/<row's name>. Each row
    ends with a Result; a row that failed does not stop the others. delete: forget the job there
    once its results are here. plan: goes along with every row.
    """
    out.mkdir(parents=True, exist_ok=True)
    room = asyncio.Semaphore(at_once)

    async def one(row: Row) -> Result:
        async with room:
            result = _earlier(out / row.name, row) or await _through(
                client, row, out / row.name, patience, delete, plan
            )
        progress(result)
        return result

    results = await asyncio.gather(*(one(row) for row in rows))
    _table(out / TABLE, results)
    return list(results)


async def _through(
    client: FleetClient, row: Row, folder: Path, patience: float, delete: bool, plan: bytes
) -> Result:
    job: dict[str, Any] = {"id": "", "attempts": 0}
    try:
        workflow = json.dumps(row.order.workflow).encode()
        job = await client.submit(workflow, row.order.files, row.key, plan, patience)
        job = await settled(client, job["id"], patience)
        files = await client.fetch(job, folder)
    except FrugalError as error:
        status = "lost" if job["id"] else "refused"
        return Result(row, status, job["id"], job["attempts"], error=str(error))
    result = Result(
        row,
        job["status"],
        job["id"],
        job["attempts"],
        (job["ended"] or 0) - (job["started"] or job["ended"] or 0),
        tuple(path.relative_to(folder.resolve()).as_posix() for path in files),
        job["error"],
    )
    if job["status"] == "completed":
        folder.mkdir(parents=True, exist_ok=True)
        with atomic_write(folder / DONE) as unfinished:
            unfinished.write_text(json.dumps({"key": row.key, "job": job}, indent=1), "utf-8")
    if delete:
        # A failed job is forgotten too, or its key would give the old failure forever.
        with contextlib.suppress(FrugalError):
            await client.delete(job["id"])
    return result


def _earlier(folder: Path, row: Row) -> Result | None:
    try:
        found = json_text.parse((folder / DONE).read_text("utf-8"))
        job = found["job"]
        files = tuple(file["name"] for file in job["files"])
        whole = all((folder / f["name"]).stat().st_size == f["bytes"] for f in job["files"])
        if found["key"] != row.key or not whole:
            return None
        return Result(row, "completed", job["id"], job["attempts"], files=files, kept=True)
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _table(path: Path, results: Sequence[Result]) -> None:
    with (
        atomic_write(path) as unfinished,
        unfinished.open("w", encoding="utf-8", newline="") as file,
    ):
        write = csv.writer(file)
        write.writerow(COLUMNS)
        for each in results:
            files, seconds = ";".join(each.files), f"{each.seconds:.1f}"
            write.writerow(
                [each.row.number, each.row.name, each.status, each.attempts, seconds, each.job,
                 files, each.error]
            )  # fmt: skip
