"""What the registry's own tools and a third party's checks say of the pack as it is published."""

from __future__ import annotations

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from frugal.tests.helpers.patience import HANG
from frugal.tests.helpers.tracked import tracked_or_skip

ROOT = Path(__file__).resolve().parent.parent
PUBLISHED = {
    ".comfyignore", "LICENSE", "README.md", "__init__.py", "kernels", "locales", "nodes",
    "pyproject.toml", "requirements.txt", "servers", "workflows",
}  # fmt: skip
MAY_BE_PUBLISHED = {"CHANGELOG.md", "docs"}
# Formats are fp16 and bf16 by definition there; no device is chosen.
PRECISION_BY_FORMAT = (
    "kernels/checkpoints/",
    "kernels/formats/",
    "kernels/lora/",
    "kernels/quantize/",
)


def comfy(folder: Path, *arguments: str) -> str:
    """Run comfy-cli's command in `folder`, telling nobody."""
    command = [sys.executable, "-m", "comfy_cli", "--skip-prompt", "--no-enable-telemetry"]
    env = {**os.environ, "HOME": str(folder.parent), "DO_NOT_TRACK": "1", "COLUMNS": "200"}
    done = subprocess.run(
        [*command, *arguments], cwd=folder, env=env, capture_output=True, text=True, timeout=HANG
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


@pytest.fixture(scope="module")
def checkout(tmp_path_factory):
    """A copy of what git follows, as a checkout of its own: packing writes into it."""
    pytest.importorskip("comfy_cli")
    copy = tmp_path_factory.mktemp("published") / "pack"
    for name in tracked_or_skip():
        (copy / name).parent.mkdir(parents=True, exist_ok=True)
        (copy / name).write_bytes((ROOT / name).read_bytes())
    for arguments in (["init", "-q"], ["add", "-A"]):
        subprocess.run(["git", *arguments], cwd=copy, check=True)
    return copy


@pytest.fixture(scope="module")
def archive(checkout):
    """The published archive, unpacked."""
    comfy(checkout, "node", "pack")
    folder = checkout.parent / "unpacked"
    with zipfile.ZipFile(checkout / "node.zip") as packed:
        packed.extractall(folder)
    return folder


def test_the_registry_takes_the_pack(checkout):
    assert "All validation checks passed" in comfy(checkout, "node", "validate")


def test_the_archive_holds_the_pack_and_nothing_else(archive):
    top = {path.name for path in archive.iterdir()}
    assert PUBLISHED <= top <= PUBLISHED | MAY_BE_PUBLISHED
    packed = {p.relative_to(archive).as_posix() for p in archive.rglob("*") if p.is_file()}
    for folder in ("nodes/", "kernels/", "servers/", "workflows/"):
        ours = {name for name in tracked_or_skip() if name.startswith(folder)}
        assert ours and {name for name in packed if name.startswith(folder)} == ours


def said(archive: Path, level: str) -> list[str]:
    """What one level of comfy-test says of the archive; raises what it raises."""
    pytest.importorskip("comfy_test")
    import importlib

    from comfy_test.common.config import TestConfig
    from comfy_test.orchestration.context import LevelContext

    lines: list[str] = []
    context = LevelContext(
        config=TestConfig(name="pack"),
        node_dir=archive,
        platform_name="lint",
        log=lambda line: lines.extend(str(line).splitlines()),
        output_base=archive.parent,
    )
    importlib.import_module(f"comfy_test.orchestration.levels.{level}").run(context)
    return lines


@pytest.mark.parametrize("level", ["syntax", "javascript"])
def test_lint(archive, level):
    said(archive, level)


def test_no_warning(archive):
    assert said(archive, "warnings")[-1] == "Warnings check: clean"


def test_no_hazard(archive):
    """Bands A to C are clean; in D only the files whose subject is the number format."""
    lines = said(archive, "hazards")
    assert "failed" not in " ".join(lines)
    bands = [line for line in lines if line.startswith("===")]
    assert all(band.startswith("=== D") for band in bands), "\n".join(lines)
    kinds = [line.split()[1] for line in lines if line.startswith("[hazards]")]
    assert kinds in ([], ["hardcoded-precision"]), "\n".join(lines)
    sites = [line.strip() for line in lines if line.startswith("    ")]
    assert all(site.startswith(PRECISION_BY_FORMAT) for site in sites), "\n".join(sites)


def test_a_planted_hazard_is_found(archive, tmp_path):
    """The checks above would mean nothing if these passed too."""
    (tmp_path / "nodes").mkdir()
    (tmp_path / "stray.py").write_text("import sys\nsys.path.append('x')\n")
    (tmp_path / "nodes" / "bad.py").write_text(
        "import torch\nNAME = torch.cuda.get_device_name(0)\n"
    )
    assert said(tmp_path, "warnings")[-1] != "Warnings check: clean"
    assert any(line.startswith("=== A") for line in said(tmp_path, "hazards"))
