"""LATENT to video file and back: what is left after success, failure and cancel."""

from __future__ import annotations

import contextlib
import json
import os
from pathlib import Path

import comfy.model_management
import comfy.sd
import folder_paths
import numpy as np
import pytest
import torch
from comfy_api.v0_0_2 import InputImpl

from frugal.demo.tiny_wan import fill, vae_shapes
from frugal.kernels.errors import FrugalError
from frugal.kernels.video import reader
from frugal.kernels.video.writer import FORMATS
from frugal.nodes.vae import decode as decode_nodes
from frugal.nodes.vae import decode_run, encode_run, stream
from frugal.nodes.vae import encode as encode_nodes
from frugal.tests.helpers.full_disk import held_open, room_for

pytest.importorskip("av")


@pytest.fixture(scope="module")
def vae():
    return comfy.sd.VAE(sd=fill(vae_shapes(4), 3, torch.float32), dtype=torch.float32)


@pytest.fixture(autouse=True)
def folders(tmp_path, monkeypatch):
    for kind in ("input", "output"):
        (tmp_path / kind).mkdir()
        monkeypatch.setattr(
            folder_paths, f"get_{kind}_directory", lambda kind=kind: str(tmp_path / kind)
        )
    for module in (decode_nodes, encode_nodes):
        monkeypatch.setattr(module, "show_text", lambda *_: None)
    return tmp_path


def left(folders: Path) -> list[str]:
    return sorted(
        path.relative_to(folders).as_posix() for path in folders.rglob("*") if path.is_file()
    )


def latent(frames: int, batch: int = 1) -> dict:
    make = torch.Generator().manual_seed(frames)
    return {"samples": torch.randn(batch, 16, frames, 2, 4, generator=make)}


def to_file(vae, given, format="MP4 (H.264)", hidden=None):
    node = decode_nodes.FrugalWanDecodeToFile.PREPARE_CLASS_CLONE(hidden)
    with torch.inference_mode():
        return node.execute(given, vae, "clips/a", 16.0, format, "high")


def read(path: Path) -> np.ndarray:
    return np.stack([reader.pixels(frame) for frame in reader.frames(str(path))])


@pytest.mark.parametrize("format", ["MP4 (H.264)", "WebM (VP9)"])
def test_file_holds_the_frames_of_the_images(vae, folders, format):
    given, suffix = latent(5), FORMATS[format].suffix
    out = to_file(vae, given, format)
    [video], report = out.args
    assert left(folders) == [f"output/clips/a_00001_{suffix}"]
    with torch.inference_mode():
        images = vae.decode(given["samples"])[0]
    back = read(folders / left(folders)[0])
    assert back.shape == tuple(images.shape)
    # Noise, 4:2:0 and lossy: the brightness of each frame's pixels must still follow.
    weights = np.array([0.2126, 0.7152, 0.0722])
    for one, other in zip(back @ weights, images.numpy() @ weights, strict=True):
        assert np.corrcoef(one.ravel(), other.ravel())[0, 1] > 0.9
    assert video.get_dimensions() == (32, 16) and f"a_00001_{suffix}: " in report
    [shown] = out.ui.as_dict()["images"]
    assert (shown["filename"], shown["subfolder"]) == (f"a_00001_{suffix}", "clips")
    to_file(vae, given, format)
    assert len(left(folders)) == 2


def test_one_file_per_clip_of_a_batch(vae, folders):
    given = latent(2, batch=2)
    videos, report = to_file(vae, given).args
    names = ["a_00001_.mp4", "a_00002_.mp4"]
    assert left(folders) == [f"output/clips/{name}" for name in names] and len(videos) == 2
    assert "2 clips of 5 frames" in report
    one, other = (read(folders / name) for name in left(folders))
    assert len(one) == len(other) == 5 and np.abs(one - other).mean() > 0.02


def test_the_graph_is_kept_in_the_file(vae, folders):
    import av

    hidden = {"prompt": {"1": {"class_type": "x"}}, "extra_pnginfo": {"workflow": {"nodes": [7]}}}
    from comfy_api.v0_0_2 import io

    keyed = {io.Hidden.prompt: hidden["prompt"], io.Hidden.extra_pnginfo: hidden["extra_pnginfo"]}
    # The newer ComfyUI nests them.
    to_file(vae, latent(2), hidden={**keyed, "hidden_inputs": keyed})
    with av.open(str(folders / left(folders)[0])) as file:
        tags = dict(file.metadata)
    assert json.loads(tags["prompt"]) == hidden["prompt"]
    assert json.loads(tags["workflow"]) == {"nodes": [7]}


