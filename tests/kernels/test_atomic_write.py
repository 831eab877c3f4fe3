"""Files appear whole or not at all; a full or broken disk is one sentence and leaves nothing."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
import time

import pytest
import torch

from frugal.kernels import atomic_write as module
from frugal.kernels.atomic_write import WriteError, atomic_write
from frugal.kernels.checkpoints.text_embeds import write_text_embeds
from frugal.kernels.errors import FrugalError
from frugal.kernels.tensor_file import write_tensors
from frugal.kernels.video.latent_file import write_latent
from tests.helpers.full_disk import room_for

BIG = torch.zeros(1, 16, 4096)
WRITERS = {
    "bytes": lambda path: _bytes(path),
    "tensors": lambda path: write_tensors(path, {"a": BIG}),
    "latent": lambda path: write_latent(BIG, path),
    "text embeddings": lambda path: write_text_embeds([(BIG, {})], path),
}


def _bytes(path):
    with atomic_write(path) as unfinished:
        unfinished.write_bytes(bytes(100_000))


@pytest.mark.parametrize("writer", WRITERS)
def test_a_disk_that_takes_no_more_is_one_sentence_and_leaves_what_was_there(tmp_path, writer):
    path = tmp_path / "held"
    path.write_bytes(b"before")
    with room_for(20_000), pytest.raises(WriteError) as caught:
        WRITERS[writer](path)
    said = str(caught.value)
    assert isinstance(caught.value, FrugalError) and isinstance(caught.value, OSError)
    assert caught.value.errno == errno.EFBIG
    assert said.startswith("choose a folder on a disk that takes files of this size: ")
    assert str(path) in said and "MB free" in said
    assert [each.name for each in tmp_path.iterdir()] == ["held"]
    assert path.read_bytes() == b"before"


@pytest.mark.parametrize("number", sorted(module._REMEDIES))
def test_every_fault_of_a_disk_has_a_remedy(tmp_path, number):
    with pytest.raises(WriteError) as caught, atomic_write(tmp_path / "a"):
        raise OSError(number, os.strerror(number))
    assert caught.value.errno == number and os.strerror(number) in str(caught.value)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("error", [ConnectionResetError(errno.ECONNRESET, "gone"), KeyError("k")])
def test_what_is_no_fault_of_the_disk_stays_what_it_was(tmp_path, error):
    with pytest.raises(type(error)) as caught, atomic_write(tmp_path / "a"):
        raise error
    assert caught.value is error and not list(tmp_path.iterdir())


def test_a_folder_that_is_gone_is_one_sentence(tmp_path):
    with pytest.raises(WriteError, match="connect that disk again"):
        write_tensors(tmp_path / "gone" / "a", {"a": BIG})


def test_the_longest_name_that_a_disk_allows(tmp_path):
    path = tmp_path / ("n" * 255)
    _bytes(path)
    assert path.stat().st_size == 100_000
    with pytest.raises(WriteError, match="choose a shorter name"):
        _bytes(tmp_path / ("n" * 256))


@pytest.mark.skipif(os.name == "nt", reason="Windows has no modes")
@pytest.mark.parametrize("mask", [0o022, 0o077, 0o002])
def test_files_have_the_rights_that_the_user_gives_new_files(tmp_path, mask):
    before = os.umask(mask)
    try:
        write_tensors(tmp_path / "ours", {"a": BIG})
        (tmp_path / "plain").touch()
    finally:
        os.umask(before)
    assert (tmp_path / "ours").stat().st_mode == (tmp_path / "plain").stat().st_mode


KILLED = """
import os, signal, sys
from pathlib import Path
import importlib.util
root, target = sys.argv[1:]
spec = importlib.util.spec_from_file_location(
    "frugal", root + "/__init__.py", submodule_search_locations=[root])
sys.modules["frugal"] = importlib.util.module_from_spec(spec)
from frugal.kernels.atomic_write import atomic_write
with atomic_write(Path(target)) as unfinished:
    unfinished.write_bytes(b"half")
    os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.skipif(os.name == "nt", reason="Windows has no SIGKILL")
def test_what_a_killed_run_left_is_swept_a_day_later(tmp_path, request):
    command = [sys.executable, "-P", "-c", KILLED, str(request.config.rootpath)]
    done = subprocess.run([*command, str(tmp_path / "a")], check=False)
    assert done.returncode == -signal.SIGKILL
    (left,) = tmp_path.iterdir()
    assert left.name != "a" and left.suffix == module.UNFINISHED
    strange = tmp_path / ".mine.part"
    strange.mkdir()
    for old in (strange, left):
        module._sweep_once.cache_clear()
        _bytes(tmp_path / "b")
        assert left.exists()
        os.utime(old, (time.time() - module.LEFT_OVER - 60,) * 2)
    module._sweep_once.cache_clear()
    _bytes(tmp_path / "b")
    assert sorted(each.name for each in tmp_path.iterdir()) == [".mine.part", "b"]
