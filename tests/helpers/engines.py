"""Real servers for the remote nodes: vLLM-Omni and vLLM on a CPU, with models of random weights.

They live in an environment of their own (docs/engines.md says how to make it); FRUGAL_VLLM_OMNI
names its Python. Nothing here imports them.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from frugal.demo import comfy_server
from frugal.demo.comfy_server import ComfyServer, free_port
from frugal.dev import CACHE
from frugal.tests.helpers.patience import HANG

PYTHON = os.environ.get("FRUGAL_VLLM_OMNI", "")
RESULTS = os.environ.get("FRUGAL_ENGINE_RESULTS", "")
# Where models are kept from run to run; else they are made again.
MODELS = os.environ.get("FRUGAL_ENGINE_MODELS", "")
NEEDED = "real servers: set FRUGAL_VLLM_OMNI to the Python of an environment with vLLM-Omni"
PLATFORM = Path(__file__).resolve().parents[1] / "omni_cpu"
BOOT_SECONDS = 1500
KEY_VARIABLE, KEY = "FRUGAL_TEST_KEY", "a-key-for-loopback"
RECORDING = threading.Lock()
VLLM = "0.30.0+cpu"
# Every ComfyUI found, oldest first.
TREES = sorted(path.parent for path in CACHE.glob("*/main.py"))


def record(name: str, **facts: Any) -> None:
    """Keep what a test saw, for the file that FRUGAL_ENGINE_RESULTS names."""
    if RESULTS:
        path = Path(RESULTS)
        with RECORDING:
            held = json.loads(path.read_text()) if path.exists() else {}
            path.write_text(json.dumps(held | {name: facts}, indent=1) + "\n")


def shim(folder: Path) -> str:
    """PYTHONPATH for the servers: vLLM's CPU build under the name that vLLM looks itself up by, and
    the platform that vLLM-Omni lacks.
    """
    packages = {
        f"vllm-{VLLM}": ("vllm", VLLM, ""),
        "frugal_omni_cpu-1": (
            "frugal-omni-cpu",
            "1",
            "[vllm_omni.platform_plugins]\ncpu = frugal_omni_plugin:platform\n",
        ),
    }
    for name, (title, version, entry) in packages.items():
        place = folder / f"{name}.dist-info"
        place.mkdir(parents=True, exist_ok=True)
        about = f"Metadata-Version: 2.1\nName: {title}\nVersion: {version}\n"
        (place / "METADATA").write_text(about)
        (place / "entry_points.txt").write_text(entry)
    return os.pathsep.join((str(folder), str(PLATFORM)))


def environment(folder: Path, ranks: int = 1) -> dict[str, str]:
    quiet = {"HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1", "DO_NOT_TRACK": "1"}
    small = {"OMP_NUM_THREADS": "1", "VLLM_HOST_IP": "127.0.0.1", "VLLM_CPU_KVCACHE_SPACE": "1"}
    paths = {"PYTHONPATH": shim(folder / "shim"), "FRUGAL_OMNI_RANKS": str(ranks)}
    return {**os.environ, **quiet, **small, **paths}


def inside(folder: Path, *command: str) -> str:
    """What a command of the servers' Python prints."""
    done = subprocess.run(
        [PYTHON, "-P", *command], env=environment(folder), capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


class Engine:
    """A server process; a context manager. `log`: its output. `seconds`: what its start took."""

    def __init__(self, folder: Path, name: str, command: list[str], ranks: int = 1):
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}/v1"
        self.log = folder / f"{name}.log"
        self._command = [*command, "--host", "127.0.0.1", "--port", str(self.port)]
        self._environment = environment(folder, ranks)
        self._process: subprocess.Popen | None = None
        self._up, self._stopped = threading.Event(), False
        self.seconds = 0.0

    def start(self) -> None:
        """Start the process and wait until it answers."""
        began = time.monotonic()
        with self.log.open("wb") as log:
            # A session of its own, since it has children that must end with it.
            self._process = subprocess.Popen(
                [PYTHON, "-P", *self._command],
                cwd=self.log.parent, env=self._environment, start_new_session=True,
                stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT,
            )  # fmt: skip
        try:
            while not self._healthy():
                assert not self._stopped and self._process.poll() is None, self.text()[-4000:]
                assert time.monotonic() - began < BOOT_SECONDS, self.text()[-4000:]
                time.sleep(1)
        except BaseException:
            self.kill()
            raise
        self.seconds = time.monotonic() - began
        self._up.set()

    def ready(self) -> Engine:
        """The server, once another thread has started it."""
        end = time.monotonic() + 3 * BOOT_SECONDS
        while not self._up.wait(1):
            assert not self._stopped and time.monotonic() < end, self.text()[-4000:]
        return self

    def __enter__(self) -> Engine:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()

    def _healthy(self) -> bool:
        with contextlib.suppress(OSError):
            urllib.request.urlopen(f"http://127.0.0.1:{self.port}/health", timeout=5).read()
            return True
        return False

    def kill(self) -> None:
        """End the process and its children at once, as a crash does."""
        self._stopped = True
        process, self._process = self._process, None
        if process is not None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()

    def text(self) -> str:
        return self.log.read_text(errors="replace") if self.log.exists() else ""

    def get(self, path: str) -> tuple[int, Any]:
        """Status and JSON of a GET with the key."""
        request = urllib.request.Request(
            self.url + path, headers={"Authorization": f"Bearer {KEY}"}
        )
        try:
            with urllib.request.urlopen(request, timeout=HANG) as answer:
                return answer.status, json.loads(answer.read())
        except urllib.error.HTTPError as error:
            return error.code, None


