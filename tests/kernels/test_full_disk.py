"""A disk that fills while something is written: one error, nothing half under a final name, the
space given back, and a process that lives on.
"""

from __future__ import annotations

import contextlib
from pathlib import Path

import numpy as np
import pytest
import torch

from frugal.kernels.causal import session_file
from frugal.kernels.causal.cache import VideoCache
from frugal.kernels.causal.options import CacheOptions
from frugal.kernels.causal.storage import wan_page
from frugal.kernels.errors import FrugalError
from frugal.kernels.video import reader, writer
from frugal.kernels.video.latent_file import SUFFIX, GrowingLatent, write_latent
from frugal.kernels.video.writer import FORMATS, KEY_FRAMES, VideoWriter
from frugal.tests.helpers.full_disk import cuts, free, held_open, room_for, small_disk

av = pytest.importorskip("av")
SIDE, FRAMES = 64, 2 * KEY_FRAMES + 5
CUTS = 12


def noise() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 255, (FRAMES, SIDE, SIDE, 3), np.uint8)


def write_video(path: Path, format: str, frames: np.ndarray) -> VideoWriter:
    with VideoWriter(path, SIDE, SIDE, 16.0, format, "small") as out:
        for start in range(0, len(frames), 4):
            out.write(frames[start : start + 4])
    return out


def playable(path: Path) -> int:
    """Frames up to the one that is cut through."""
    count = 0
    with contextlib.suppress(av.error.InvalidDataError), av.open(str(path)) as source:
        for _ in source.decode(video=0):
            count += 1
    return count


@pytest.mark.parametrize("format", list(FORMATS))
def test_video(tmp_path, format):
    frames = noise()
    path = tmp_path / f"a{FORMATS[format].suffix}"
    write_video(path, format, frames)
    whole = path.read_bytes()
    path.unlink()
    played = []
    for cut in cuts(int(0.9 * len(whole)), CUTS):
        with (
            room_for(cut),
            pytest.raises(FrugalError, match=r"^choose a folder on a disk") as error,
        ):
            write_video(path, format, frames)
        assert str(path.with_suffix(f".partial{path.suffix}")) in error.value.found
        assert not path.exists() and held_open(tmp_path) == []
        left = list(tmp_path.iterdir())
        count = 0
        for partial in left:
            count = playable(partial)
            assert partial.name == f"a.partial{path.suffix}" and count > 0
            partial.unlink()
        played.append(count)
    # The more room there was, the more can be played; what is past the first key frames can.
    assert played == sorted(played) and played[0] == 0 and played[-1] >= KEY_FRAMES
    write_video(path, format, frames)
    assert path.read_bytes()[-100:] == whole[-100:]


def test_no_room_for_the_second_copy_of_an_mp4(tmp_path, monkeypatch):
    class Full(writer._Output):
        def write(self, data):
            if self.path.name == "unfinished":
                self.error = OSError(28, "No space left on device")
            return super().write(data)

        def __init__(self, path):
            self.path = path
            super().__init__(path)

    monkeypatch.setattr(writer, "_Output", Full)
    path = tmp_path / "a.mp4"
    made = write_video(path, "MP4 (H.264)", noise())
    assert [each.name for each in tmp_path.iterdir()] == ["a.mp4"]
    assert sum(1 for _ in reader.frames(str(path))) == FRAMES
    assert "No space left" in made.note and "fragments" in made.note
    assert held_open(tmp_path) == []


@pytest.mark.parametrize("format", ["MP4 (H.264)", "WebM (VP9)"])
def test_a_real_disk_that_fills(tmp_path, format):
    """Its space comes back once the partial file is removed, so nothing holds it open."""
    with small_disk(tmp_path / "disk", 200_000) as disk:
        room = free(disk)
        path = disk / f"a{FORMATS[format].suffix}"
        with pytest.raises(FrugalError, match="No space left on device"):
            write_video(path, format, np.concatenate([noise()] * 3))
        assert not path.exists() and held_open(disk) == []
        for left in disk.iterdir():
            left.unlink()
        assert free(disk) == room


def test_a_folder_that_cannot_be_written(tmp_path):
    with pytest.raises(FrugalError, match=r"^connect that disk again, or choose another folder"):
        VideoWriter(tmp_path / "gone" / "a.mp4", SIDE, SIDE, 16.0, "MP4 (H.264)", "good")


def session() -> VideoCache:
    fmt = wan_page((1, 16, 3, 8, 8), 2, 64, torch.float32, "model")
    cache = VideoCache(fmt, 2, torch.device("cpu"), CacheOptions())
    make = torch.Generator().manual_seed(0)
    cache.start_block(3)
    clean = torch.randn(1, 16, 3, 8, 8, generator=make)
    with cache.writing(clean):
        for layer in range(2):
            k, v = (torch.randn(1, 48, 2, 32, generator=make) for _ in range(2))
            cache.store(layer, [0], k, v)
    return cache


def fails_cleanly(folder: Path, path: Path, write, count: int) -> None:
    """`write` fails on every disk that is too small, each time without a trace; an earlier file of
    that name stays.
    """
    write()
    before = path.read_bytes()
    for earlier in (True, False):
        for cut in cuts(len(before), count):
            if not earlier:
                path.unlink(missing_ok=True)
            with room_for(cut), pytest.raises(Exception, match=r"File too large|os error 27"):
                write()
            assert [each.name for each in folder.iterdir()] == [path.name] * earlier
            assert not earlier or path.read_bytes() == before
            assert held_open(folder) == []
    write()
    # The order of a session's metadata is not fixed.
    assert path.stat().st_size == len(before)


def test_latent(tmp_path):
    path, samples = tmp_path / f"a{SUFFIX}", torch.randn(1, 16, 5, 8, 8)
    fails_cleanly(tmp_path, path, lambda: write_latent(samples, path), 12)


def test_session(tmp_path):
    path, cache = tmp_path / "a.safetensors", session()
    fails_cleanly(tmp_path, path, lambda: session_file.save(cache, path), 12)


def test_a_growing_latent_that_cannot_be_written_stops_nothing(tmp_path):
    """What it had written stays, and it is written again once there is room."""
    path, parts = tmp_path / f"a{SUFFIX}", torch.randn(1, 16, 12, 8, 8).split(3, dim=2)
    growing = GrowingLatent(path)
    growing.add(parts[0])
    before = path.read_bytes()
    with room_for(len(before) // 2):
        for part in parts[1:3]:
            growing.add(part)
            assert "too large" in growing.problem and path.read_bytes() == before
    assert (growing.frames, growing.kept) == (9, 3)
    growing.add(parts[3])
    assert (growing.frames, growing.kept, growing.problem) == (12, 12, "")
    assert [each.name for each in tmp_path.iterdir()] == [path.name]
