"""Frames into a video file, one after the other, by PyAV (FFmpeg).

While it grows the file is called `<name>.partial<suffix>` and is playable at any moment up to its
last finished fragment, so that a process that dies leaves something to look at.

FFmpeg never learns that a write failed, see `_Output`: its muxers crash when they are closed after
that, and leave the file open.
"""

from __future__ import annotations

import contextlib
import io
import os
from collections.abc import Mapping
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np

from ..atomic_write import atomic_write, write_error
from ..errors import FrugalError
from ..log import LOG

QUALITIES = ("high", "good", "small")
# ITU-T H.273 codes of BT.709; 1 is also 'limited range' in FFmpeg's numbering.
BT709 = LIMITED = 1
# Frames between key frames, each of which starts a fragment: what a dying process may lose.
KEY_FRAMES = 48


@dataclass(frozen=True)
class Format:
    """A container and its codec. crf: constant rate factor per quality; encoders: the first that
    this FFmpeg has is used, with its own options.
    """

    suffix: str
    container: str
    encoders: Mapping[str, Mapping[str, str]]
    crf: Mapping[str, int]


def _crf(*values: int) -> Mapping[str, int]:
    return dict(zip(QUALITIES, values, strict=True))


X264: Mapping[str, Mapping[str, str]] = {"libx264": {"preset": "medium"}}
AV1: Mapping[str, Mapping[str, str]] = {
    "libsvtav1": {"preset": "6"},
    "libaom-av1": {"cpu-used": "6"},
}
VP9: Mapping[str, Mapping[str, str]] = {
    "libvpx-vp9": {"row-mt": "1", "deadline": "good", "cpu-used": "4"}
}
FORMATS = {
    "MP4 (H.264)": Format(".mp4", "mp4", X264, _crf(17, 21, 27)),
    "MP4 (AV1)": Format(".mp4", "mp4", AV1, _crf(23, 30, 38)),
    "WebM (VP9)": Format(".webm", "webm", VP9, _crf(24, 31, 38)),
    "WebM (AV1)": Format(".webm", "webm", AV1, _crf(23, 30, 38)),
}


class _Output(io.RawIOBase):
    """A file that FFmpeg writes to. The first write that fails is kept as `error`, to be asked for
    after every call of FFmpeg; what comes after it is thrown away.
    """

    def __init__(self, path: Path):
        self._file = path.open("w+b", buffering=0)
        self.error: OSError | None = None

    def write(self, data: Any) -> int:
        whole = memoryview(data).cast("B")
        rest = whole
        try:
            while self.error is None and rest:
                rest = rest[self._file.write(rest) :]
        except OSError as error:
            self.error = error
        return len(whole)

    def read(self, size: int = -1) -> bytes:
        return self._file.read(size) or b""

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        return self._file.seek(offset, whence)

    def tell(self) -> int:
        return self._file.tell()

    def readable(self) -> bool:
        return True

    def writable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def close(self) -> None:
        try:
            self._file.close()
        except OSError as error:
            # Some file systems tell only now that the disk was full.
            self.error = self.error or error
        super().close()


