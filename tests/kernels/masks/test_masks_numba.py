"""The life of the jitted kernels: no Numba, no cache folder, a moved pack, many threads."""

from __future__ import annotations

import importlib
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from scipy import ndimage

from frugal.kernels.masks import _jit, dispatch
from frugal.kernels.masks.agnostic import AgnosticSettings, agnostic_mask
from frugal.kernels.masks.pictures import composite, crop, uncrop, window
from frugal.kernels.masks.refine import RefineSettings, hull, refine
from frugal.tests.helpers.patience import HANG

ROOT = Path(__file__).resolve().parents[3]
CHOSEN = dict(fill_holes=30, drop_islands=5, grow=4, feather=6.0, feather_mode="ramp_center")
# A threshold alone, where what is compiled is compiled for one test.
SMALLEST: dict = {}
# ComfyUI names a pack's module by its full path, which is what goes stale in a cache.
PRELUDE = """
import importlib, importlib.util, sys
import numpy as np
root = sys.argv[1]
name = root.replace(".", "_x_")
spec = importlib.util.spec_from_file_location(
    name, root + "/__init__.py", submodule_search_locations=[root])
sys.modules[name] = importlib.util.module_from_spec(spec)
"""
REFINE = """
masks = importlib.import_module(".kernels.masks.refine", name)
mask = np.load(sys.argv[2])
np.save(sys.argv[3], masks.refine(mask, masks.RefineSettings(**{settings})))
dispatch = importlib.import_module(".kernels.masks.dispatch", name)
print(dispatch.backend())
"""


def picture() -> np.ndarray:
    return np.random.default_rng(5).random((2, 70, 90), np.float32)


def fresh(tmp_path: Path, pack: Path, before: str = "", settings=CHOSEN, **variables: str):
    """Refine `picture()` in a new process that loads the pack from `pack`; result, backend, log."""
    np.save(tmp_path / "in.npy", picture())
    code = before + PRELUDE + REFINE.replace("{settings}", repr(settings))
    done = subprocess.run(
        [
            sys.executable,
            "-c",
            code,
            str(pack),
            str(tmp_path / "in.npy"),
            str(tmp_path / "out.npy"),
        ],
        capture_output=True,
        text=True,
        env=os.environ | variables,
        cwd=tmp_path,
        timeout=HANG,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return np.load(tmp_path / "out.npy"), done.stdout.strip(), done.stderr


def expected(settings=CHOSEN) -> np.ndarray:
    return dispatch.run_chain(picture(), RefineSettings(**settings), use_numba=False)


def copy_pack(target: Path) -> Path:
    shutil.copytree(ROOT / "kernels", target / "kernels", ignore=shutil.ignore_patterns("__py*"))
    shutil.copy(ROOT / "__init__.py", target)
    return target


def test_the_public_module_does_not_import_numba(tmp_path):
    code = PRELUDE + (
        "importlib.import_module('.kernels.masks.refine', name)\n"
        "importlib.import_module('.kernels.masks._jit', name)\n"
        "assert 'numba' not in sys.modules and 'llvmlite' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", code, str(ROOT)], check=True, cwd=tmp_path)


def test_without_numba_the_reference_runs_and_the_log_says_so(tmp_path):
    block = "import sys\nsys.modules['numba'] = None\n"
    result, backend, log = fresh(tmp_path, ROOT, block)
    assert backend == "scipy"
    assert log.count("[Frugal] mask nodes run on SciPy") == 1
    assert np.array_equal(result, expected())


def test_a_numba_that_dies_at_import_costs_speed_only(tmp_path):
    (tmp_path / "numba.py").write_text("raise SystemError('built for another NumPy')")
    result, backend, log = fresh(tmp_path, ROOT, PYTHONPATH=str(tmp_path))
    assert backend == "scipy"
    assert "built for another NumPy" in log
    assert np.array_equal(result, expected())


def test_a_moved_pack_finds_its_kernels(tmp_path):
    """A cache keyed by module name alone would now look for the old path, and fail."""
    cache = tmp_path / "cache"
    first = copy_pack(tmp_path / "one" / "pack.git")
    result, backend, _ = fresh(tmp_path, first, settings=SMALLEST, FRUGAL_CACHE_DIR=str(cache))
    assert backend == "numba"
    assert np.array_equal(result, expected(SMALLEST))
    files = {p: p.stat().st_mtime_ns for p in cache.rglob("*.nb?")}
    assert files, "nothing was cached, so this test would prove nothing"
    fresh(tmp_path, first, settings=SMALLEST, FRUGAL_CACHE_DIR=str(cache))
    assert {p: p.stat().st_mtime_ns for p in cache.rglob("*.nb?")} == files, "compiled again"
    second = shutil.move(first, tmp_path / "two")
    result, backend, _ = fresh(tmp_path, second, settings=SMALLEST, FRUGAL_CACHE_DIR=str(cache))
    assert backend == "numba"
    assert np.array_equal(result, expected(SMALLEST))


def test_no_writable_cache_folder_costs_the_cache_only(tmp_path):
    blocked = tmp_path / "file"
    blocked.write_text("not a folder")
    variables = {"FRUGAL_CACHE_DIR": str(blocked / "cache")}
    result, backend, _ = fresh(tmp_path, ROOT, settings=SMALLEST, **variables)
    assert backend == "numba"
    assert np.array_equal(result, expected(SMALLEST))
    assert blocked.read_text() == "not a folder"


