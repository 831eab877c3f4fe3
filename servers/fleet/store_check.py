"""`python -m frugal.fleet check`: whether a store is whole, and its repair."""

from __future__ import annotations

import contextlib
import os
import sqlite3
import time
from pathlib import Path

from ...kernels.errors import FrugalError
from .store import COMPLETED, FAILED, INDEX, OUTPUT, Store

GONE = "its result is gone from the disk"


def check(folder: Path, repair: bool) -> list[str]:
    """What is wrong with the store, a line each; with `repair` it is put right.

    A damaged index is renamed and built anew from the results on disk, which costs the orders that
    were waiting. Results that are gone make their job a failed one. Raises FrugalError where a
    fleet uses the store.
    """
    found = []
    if not (folder / INDEX).is_file():
        raise FrugalError(f"no {INDEX} in {folder}", "a store", "name the folder of --store")
    if damage := _damage(folder / INDEX):
        found.append(f"the index is damaged ({damage})")
        if not repair:
            return found
        aside = folder / f"{INDEX}.damaged-{int(time.time())}"
        os.replace(folder / INDEX, aside)
        for suffix in ("-wal", "-shm"):
            with contextlib.suppress(FileNotFoundError):
                os.replace(folder / f"{INDEX}{suffix}", folder / f"{aside.name}{suffix}")
        found.append(f"it is {aside.name} now; results on disk were taken back")
    store = Store(folder, patience=0)
    try:
        return found + _results(store, repair)
    finally:
        store.close()


def _damage(index: Path) -> str:
    base = sqlite3.connect(index, timeout=0)
    try:
        said = [row[0] for row in base.execute("PRAGMA integrity_check(3)")]
        return "" if said == ["ok"] else "; ".join(said)
    except sqlite3.OperationalError as error:
        if "locked" in str(error):
            raise FrugalError(
                f"a fleet uses {index.parent}", "a store at rest", "stop the fleet first"
            ) from None
        return str(error)
    except sqlite3.DatabaseError as error:
        return str(error)
    finally:
        base.close()


def _results(store: Store, repair: bool) -> list[str]:
    found = []
    for job in store.list(COMPLETED, -1):
        output = store.jobs / job.id / OUTPUT
        for file in job.files:
            path = output / file["name"]
            size = path.stat().st_size if path.is_file() else None
            if size == file["bytes"]:
                continue
            now = "is gone" if size is None else f"has {size} bytes"
            found.append(f"job {job.id}: {file['name']!a} {now}; expected {file['bytes']} bytes")
            if repair:
                store.spoil(job.id, GONE, FAILED)
                break
    return found
