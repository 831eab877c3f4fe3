"""Makes `.venv-card`, an environment with the torch that the simulated card is written for.

It has a torch of its own and takes everything else from the environment it is made by, so it is
small and quick to make. Standard library only.
"""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import sysconfig
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
VENV = ROOT / ".venv-card"
REQUIREMENTS = HERE / "requirements.txt"
STAMP = VENV / "frugal-stamp"
SHARED = "frugal-shared.pth"


def python() -> Path:
    return VENV / ("Scripts/python.exe" if os.name == "nt" else "bin/python")


def main() -> int:
    """Prints its Python and returns 0, or why there is none."""
    reason = ready()
    print(reason or python())
    return 1 if reason else 0


def ready() -> str | None:
    """Make it or bring it up to date; returns in one line why the card cannot be had, or None."""
    if sys.platform != "linux":
        return "the simulated card is written for Linux"
    return make() or obstacle()


def make() -> str | None:
    wanted = hashlib.sha256(REQUIREMENTS.read_bytes() + sys.version.encode()).hexdigest()
    if python().exists() and STAMP.exists() and STAMP.read_text() == wanted:
        return None
    if not python().exists():
        # Its packages come from the pip of this environment, so it needs none of its own.
        run(sys.executable, "-m", "venv", "--without-pip", str(VENV))
    quiet = ("--disable-pip-version-check", "--no-cache-dir", "-q", "--progress-bar", "off")
    pip = (sys.executable, "-m", "pip", "--python", str(python()), "install", *quiet)
    done = run(*pip, "-r", str(REQUIREMENTS))
    if done.returncode:
        torch = REQUIREMENTS.read_text().splitlines()[-1]
        return (
            f"no {torch} to be had here: {(done.stderr.strip() or 'pip failed').splitlines()[-1]}"
        )
    share()
    STAMP.write_text(wanted)
    return None


def share() -> None:
    """Let it find the packages of this environment behind its own, unless it has all it needs."""
    if run(str(python()), "-c", "import comfy_kitchen, pytest").returncode == 0:
        return
    own = run(str(python()), "-c", "import sysconfig; print(sysconfig.get_path('purelib'))")
    (Path(own.stdout.strip()) / SHARED).write_text(f"{sysconfig.get_path('purelib')}\n")


def obstacle() -> str | None:
    """What the device's own check says, in that environment."""
    code = f"import sys; sys.path.insert(0, {str(HERE / 'simulated_cuda')!r})\n"
    code += "import native; print(native.obstacle() or '')"
    done = run(str(python()), "-c", code)
    return done.stdout.strip() or (done.stderr.strip().splitlines() or [None])[-1]


def run(*command: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL)


if __name__ == "__main__":
    sys.exit(main())