def stopping(monkeypatch, error):
    own = stream.VaeStream.feed

    def feed(self, piece, call):
        if call.start > 2:
            raise error
        return own(self, piece, call)

    monkeypatch.setattr(stream.VaeStream, "feed", feed)


def test_a_failure_leaves_what_plays_and_the_latent(vae, folders, monkeypatch):
    import nodes

    given = latent(6)
    with monkeypatch.context() as patch:
        stopping(patch, RuntimeError("no more power"))
        with pytest.raises(FrugalError, match="no more power") as caught:
            to_file(vae, given)
    assert left(folders) == [
        "input/frugal_undecoded_00001_.latent", "output/clips/a_00001_.partial.mp4",
    ]  # fmt: skip
    assert "a_00001_.partial.mp4" in caught.value.found
    assert "frugal_undecoded_00001_.latent" in caught.value.do
    done = int(caught.value.found.split("after frame ")[1].split()[0])
    assert done >= 5 and len(read(folders / left(folders)[1])) == done
    monkeypatch.setattr(
        folder_paths, "get_annotated_filepath", lambda name: str(folders / "input" / name)
    )
    [loaded] = nodes.LoadLatent().load("frugal_undecoded_00001_.latent")
    assert torch.equal(loaded["samples"], given["samples"])
    to_file(vae, loaded)
    assert left(folders)[-2:] == [
        "output/clips/a_00001_.partial.mp4", "output/clips/a_00002_.mp4",
    ]  # fmt: skip


def test_a_latent_that_cannot_be_kept_is_decoded_all_the_same(vae, folders, monkeypatch):
    """The copy on disk is needed only if decoding fails."""
    given = latent(3)
    with room_for(1000), torch.inference_mode():
        images, report = decode_run.to_images(vae, given, 0, 64)
        assert torch.equal(images, vae.decode(given["samples"])[0])
    assert "is not kept on disk" in report and left(folders) == []
    monkeypatch.setattr(decode_run, "kept_path", lambda: folders / "gone" / "a.latent")
    assert "is not kept on disk" in to_file(vae, given).args[1]
    stopping(monkeypatch, RuntimeError("no more power"))
    with pytest.raises(FrugalError, match=r"^decode again, with tile_size .*no more power"):
        to_file(vae, latent(6))


@pytest.mark.parametrize("room", [0, 3000])
def test_a_full_disk_is_one_error_and_the_latent_is_kept(vae, folders, monkeypatch, room):
    """The latent was written before; the video is what does not fit."""
    own = decode_run.VideoWriter.__init__

    def full(self, *args, **kwargs):
        limits.enter_context(room_for(room))
        own(self, *args, **kwargs)

    monkeypatch.setattr(decode_run.VideoWriter, "__init__", full)
    given = latent(6)
    with contextlib.ExitStack() as limits, pytest.raises(FrugalError) as caught:
        to_file(vae, given)
    assert caught.value.do.startswith("choose a folder on a disk")
    assert "frugal_undecoded_00001_.latent in 'Load Latent'" in caught.value.do
    assert left(folders)[0] == "input/frugal_undecoded_00001_.latent"
    assert [name for name in left(folders)[1:] if "partial" not in name] == []
    assert held_open(folders) == []


@pytest.mark.parametrize("prefix", ["a" * 250, "b/" + "\u00e4" * 120, "../out", "/etc/x", ""])
def test_a_name_that_cannot_be_is_refused_before_the_work(vae, folders, prefix):
    node = decode_nodes.FrugalWanDecodeToFile
    said = node.validate_inputs(filename_prefix=prefix)
    assert isinstance(said, str) and said.startswith(("shorten", "type a"))
    with pytest.raises(FrugalError) as caught:
        decode_run.to_files(vae, latent(2), prefix, 16.0, "MP4 (H.264)", "high", 0, 64, {})
    assert str(caught.value) == said and left(folders) == []
    for good in ("video/wan", "%year%-%month%/a", "a" * 200, None):
        assert node.validate_inputs(filename_prefix=good) is True


