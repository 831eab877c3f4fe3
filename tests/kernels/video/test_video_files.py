"""Videos are written as they should be read, and a killed process leaves one that plays."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest

from frugal.kernels.errors import FrugalError
from frugal.kernels.video import reader, writer
from frugal.kernels.video.writer import FORMATS, QUALITIES, VideoWriter

av = pytest.importorskip("av")
HEIGHT, WIDTH = 64, 96
COLOURS = np.array([[200, 30, 30], [30, 180, 60], [40, 60, 210], [128, 128, 128]], np.uint8)


def scene(count: int) -> np.ndarray:
    """Four flat colours that stand still, a white bar that moves 3 pixels a frame."""
    frames = np.repeat(COLOURS, WIDTH // 4, 0)[None, None].repeat(HEIGHT, 1).repeat(count, 0)
    for number, frame in enumerate(frames):
        frame[:16, 3 * number % WIDTH : 3 * number % WIDTH + 6] = 255
    return frames


def write(path: Path, frames: np.ndarray, format: str, quality: str = "good", **more) -> None:
    with VideoWriter(path, WIDTH, HEIGHT, 16.0, format, quality, **more) as out:
        # In pieces of uneven length, as a VAE gives them.
        for start in range(0, len(frames), 5):
            out.write(frames[start : start + 5])


def read(path: Path) -> np.ndarray:
    return np.stack([frame.to_ndarray(format="rgb24") for frame in reader.frames(str(path))])


@pytest.mark.parametrize("format", list(FORMATS))
def test_frames_come_back(tmp_path, format):
    path = tmp_path / f"a{FORMATS[format].suffix}"
    frames = scene(21)
    write(path, frames, format, "high", metadata={"prompt": '{"1": 2}'})
    back = read(path)
    assert back.shape == frames.shape
    assert np.abs(back.astype(float) - frames).mean() < 6
    # Flat colours, away from edges: a wrong matrix or range moves them by 8 and more.
    for number, colour in enumerate(COLOURS):
        patch = back[:, 30:, number * 24 + 8 : number * 24 + 16].reshape(-1, 3).mean(0)
        assert np.abs(patch - colour).max() < 4, (number, patch)
    with av.open(str(path)) as file:
        stream = file.streams.video[0]
        assert stream.average_rate == 16 and stream.codec_context.name in format.lower().replace(
            ".", ""
        ).replace("av1", "libdav1d av1").replace("vp9", "libvpx-vp9 vp9")
        tags = {name.lower(): value for name, value in file.metadata.items()}
        assert tags["prompt"] == '{"1": 2}'
        assert abs(float(file.duration / av.time_base) - 21 / 16) < 0.1
        frame = next(file.decode(stream))
        assert frame.pts == 0
        assert (int(frame.colorspace), int(frame.color_range)) == (1, 1)
    assert [each.name for each in tmp_path.iterdir()] == [path.name]


def test_quality_is_ordered(tmp_path):
    noise = np.random.default_rng(1).integers(0, 255, (10, HEIGHT, WIDTH, 3), np.uint8)
    sizes = []
    for quality in QUALITIES:
        write(tmp_path / f"{quality}.mp4", noise, "MP4 (H.264)", quality)
        sizes.append((tmp_path / f"{quality}.mp4").stat().st_size)
    assert sizes == sorted(sizes, reverse=True) and sizes[0] > 1.5 * sizes[-1]


KILLED = """
import sys, os, signal, importlib.util
spec = importlib.util.spec_from_file_location('frugal', {root!r} + '/__init__.py',
    submodule_search_locations=[{root!r}])
sys.modules['frugal'] = importlib.util.module_from_spec(spec)
from pathlib import Path
import numpy as np
from frugal.kernels.video.writer import VideoWriter
frames = np.load({frames!r})
with VideoWriter(Path({path!r}), 96, 64, 16.0, {format!r}, 'good') as out:
    for start in range(0, len(frames), 5):
        out.write(frames[start:start + 5])
    os.kill(os.getpid(), signal.{signal})
