"""A worker's own folders: what a graph reads and writes, gone when the worker is gone."""

from __future__ import annotations

import contextlib
import shutil
import uuid
from collections.abc import Iterator, Mapping
from pathlib import Path

# ComfyUI's folder kinds; models and custom nodes are not among them.
FOLDERS = ("input", "output", "temp", "user")
PIECE = 4 * 10**6


class WorkerDir:
    """Made under `base`, beside those of other workers; what dead workers left there is removed."""

    def __init__(self, base: Path):
        from filelock import FileLock

        base.mkdir(parents=True, exist_ok=True)
        _sweep(base)
        self.name = f"worker-{uuid.uuid4().hex[:8]}"
        self.folder, self.log = base / self.name, base / f"{self.name}.log"
        # Held as long as this process lives, however that ends.
        self._lock = FileLock(base / f"{self.name}.lock")
        self._lock.acquire(timeout=0)
        for name in FOLDERS:
            (self.folder / name).mkdir(parents=True)

    def arguments(self) -> list[str]:
        """ComfyUI's options that lead it here."""
        found = []
        for name in FOLDERS:
            # It puts a folder `temp` into the one that it is given for that.
            place = self.folder if name == "temp" else self.folder / name
            found += [f"--{name}-directory", str(place)]
        return found

    def lay(self, files: Mapping[str, bytes]) -> None:
        """An empty folder with these inputs."""
        self.clear()
        for name, data in files.items():
            (self.folder / "input" / name).write_bytes(data)

    def results(self) -> Iterator[tuple[str, bytes]]:
        """What lies in the output folder, by name, in pieces; each file has one at least."""
        output = self.folder / "output"
        for path in sorted(output.rglob("*")):
            if path.is_file() and not path.is_symlink():
                name = path.relative_to(output).as_posix()
                with path.open("rb") as file:
                    data = file.read(PIECE)
                    while True:
                        yield name, data
                        if not (data := file.read(PIECE)):
                            break

    def clear(self) -> None:
        """No inputs, no results."""
        for name in ("input", "output", "temp"):
            (self.folder / name).mkdir(exist_ok=True)
            for each in (self.folder / name).iterdir():
                if each.is_dir() and not each.is_symlink():
                    shutil.rmtree(each, ignore_errors=True)
                else:
                    each.unlink(missing_ok=True)

    def remove(self) -> None:
        """Everything but the log."""
        shutil.rmtree(self.folder, ignore_errors=True)
        self._lock.release()


def _sweep(base: Path) -> None:
    from filelock import FileLock, Timeout

    for path in base.glob("worker-*.lock"):
        lock = FileLock(path)
        with contextlib.suppress(Timeout, OSError), lock.acquire(timeout=0):
            shutil.rmtree(path.with_suffix(""), ignore_errors=True)
            path.unlink(missing_ok=True)