@contextlib.contextmanager
def one_by_one(engines: dict[str, Engine]) -> Iterator[dict[str, Engine]]:
    """Start servers in a thread, each when the one before is up: see Engine.ready."""

    def chain() -> None:
        for name, engine in engines.items():
            try:
                engine.start()
                record(f"start of {name}", seconds=round(engine.seconds, 1))
            except (AssertionError, OSError):
                # The test that wants it tells; the others have theirs.
                engine.kill()

    thread = threading.Thread(target=chain)
    thread.start()
    try:
        yield engines
    finally:
        for engine in engines.values():
            engine.kill()
        thread.join()


def omni(folder: Path, model: Path, name: str, *arguments: str, ranks: int = 1) -> Engine:
    """vLLM-Omni with a diffusers folder, which it calls `name`."""
    command = ["-m", "vllm_omni.entrypoints.cli.main", "serve", str(model), "--omni"]
    command += ["--served-model-name", name, "--enforce-eager", "--api-key", KEY]
    return Engine(folder, name, [*command, *arguments], ranks)


@contextlib.contextmanager
def comfy(tree: Path, folder: Path) -> Iterator[ComfyServer]:
    """A real ComfyUI that knows the servers' key by KEY_VARIABLE."""
    os.environ[KEY_VARIABLE] = KEY
    # The machine has the servers to carry besides.
    comfy_server.BOOT_SECONDS = BOOT_SECONDS
    try:
        with ComfyServer(tree, folder / tree.name) as running:
            yield running
    finally:
        del os.environ[KEY_VARIABLE]


def vllm_chat(folder: Path, model: Path, name: str) -> Engine:
    """vLLM with a language model folder, which it calls `name`."""
    command = ["-m", "vllm.entrypoints.openai.api_server", "--model", str(model)]
    command += ["--served-model-name", name, "--enforce-eager", "--api-key", KEY]
    return Engine(folder, name, [*command, "--max-model-len", "2048", "--max-num-seqs", "8"])


def video_graph(servers: str, **more: Any) -> dict[str, Any]:
    """A small video from these addresses, saved as pictures too."""
    widgets = {
        "servers": servers,
        "dialect": "vLLM-Omni",
        "prompt": "a cat walks through fresh snow",
        "negative_prompt": "blurry",
        "model": "",
        "width": 64,
        "height": 64,
        "frames": 5,
        "fps": 16,
        "steps": 2,
        "guidance": 5.0,
        "flow_shift": 3.0,
        "seed": 7,
        "timeout_minutes": 10.0,
        "filename_prefix": "video/remote",
        "key_variable": KEY_VARIABLE,
    }
    node = {"class_type": "FrugalRemoteVideo", "inputs": {**widgets, **more}}
    shown = {"class_type": "PreviewAny", "inputs": {"source": ["1", 2]}}
    saved = {"class_type": "SaveImage", "inputs": {"images": ["1", 0], "filename_prefix": "far"}}
    return {"1": node, "2": saved, "3": shown}