"""


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="no SIGKILL on this system")
@pytest.mark.parametrize("format", ["MP4 (H.264)", "WebM (VP9)"])
def test_a_killed_process_leaves_a_file_that_plays(tmp_path, format):
    path = tmp_path / f"a{FORMATS[format].suffix}"
    frames = scene(200)
    np.save(tmp_path / "frames.npy", frames)
    root = str(Path(__file__).resolve().parents[3])
    code = KILLED.format(
        root=root, frames=str(tmp_path / "frames.npy"), path=str(path), format=format,
        signal="SIGKILL",
    )  # fmt: skip
    done = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert not path.exists()
    back = read(path.with_name(f"a.partial{path.suffix}"))
    # What the encoder still looked ahead at and the open fragment are lost.
    assert 200 - 2 * writer.KEY_FRAMES - 40 < len(back) <= 200
    assert np.abs(back.astype(float) - frames[: len(back)]).mean() < 10


def test_an_error_ends_the_partial_file_with_every_frame(tmp_path):
    path, frames = tmp_path / "a.mp4", scene(30)
    with (
        pytest.raises(RuntimeError, match="card"),
        VideoWriter(path, WIDTH, HEIGHT, 16.0, "MP4 (H.264)", "good") as out,
    ):
        out.write(frames)
        raise RuntimeError("card")
    assert [each.name for each in tmp_path.iterdir()] == ["a.partial.mp4"]
    assert len(read(tmp_path / "a.partial.mp4")) == 30


@pytest.mark.parametrize("cancelled", [False, True])
def test_nothing_is_left_without_a_frame_and_after_a_cancel(tmp_path, cancelled):
    with (
        pytest.raises(KeyboardInterrupt),
        VideoWriter(tmp_path / "a.mp4", WIDTH, HEIGHT, 16.0, "MP4 (H.264)", "good") as out,
    ):
        if cancelled:
            out.write(scene(5))
            out.cancel()
        raise KeyboardInterrupt
    assert list(tmp_path.iterdir()) == []


def test_a_part_of_a_file(tmp_path):
    path = tmp_path / "a.mp4"
    write(path, scene(40), "MP4 (H.264)")
    whole = [frame.pts for frame in reader.frames(str(path))]
    part = [frame.pts for frame in reader.frames(str(path), 1.0, 0.5)]
    assert part == whole[16:24] and len(part) == 8


@pytest.mark.parametrize("name", ["list.mp4", "list.ffconcat"])
def test_a_list_of_other_files_is_no_video(tmp_path, name):
    """FFmpeg would read every file that a "video" names."""
    write(tmp_path / "private.mp4", scene(5), "MP4 (H.264)")
    (tmp_path / name).write_text("ffconcat version 1.0\nfile private.mp4\n")
    with pytest.raises(av.error.FFmpegError):
        list(reader.frames(str(tmp_path / name)))
    with (tmp_path / name).open("rb") as file, pytest.raises(av.error.FFmpegError):
        list(reader.frames(file))


def test_deep_video_keeps_its_depth(tmp_path):
    path = tmp_path / "a.mkv"
    ramp = np.linspace(8000, 50000, WIDTH).astype(np.uint16)
    picture = np.repeat(np.repeat(ramp[None, :, None], HEIGHT, 0), 3, 2)
    with av.open(str(path), "w") as file:
        stream = file.add_stream("ffv1", rate=Fraction(16))
        stream.width, stream.height, stream.pix_fmt = WIDTH, HEIGHT, "gbrp10le"
        frame = av.VideoFrame.from_ndarray(picture, format="rgb48le").reformat(format="gbrp10le")
        file.mux(stream.encode(frame))
        file.mux(stream.encode(None))
    [frame] = reader.frames(str(path))
    values = reader.pixels(frame)
    assert values.dtype == np.float32 and values.shape == (HEIGHT, WIDTH, 3)
    assert np.abs(values - picture / 65535).max() < 1.5 / 1023


def test_refusals(tmp_path, monkeypatch):
    with pytest.raises(FrugalError, match="97 x 64"):
        VideoWriter(tmp_path / "a.mp4", 97, 64, 16.0, "MP4 (H.264)", "good")
    nothing = {"none-such": {}}
    form = FORMATS["MP4 (AV1)"]
    monkeypatch.setitem(
        FORMATS, "MP4 (AV1)", writer.Format(form.suffix, form.container, nothing, form.crf)
    )
    with pytest.raises(FrugalError, match=r"choose another format: .* the encoder none-such"):
        VideoWriter(tmp_path / "a.mp4", 96, 64, 16.0, "MP4 (AV1)", "good")
    monkeypatch.setitem(sys.modules, "av", None)
    with pytest.raises(FrugalError, match="pip install av"):
        VideoWriter(tmp_path / "a.mp4", 96, 64, 16.0, "MP4 (H.264)", "good")
    assert os.listdir(tmp_path) == []
