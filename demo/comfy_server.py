"""A real ComfyUI server for the demo and the tests: boot, run graphs, read results, stop.

    with ComfyServer(tree, base_dir) as server:
        result = server.run(server.convert(graph))

The server runs from the given ComfyUI folder, which is left as it is: models, inputs, outputs and
the link to this pack live in `base_dir`. All traffic is loopback; nothing here imports ComfyUI or
torch.
"""

from __future__ import annotations

import ast
import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path

from .comfy_client import ComfyClient, Result, ServerError

__all__ = ["PACK", "ComfyServer", "Result", "ServerError", "link_folder", "pack_node_ids"]

PACK = Path(__file__).resolve().parent.parent
LINK_NAME = "ComfyUI-Frugal"
BOOT_SECONDS = 600


class ComfyServer(ComfyClient):
    """One server process, from `__enter__` to `stop`.

    tree: ComfyUI folder. base_dir: folder for models, input, output, temp, user, custom_nodes (made
    if absent). models: further folders whose sub-folders are named after ComfyUI's folder kinds
    (vae, diffusion_models, ...). arguments: further command line arguments. cpu: force the CPU.
    frontend: serve the installed web page instead of an empty folder. linked: put this checkout
    into custom_nodes and insist on all its nodes; without it the folder is taken as it is. Raises
    ServerError when the server does not come up or a pack failed to import.
    """

    def __init__(
        self,
        tree: Path | str,
        base_dir: Path | str,
        *,
        models: tuple[Path | str, ...] = (),
        arguments: tuple[str, ...] = (),
        cpu: bool = True,
        frontend: bool = False,
        linked: bool = True,
    ):
        super().__init__("")
        self.tree, self.base = Path(tree).resolve(), Path(base_dir).resolve()
        if not (self.tree / "main.py").is_file():
            raise ServerError(f"{self.tree} holds no main.py; name a ComfyUI folder.")
        self.model_folders = tuple(Path(folder).resolve() for folder in models)
        self.arguments, self.cpu, self.frontend = arguments, cpu, frontend
        self.linked = linked
        self.log = self.base / "server.log"
        self.process: subprocess.Popen[bytes] | None = None
        self._highest_rss = 0

    @property
    def models(self) -> Path:
        return self.base / "models"

    @property
    def output(self) -> Path:
        return self.base / "output"

    def __enter__(self) -> ComfyServer:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    # Life of the process

    def start(self) -> None:
        for name in ("models", "input", "output", "temp", "user", "custom_nodes", "no-frontend"):
            (self.base / name).mkdir(parents=True, exist_ok=True)
        if self.linked:
            link_folder(PACK, self.base / "custom_nodes" / LINK_NAME)
        # Asked for again on every start: the old one may be taken by now.
        port = free_port()
        self.url = f"http://127.0.0.1:{port}"
        environment = {**os.environ, "OMP_WAIT_POLICY": "PASSIVE", "PYTHONIOENCODING": "utf-8"}
        environment |= {"DO_NOT_TRACK": "1", "HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1"}
        # ComfyUI finds its own modules through the script's folder.
        environment.pop("PYTHONSAFEPATH", None)
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                self._command(port),
                cwd=self.tree,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
            )
        try:
            self._wait_until_up()
            self._check_pack()
        except BaseException:
            self.stop()
            raise

    def _command(self, port: int) -> list[str]:
        command = [sys.executable, "-u", "main.py", "--port", str(port)]
        command += ["--listen", "127.0.0.1", "--disable-auto-launch"]
        command += ["--base-directory", str(self.base), "--database-url", "sqlite:///:memory:"]
        known = (self.tree / "comfy" / "cli_args.py").read_text(encoding="utf-8")
        if "--disable-api-nodes" in known:
            command.append("--disable-api-nodes")
        if self.cpu:
            command.append("--cpu")
        if not self.frontend:
            command += ["--front-end-root", str(self.base / "no-frontend")]
        if self.model_folders:
            # JSON is YAML, so no YAML writer is needed.
            paths = self.base / "model-paths.yaml"
            paths.write_text(json.dumps(self._model_paths(), indent=1), encoding="utf-8")
            command += ["--extra-model-paths-config", str(paths)]
        return command + list(self.arguments)

    def _model_paths(self) -> dict[str, dict[str, str]]:
        blocks = {}
        for number, folder in enumerate(self.model_folders):
            if not folder.is_dir():
                raise ServerError(f"{folder} is no folder; name one that holds vae, loras, ...")
            kinds = [kind for kind in sorted(folder.iterdir()) if kind.is_dir()]
            blocks[f"models{number}"] = {
                kind.name: str(kind) for kind in kinds if kind.name != "custom_nodes"
            }
        return blocks

    def _wait_until_up(self) -> None:
        end = time.monotonic() + BOOT_SECONDS
        while time.monotonic() < end:
            self._assert_alive()
            try:
                self._get("/system_stats", timeout=5)
                return
            except (OSError, ValueError):
                time.sleep(0.2)
        raise ServerError(f"ComfyUI did not answer within {BOOT_SECONDS} s.\n{self.log_tail()}")

    def _check_pack(self) -> None:
        failed = [line for line in self.log_text().splitlines() if "(IMPORT FAILED)" in line]
        if failed:
            raise ServerError("\n".join(["The pack failed to import.", *failed, self.log_tail(60)]))
        missing = sorted(pack_node_ids() - set(self.object_info())) if self.linked else []
        if missing:
            said = [line for line in self.log_text().splitlines() if "[Frugal]" in line]
            raise ServerError("\n".join([f"Missing nodes: {', '.join(missing)}.", *said]))

    def check(self) -> None:
        """Raise ServerError when the process has ended; takes a reading of its memory."""
        self.rss_bytes()

    def _assert_alive(self) -> None:
        if self.process is None:
            raise ServerError("The server is not running; call start() first.")
        code = self.process.poll()
        if code is not None:
            needs = f"{sys.executable} -m pip install -r {self.tree / 'requirements.txt'}"
            raise ServerError(
                f"ComfyUI ended with status {code}.\n{self.log_tail()}\n"
                f"If a module is missing above, this installs what that ComfyUI asks for: {needs}"
            )

    def stop(self) -> None:
        """End the process by its id; does nothing when it has ended already."""
        process, self.process = self.process, None
        if process is None or process.poll() is not None:
            return
        process.terminate()
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()

    def log_text(self) -> str:
        return self.log.read_text(encoding="utf-8", errors="replace") if self.log.exists() else ""

    def log_tail(self, lines: int = 30) -> str:
        return "\n".join([f"Last lines of {self.log}:", *self.log_text().splitlines()[-lines:]])

    def rss_bytes(self) -> int:
        """Resident memory of the server process in bytes."""
        import psutil

        self._assert_alive()
        try:
            now = psutil.Process(self.process.pid).memory_info().rss
        except psutil.NoSuchProcess:
            self.process.wait()
            self._assert_alive()
            raise
        self._highest_rss = max(self._highest_rss, now)
        return now

    def peak_rss(self) -> int:
        """Highest resident memory since boot in bytes.

        The system's own count on Linux and Windows, elsewhere the highest value seen during runs.
        """
        import psutil

        now = self.rss_bytes()
        status = Path(f"/proc/{self.process.pid}/status")
        if status.exists():
            for line in status.read_text().splitlines():
                if line.startswith("VmHWM:"):
                    return max(int(line.split()[1]) * 1024, self._highest_rss)
        peak = getattr(psutil.Process(self.process.pid).memory_info(), "peak_wset", 0)
        return max(peak, now, self._highest_rss)


def free_port() -> int:
    """A loopback port nobody listens on at this moment."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def link_folder(target: Path, link: Path) -> None:
    """Make `link` lead to the folder `target`: a symbolic link, on Windows a junction."""
    if link.exists() or link.is_symlink():
        if link.exists() and link.samefile(target):
            return
        raise ServerError(f"{link} exists and is not a link to {target}; move it away.")
    if os.name == "nt":
        import _winapi

        _winapi.CreateJunction(str(target), str(link))
    else:
        link.symlink_to(target, target_is_directory=True)


def pack_node_ids(pack: Path = PACK) -> set[str]:
    """The literal node ids of the pack's schemas, read from the source as ComfyUI-Manager does."""
    found = set()
    for source in sorted((pack / "nodes").rglob("*.py")):
        for call in ast.walk(ast.parse(source.read_text(encoding="utf-8"))):
            if isinstance(call, ast.Call) and ast.unparse(call.func).split(".")[-1] == "Schema":
                for keyword in call.keywords:
                    if keyword.arg == "node_id" and isinstance(keyword.value, ast.Constant):
                        found.add(keyword.value.value)
    return found
