"""A real fleet as a person starts it: `python -m frugal.fleet serve` in a process of its own."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil

from frugal.demo.comfy_server import free_port
from frugal.tests.helpers.installed import installed
from frugal.tests.helpers.patience import HANG, until

EXTRA_NODES = Path(__file__).parent / "extra_nodes.py"


def comfy_arguments(base: Path) -> list[str]:
    """Arguments for a ComfyUI without web page whose custom nodes are those of the tests."""
    (base / "custom_nodes").mkdir(parents=True, exist_ok=True)
    shutil.copy(EXTRA_NODES, base / "custom_nodes")
    (base / "no-frontend").mkdir(exist_ok=True)
    return [
        "--base-directory", str(base), "--front-end-root", str(base / "no-frontend"),
        "--disable-api-nodes",
    ]  # fmt: skip


class FleetProcess:
    """One fleet below `folder`. It may be started again: the store stays."""

    def __init__(self, tree: Path, folder: Path, *words: str, workers: int = 2, tries: int = 3):
        self.folder, self.port, self.tries = folder, free_port(), tries
        self.url = f"http://127.0.0.1:{self.port}"
        self.log = folder / "fleet.log"
        self.site = folder / "site"
        if not self.site.is_dir():
            installed(self.site)
        self.command = [
            sys.executable, "-m", "frugal.fleet", "serve", "--comfyui", str(tree),
            "--store", str(folder / "store"), "--work", str(folder / "work"),
            "--workers", str(workers), "--gpus", "0", "--cpus", "0.1", "--port", str(self.port),
            *[f"--comfy-arg={word}" for word in comfy_arguments(folder / "base")], *words,
        ]  # fmt: skip
        self.process: subprocess.Popen[bytes] | None = None

    @property
    def token(self) -> str:
        return (self.folder / "store" / "token").read_text()

    def start(self) -> None:
        environment = {**os.environ, "PYTHONPATH": str(self.site), "OMP_NUM_THREADS": "1"}
        environment |= {"DO_NOT_TRACK": "1", "HF_HUB_OFFLINE": "1", "RAY_USAGE_STATS_ENABLED": "0"}
        # A machine that runs many tests is slow, and not dead.
        environment |= {
            "RAY_worker_register_timeout_seconds": "600",
            "RAY_health_check_timeout_ms": "120000",
            "RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S": "120",
            "RAY_SERVE_PROXY_HEALTH_CHECK_TIMEOUT_S": "120",
        }
        environment.pop("RAY_AUTH_MODE", None)
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                self.command, cwd=self.folder, env=environment, stdout=log, stderr=log
            )

    def said(self) -> str:
        return self.log.read_text("utf-8", "replace")

    def wait(self) -> None:
        """Until it says that it is up, for the first time."""
        self._until(lambda: "the fleet answers at" in self.said())

    def wait_for_http(self) -> None:
        """Until the scheduler answers; workers may still be starting."""

        def answers() -> bool:
            with contextlib.suppress(OSError):
                urllib.request.urlopen(f"{self.url}/health", timeout=10).read()
                return True
            return False

        self._until(answers)

    def _until(self, there: Callable[[], bool]) -> None:
        for left in reversed(range(self.tries)):
            until(lambda: there() or self.process.poll() is not None, self.told)
            if self.process.poll() is None:
                return
            # Ray has fixed limits for its own start that a machine full of tests cannot keep.
            if not left or "Ray did not start" not in self.said():
                break
            self.stop()
            self.log.unlink()
            self.start()
        raise AssertionError(self.told())

    def told(self) -> str:
        """The ends of its log and of its workers' logs."""
        logs = (p.read_text()[-1500:] for p in (self.folder / "work").glob("*.log"))
        return "\n".join([self.said()[-4000:], *logs])

    def processes(self) -> list[psutil.Process]:
        """All that it started and that still run."""
        found = []
        for each in psutil.process_iter():
            with contextlib.suppress(psutil.Error):
                if each.environ().get("PYTHONPATH", "").split(os.pathsep)[0] == str(self.site):
                    found.append(each)
        return found

    def comfys(self) -> list[psutil.Process]:
        """The ComfyUI processes of its workers: the fleet's own names that folder too."""
        inside = str(self.folder / "work") + os.sep
        return [p for p in self.processes() if any(word.startswith(inside) for word in _line(p))]

    def named(self, start: str) -> list[psutil.Process]:
        """Ray's processes by the name they give themselves."""
        return [p for p in self.processes() if " ".join(_line(p)).startswith(start)]

    def stop(self) -> list[str]:
        """As Ctrl-C does. What is left then is killed, and its names returned."""
        if self.process is not None and self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(HANG)
        _, left = psutil.wait_procs(self.processes(), HANG)
        names = [" ".join(_line(each))[:200] for each in left]
        for each in left:
            with contextlib.suppress(psutil.Error):
                each.kill()
        psutil.wait_procs(left, HANG)
        return names


def _line(process: psutil.Process) -> list[str]:
    with contextlib.suppress(psutil.Error):
        return process.cmdline()
    return []


@contextlib.contextmanager
def fleet_process(tree: Path, folder: Path, *words: str, **more) -> Iterator[FleetProcess]:
    """A started fleet; `wait` for it."""
    fleet = FleetProcess(tree, folder, *words, **more)
    fleet.start()
    try:
        yield fleet
    finally:
        fleet.stop()