class VideoWriter:
    """Writes one video; a context manager that puts the finished file at `path`.

    path: ends in the format's suffix and is not there yet. width, height: pixels, even. fps: frames
    per second. metadata: text by name, kept in the file. Leaving the context by an exception ends
    the partial file properly and leaves it, if a frame of it can be played. Raises FrugalError when
    PyAV or the encoder is missing, or a size is odd; WriteError when the file cannot be written.

    note: what the reader of a report should know of the file; "" for nothing.
    """

    def __init__(
        self,
        path: Path,
        width: int,
        height: int,
        fps: float,
        format: str,
        quality: str,
        metadata: Mapping[str, str] | None = None,
    ):
        if width % 2 or height % 2:
            raise FrugalError(
                f"the frames are {width} x {height}",
                "an even width and height",
                "crop the frames first",
            )
        self.av = pyav()
        self.path, self.form = path, FORMATS[format]
        self.partial = path.with_name(f"{path.stem}.partial{path.suffix}")
        self.frames = 0
        encoder, options = _encoder(self.av, format)
        # Without flush_packets a small file stays in FFmpeg's buffer until it is closed.
        kept = {"flush_packets": "1"}
        if self.form.container == "mp4":
            kept["movflags"] = "use_metadata_tags+frag_keyframe+empty_moov+default_base_moof"
        self.note = ""
        try:
            self.output = _Output(self.partial)
        except OSError as error:
            raise self._failed(error) from error
        try:
            self._open(kept, encoder, options, fps, width, height, quality, metadata)
        except BaseException:
            self._leave_nothing()
            raise

    def _open(self, kept, encoder, options, fps, width, height, quality, metadata) -> None:
        self.container: Any = self.av.open(
            self.output, "w", format=self.form.container, options=kept
        )
        self.container.metadata.update(metadata or {})
        stream: Any = self.container.add_stream(encoder, rate=Fraction(round(fps * 1000), 1000))
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        stream.options = {**options, "crf": str(self.form.crf[quality])}
        context = stream.codec_context
        context.gop_size = KEY_FRAMES
        context.bit_rate = 0
        context.color_primaries = context.color_trc = context.colorspace = BT709
        context.color_range = LIMITED
        self.stream = stream

    def __enter__(self) -> VideoWriter:
        return self

    def write(self, frames: np.ndarray) -> None:
        """Append uint8 [N, H, W, 3] RGB."""
        for pixels in frames:
            picture = self.av.VideoFrame.from_ndarray(np.ascontiguousarray(pixels), format="rgb24")
            # Tagged BT.709 below, so converted to it too; FFmpeg's own choice would be BT.601.
            frame = picture.reformat(
                format="yuv420p", dst_colorspace="ITU709", dst_color_range="MPEG"
            )
            frame.pts = self.frames
            frame.time_base = 1 / self.stream.codec_context.framerate
            self.container.mux(self.stream.encode(frame))
            self._check()
            self.frames += 1

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None:
            try:
                self._close()
                self._check()
                self._finish()
            except BaseException:
                self._leave_what_plays()
                raise
            return
        # What stopped the writing is what the user has to hear, not what comes of it.
        with contextlib.suppress(Exception):
            self._close()
        self._leave_what_plays()

    def cancel(self) -> None:
        """Leave nothing behind when the context is left by an exception."""
        self.frames = 0

    def _check(self) -> None:
        if self.output.error is not None:
            raise self._failed(self.output.error) from self.output.error

    def _failed(self, error: OSError) -> OSError:
        return write_error(self.partial, error)

    def _close(self) -> None:
        try:
            self.container.mux(self.stream.encode(None))
        finally:
            try:
                self.container.close()
            finally:
                self.output.close()

    def _leave_what_plays(self) -> None:
        if not self.frames or not self._plays():
            self.partial.unlink(missing_ok=True)

    def _leave_nothing(self) -> None:
        self.output.close()
        self.partial.unlink(missing_ok=True)

    def _plays(self) -> bool:
        try:
            with self.av.open(str(self.partial)) as source:
                return next(source.decode(video=0), None) is not None
        except (OSError, ValueError, IndexError):
            return False

    def _finish(self) -> None:
        if self.form.container == "mp4":
            # Fragments are for a file that may be cut off; editors want one index, players want it
            # first. The compressed frames are copied.
            try:
                with atomic_write(self.path) as whole:
                    self._copy(whole)
                self.partial.unlink()
                return
            except OSError as error:
                said = error.strerror or type(error).__name__
                self.note = (
                    f"{self.path.name} plays, but in fragments, which some editors do not open: "
                    f"there was no room for a second copy ({said})"
                )
                LOG.warning("[Frugal] %s", self.note)
        os.replace(self.partial, self.path)

    def _copy(self, target: Path) -> None:
        tags = {"movflags": "use_metadata_tags+faststart"}
        output = _Output(target)
        try:
            self._copied(target, output, tags)
        except self.av.FFmpegError:
            # Reading back what a full disk did not take says less than the disk's own error.
            if output.error is None:
                raise
        finally:
            output.close()
        if output.error is not None:
            raise output.error

    def _copied(self, target: Path, output: _Output, tags: Mapping[str, str]) -> None:
        def again(url: str, flags: int, options: Mapping[str, str]) -> Any:
            """The muxer reads its own file to move the index to the front."""
            return target.open("rb")

        with (
            self.av.open(str(self.partial)) as source,
            self.av.open(output, "w", format="mp4", options=tags, io_open=again) as copy,
        ):
            copy.metadata.update(source.metadata)
            given = source.streams.video[0]
            # Opaque: no encoder of this codec is looked for.
            taken = copy.add_stream_from_template(given, opaque=True)
            # Fragments cannot say that the first frame is shown at once; the index can.
            delay = given.start_time or 0
            for packet in source.demux(given):
                if packet.dts is not None:
                    packet.pts -= delay
                    packet.dts -= delay
                    packet.stream = taken
                    copy.mux(packet)


def pyav() -> Any:
    """The package av. Raises FrugalError where it is not installed."""
    try:
        import av
    except ImportError as error:
        raise FrugalError(
            "PyAV is not installed", "the package 'av'", "run: pip install av"
        ) from error
    return av


def _encoder(av: Any, format: str) -> tuple[str, Mapping[str, str]]:
    for name, options in FORMATS[format].encoders.items():
        try:
            av.codec.Codec(name, "w")
        except ValueError:
            continue
        return name, options
    wanted = " or ".join(FORMATS[format].encoders)
    raise FrugalError(
        f"this FFmpeg cannot write {format}", f"the encoder {wanted}", "choose another format"
    )