def test_a_latent_with_nan_is_refused_before_the_work(vae, folders):
    given = latent(4)
    given["samples"][0, 3, 2, 1, 1] = float("nan")
    with pytest.raises(FrugalError, match=r"1 of 4 latent frames, the first of them 2"):
        to_file(vae, given)
    assert left(folders) == []


def test_pixels_that_are_not_finite_are_no_video(vae, folders, monkeypatch):
    """What a VAE in half precision gives where its values overflow."""
    own = decode_run.ClipDecoder.feed

    def feed(self, latents):
        for number, pixels in enumerate(own(self, latents)):
            yield pixels * float("inf" if number == 2 else 1)

    monkeypatch.setattr(decode_run.ClipDecoder, "feed", feed)
    with pytest.raises(FrugalError, match=r"^start ComfyUI with --fp32-vae, then choose"):
        to_file(vae, latent(6))


def test_a_cancel_leaves_nothing(vae, folders, monkeypatch):
    error = comfy.model_management.InterruptProcessingException()
    stopping(monkeypatch, error)
    with pytest.raises(comfy.model_management.InterruptProcessingException):
        to_file(vae, latent(6))
    assert left(folders) == []


def test_the_latent_is_there_before_the_first_piece(vae, folders, monkeypatch):
    seen = []
    own = stream.VaeStream.feed

    def feed(self, piece, call):
        seen.append(left(folders))
        return own(self, piece, call)

    monkeypatch.setattr(stream.VaeStream, "feed", feed)
    to_file(vae, latent(3))
    assert seen[0][0] == "input/frugal_undecoded_00001_.latent"


@pytest.mark.parametrize("kind", ["file", "frames"])
def test_encode_of_a_video_is_encode_of_its_frames(vae, folders, kind):
    to_file(vae, latent(4))
    path = folders / left(folders)[0]
    video = InputImpl.VideoFromFile(str(path))
    if kind == "frames":
        video = InputImpl.VideoFromComponents(video.get_components())
        images = video.get_components().images
    else:
        images = torch.from_numpy(read(path))
    node = encode_nodes.FrugalWanEncode.PREPARE_CLASS_CLONE(None)
    with torch.inference_mode():
        given, report = node.execute(vae, video=video).args
        assert torch.equal(given["samples"], vae.encode(images))
    assert given["samples"].shape == (1, 16, 4, 2, 4) and "encoded 13 frames 32 x 16" in report


def test_encode_respects_a_trimmed_video(vae, folders):
    to_file(vae, latent(4))
    path = folders / left(folders)[0]
    video = InputImpl.VideoFromFile(str(path))
    if not hasattr(video, "as_trimmed"):
        pytest.skip("this ComfyUI cannot trim")
    with torch.inference_mode():
        given, _ = encode_run.encode(vae, None, video.as_trimmed(0.25, 0.3125), 0, 0)
        expected = vae.encode(torch.from_numpy(read(path))[4:9])
    assert torch.equal(given["samples"], expected)


def test_reading_a_video_holds_one_piece(vae, folders, monkeypatch):
    to_file(vae, latent(6))
    held, most = set(), []
    own = encode_run.reader.pixels

    class Counted(np.ndarray):
        pass

    def pixels(frame):
        import weakref

        made = own(frame).view(Counted)
        key = object()
        held.add(id(key))
        weakref.finalize(made, held.discard, id(key))
        made.key = key
        most.append(len(held))
        return made

    monkeypatch.setattr(encode_run.reader, "pixels", pixels)
    video = InputImpl.VideoFromFile(str(folders / left(folders)[0]))
    with torch.inference_mode():
        encode_run.encode(vae, None, video, 0, 0)
    assert len(most) > 20 and max(most) <= 9


def test_frames_reach_the_file_a_piece_at_a_time(vae, folders, monkeypatch):
    sizes = []
    own = decode_run.VideoWriter.write

    def write(self, frames):
        sizes.append(len(frames))
        return own(self, frames)

    monkeypatch.setattr(decode_run.VideoWriter, "write", write)
    to_file(vae, latent(6))
    assert sum(sizes) == 21 and max(sizes) <= 8 and os.listdir(folders / "input") == []