@pytest.mark.parametrize(("kind", "kept"), [("*.nbi", 0.5), ("*.nbc", 0.0), ("*.nbc", 0.97)])
def test_damaged_files_of_the_cache_are_made_anew(tmp_path, kind, kept):
    cache = tmp_path / "cache"
    made, _, _ = fresh(tmp_path, ROOT, settings=SMALLEST, FRUGAL_CACHE_DIR=str(cache))
    files = {path: path.read_bytes() for path in cache.rglob(kind)}
    assert files, "nothing was cached, so this test would prove nothing"
    for path, content in files.items():
        path.write_bytes(content[: int(len(content) * kept)])
    result, backend, log = fresh(tmp_path, ROOT, settings=SMALLEST, FRUGAL_CACHE_DIR=str(cache))
    assert backend == "numba" and np.array_equal(result, made)
    assert "a compiled kernel on disk is damaged" in log
    _, _, log = fresh(tmp_path, ROOT, settings=SMALLEST, FRUGAL_CACHE_DIR=str(cache))
    assert "damaged" not in log


def test_a_full_cache_disk_costs_the_cache_only(tmp_path):
    full = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (53_000, 53_000))\n"
    cache = tmp_path / "cache"
    result, backend, log = fresh(
        tmp_path, ROOT, before=full, settings=SMALLEST, FRUGAL_CACHE_DIR=str(cache)
    )
    assert backend == "numba" and result is not None
    assert "was not kept on disk" in log


def test_an_edited_source_gets_another_cache_folder(tmp_path, monkeypatch):
    monkeypatch.setenv(_jit.CACHE_VARIABLE, str(tmp_path / "cache"))
    source = tmp_path / "kernel.py"

    def folder(module: str, text: str) -> str | None:
        source.write_text(text)
        _jit._source_digest.cache_clear()
        return _jit.cache_folder.__wrapped__(module, str(source))

    before = folder("a.kernel", "x = 1")
    assert before is not None
    assert before.startswith(str(tmp_path / "cache"))
    assert folder("a.kernel", "x = 1") == before
    assert folder("a.kernel", "x = 2") != before
    assert folder("b.kernel", "x = 1") != before


def test_numbas_own_settings_are_left_alone():
    numba = pytest.importorskip("numba")
    before = numba.core.config.CACHE_DIR
    _jit.njit(lambda x: x + 1)
    assert before == numba.core.config.CACHE_DIR


@pytest.mark.parametrize("height", [1, 63, 64, 65, 130])
@pytest.mark.parametrize("grow", [0, 3, -3, 70, -70])
def test_bits_past_the_picture_stay_clear(height, grow):
    """The other kernels count and measure on whole words and rely on it."""
    chain, bits = dispatch.numba_chain(), importlib.import_module("frugal.kernels.masks.bits")
    mask = np.random.default_rng(0).random((height, 40), np.float32)
    words = np.empty((-(-height // 64), 40), np.uint64)
    bits.pack(mask, np.float32(0.5), words, np.empty(40, np.uint8), 0, len(words))
    plan, scratch = chain.Plan.of(RefineSettings(grow=grow)), chain.Scratch()
    if grow:
        chain._grow(words, height, plan, scratch, 1, lambda tasks: [t(scratch) for t in tasks])
    past = np.unpackbits(words.T.copy().view(np.uint8), axis=1, bitorder="little")[:, height:]
    assert not past.any()


def operations() -> list[Callable[[], np.ndarray]]:
    """One call of every kind, each on its own inputs and on two threads of its own."""
    rng = np.random.default_rng(1)
    clip = ndimage.gaussian_filter(rng.random((3, 200, 150), np.float32), (0, 5, 5))
    clip = (clip - clip.min()) / np.float32(np.ptp(clip))
    kinds = [
        CHOSEN,
        dict(grow=-3, feather=9.0, feather_mode="gaussian", temporal="ema"),
        dict(threshold=0.0, grow=2, feather=3.0, feather_mode="gaussian"),
        dict(fill_holes=-1, keep_largest=2, feather=30.0),
    ]
    below, above = rng.random((2, 3, 200, 150, 3), np.float32)
    maps = rng.integers(0, 18, (3, 3, 50, 40), np.uint8).repeat(4, 2).repeat(4, 3)
    where = window((clip > 0.95).astype(np.float32), context=1.1, smoothing=2.0)
    return [
        *(partial(refine, clip, RefineSettings(**kind), threads=2) for kind in kinds),
        partial(composite, below, above, clip, 3, 5, threads=2),
        lambda: uncrop(below, crop(above, where, "edge"), where, threads=2),
        partial(agnostic_mask, *maps, AgnosticSettings("upper"), threads=2),
        partial(hull, clip, "per_region", threshold=0.9, threads=2),
    ]


def test_four_callers_at_once():
    """A few rounds each, or as many as FRUGAL_CALLERS_ROUNDS says."""
    calls = operations()
    want = [call() for call in calls]
    assert all(made.std() > 0 for made in want)
    failures, rounds = [], int(os.environ.get("FRUGAL_CALLERS_ROUNDS", "4"))

    def caller(n: int) -> None:
        """Starts at another operation than the others, so that all kinds meet all kinds."""
        for k in range(rounds * len(calls)):
            at = (2 * n + k) % len(calls)
            if not np.array_equal(calls[at](), want[at]):
                failures.append((n, at))

    callers = [threading.Thread(target=caller, args=(n,)) for n in range(4)]
    for thread in callers:
        thread.start()
    for thread in callers:
        thread.join()
    assert not failures
