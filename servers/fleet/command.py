"""`python -m frugal.fleet`: start a fleet, and speak with one."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from ...kernels.errors import FrugalError
from ...kernels.report import megabytes
from . import batch, csv_jobs, token
from .client import FleetClient
from .job_request import JobRequest, order
from .scheduler import Limits

TOKEN = "FRUGAL_FLEET_TOKEN"
URL = "http://127.0.0.1:8190"
DAY = 86400.0


def parser() -> argparse.ArgumentParser:
    """The arguments of `python -m frugal.fleet`."""
    found = argparse.ArgumentParser(
        prog="python -m frugal.fleet",
        description="Many ComfyUI processes behind one address, on Ray Serve.",
    )
    parts = found.add_subparsers(dest="command", required=True)
    _serve(parts.add_parser("serve", help="start a fleet; Ctrl-C ends it, its store stays"))
    submit = parts.add_parser("submit", help="hand in a workflow, once or once per row of a table")
    submit.add_argument("workflow", type=Path, help="a workflow exported with Export (API)")
    submit.add_argument("--csv", type=Path, help="a row per job, a column per input (NODE.INPUT)")
    submit.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="COLUMN=NODE.INPUT",
        help="what a column means whose name does not say it; may be given more than once",
    )
    submit.add_argument(
        "--input", action="append", default=[], type=Path, help="a file the workflow reads"
    )
    submit.add_argument("--plan", type=Path, help="JSON of Memory Plan, to be held against a card")
    submit.add_argument("--out", type=Path, default=Path("fleet-results"), help="for the results")
    submit.add_argument("--at-once", type=int, default=16, help="jobs handed in at one time")
    submit.add_argument("--hours", type=float, default=12.0, help="patience with one job")
    submit.add_argument("--delete", action="store_true", help="forget a job there once fetched")
    status = parts.add_parser("status", help="one job, or the fleet and its newest jobs")
    status.add_argument("job", nargs="?")
    fetch = parts.add_parser("fetch", help="write an ended job's results to a folder")
    fetch.add_argument("job")
    fetch.add_argument("--out", type=Path, default=Path("fleet-results"))
    for name, what in (("cancel", "stop an open job"), ("delete", "forget an ended job")):
        parts.add_parser(name, help=what).add_argument("job")
    check = parts.add_parser("check", help="whether a store at rest is whole")
    check.add_argument("--store", type=Path, required=True)
    check.add_argument("--repair", action="store_true", help="put right what can be")
    for name in ("submit", "status", "fetch", "cancel", "delete"):
        client = parts.choices[name]
        client.add_argument("--url", default=URL, help="default: %(default)s")
        client.add_argument(
            "--token-env", default=TOKEN, metavar="NAME", help="variable with the fleet's token"
        )
        client.add_argument("--token-file", type=Path, help="or the file that `serve` wrote")
    return found


def _serve(serve: argparse.ArgumentParser) -> None:
    add: Callable[..., Any] = serve.add_argument
    add("--comfyui", type=Path, required=True, help="the ComfyUI folder that workers run")
    add("--python", default="", help="its interpreter (default: this one)")
    add("--comfy-arg", action="append", default=[], metavar="ARG",
        help="an argument for ComfyUI, as --comfy-arg=--lowvram; may be repeated")  # fmt: skip
    add("--store", type=Path, required=True, help="folder for jobs and results; outlives the fleet")
    add("--work", type=Path, help="folder for the workers' own files (default: STORE/work)")
    add("--workers", type=int, default=1, help="ComfyUI processes")
    add("--most-workers", type=int, default=0, help="grow up to that many while jobs wait")
    add("--gpus", type=float, default=1.0, help="cards per worker; 0: on the CPU")
    add("--cpus", type=float, default=1.0, help="CPU cores that Ray counts per worker")
    add("--host", default="127.0.0.1", help="address to answer at (default: %(default)s)")
    add("--port", type=int, default=8190)
    add("--cluster", default="", metavar="ADDRESS", help="a Ray cluster that is there already")
    add("--token-env", default="", metavar="NAME",
        help="variable with the clients' token (default: one is made, in STORE/token)")  # fmt: skip
    add("--queue", type=int, default=Limits.queue, help="jobs that may wait or run at once")
    add("--attempts", type=int, default=Limits.attempts,
        help="how often a job is begun when workers are lost")  # fmt: skip
    add("--job-seconds", type=float, default=Limits.job_seconds, help="time limit of one attempt")
    add("--keep-days", type=float, default=0.0, help="delete ended jobs after that; 0: never")
    add("--worker-gb", type=float, default=0.0,
        help="memory that plans are held against, in GB (default: the card's)")  # fmt: skip
    add("--largest-mb", type=float, default=256.0, help="largest request")


def main(arguments: Sequence[str] | None = None) -> int:
    """0 if all went well, 1 with a sentence on stderr if not, 130 if it was interrupted."""
    given = parser().parse_args(arguments)
    try:
        if given.command == "serve":
            return serve(given)
        if given.command == "check":
            return check(given.store, given.repair)
        return asyncio.run(_ask(given))
    except FrugalError as error:
        _complain(str(error))
        return 1
    except OSError as error:
        _complain(f"{error.filename or 'a file'}: {error.strerror}")
        return 1
    except KeyboardInterrupt:
        _complain("stopped; the same command resumes from here")
        return 130


def serve(given: argparse.Namespace) -> int:
    """Run a fleet until it is stopped; 0."""
    from .launch import Place, require, running, until_stopped

    require()
    from .app import Fleet

    fleet = Fleet(
        comfyui=str(given.comfyui.resolve()),
        python=given.python,
        comfy_arguments=tuple(given.comfy_arg),
        store=str(given.store.resolve()),
        work=str((given.work or given.store / "work").resolve()),
        workers=given.workers,
        most_workers=given.most_workers,
        gpus=given.gpus,
        cpus=given.cpus,
        largest_request=round(given.largest_mb * 1e6),
        queue=given.queue,
        attempts=given.attempts,
        job_seconds=given.job_seconds,
        keep_seconds=given.keep_days * DAY,
        memory=round(given.worker_gb * 1e9),
    )
    place = Place(given.host, given.port, given.cluster, given.token_env)
    with running(fleet, place, _say):
        until_stopped()
    return 0


def check(folder: Path, repair: bool) -> int:
    """Say whether a store is whole; 0 if it is, or was repaired."""
    from . import store_check

    found = store_check.check(folder, repair)
    for line in found:
        _say(line)
    _say("the store is whole" if not found else "repaired" if repair else "add --repair to repair")
    return 0 if repair or not found else 1


async def _ask(given: argparse.Namespace) -> int:
    secret = _token(given)
    async with FleetClient(given.url, secret) as client:
        if given.command == "submit":
            return await _submit(client, given)
        if given.command == "status":
            return await _status(client, given.job)
        if given.command == "fetch":
            job = await client.job(given.job)
            for path in await client.fetch(job, given.out):
                _say(str(path))
            return 0 if job["status"] == "completed" else 1
        if given.command == "cancel":
            job = await client.cancel(given.job)
            _say("cancelled" if job["cancelled"] else f"it had ended: {job['status']}")
            return 0
        await client.delete(given.job)
        return 0


def _token(given: argparse.Namespace) -> str:
    if given.token_file:
        return given.token_file.read_text("utf-8").strip()
    return token.from_environment(given.token_env) if given.token_env else ""


async def _submit(client: FleetClient, given: argparse.Namespace) -> int:
    workflow = given.workflow.read_bytes()
    named = dict(text.partition("=")[::2] for text in given.set)
    files = {path.name: path.read_bytes() for path in given.input}
    if given.csv:
        rows = csv_jobs.rows(given.csv, workflow, named)
    else:
        one = order(workflow, {})
        rows = [csv_jobs.Row(1, given.workflow.stem, one, "")]
    plan = given.plan.read_bytes() if given.plan else b""
    rows = [_joined(row, files) for row in rows]
    with Bar(len(rows)) as bar:
        results = await batch.send(
            client, rows, given.out, given.at_once, 3600 * given.hours, bar, given.delete, plan
        )
    bad = [each for each in results if each.status != "completed"]
    for each in bad:
        _complain(f"row {each.row.number} {each.status}: {each.error}")
    _say(f"{len(results) - len(bad)} of {len(results)} done; see {given.out / batch.TABLE}")
    return 1 if bad else 0


def _joined(row: csv_jobs.Row, files: dict[str, bytes]) -> csv_jobs.Row:
    whole = JobRequest(row.order.workflow, {**files, **row.order.files})
    return csv_jobs.Row(row.number, row.name, whole, f"sheet-{whole.digest()}")


async def _status(client: FleetClient, job: str | None) -> int:
    if job:
        _say(json.dumps(await client.job(job), indent=1))
        return 0
    fleet, jobs = await client.fleet(), await client.jobs()
    counts = ", ".join(f"{count} {status}" for status, count in fleet["jobs"].items())
    _say(
        f"{counts}; room for {fleet['rules']['queue']}; worker: {megabytes(fleet['worker_memory'])}"
    )
    for each in jobs:
        when = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(each["created"]))
        _say(f"{each['id']}  {when}  {each['status']:<9}  {each['error'][:100]}".rstrip())
    return 0


class Bar:
    """Progress on stderr: tqdm's bar where it is installed, else a line per job."""

    def __init__(self, total: int):
        self.total, self.done, self._bar = total, 0, None
        if sys.stderr.isatty():
            with contextlib.suppress(ModuleNotFoundError):
                from tqdm import tqdm

                self._bar = tqdm(total=total, unit="job", file=sys.stderr)

    def __enter__(self) -> Bar:
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.close()

    def __call__(self, result: batch.Result) -> None:
        self.done += 1
        if self._bar is not None:
            self._bar.update()
            return
        how = "was here already" if result.kept else result.status
        _complain(f"{self.done}/{self.total} {result.row.name} {how}")


def _say(text: str) -> None:
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


def _complain(text: str) -> None:
    sys.stderr.write(text + "\n")
    sys.stderr.flush()
