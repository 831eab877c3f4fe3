"""Pictures decoded while later blocks are sampled are those of the whole latent, up to rounding; a
run that is cut off leaves them and its latents.
"""

from __future__ import annotations

import math
import os
from pathlib import Path

import comfy.model_management
import comfy.sd
import folder_paths
import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from frugal.demo.tiny_wan import fill, vae_shapes
from frugal.kernels.errors import FrugalError
from frugal.kernels.video import latent_file
from frugal.nodes.causal import live_decode
from frugal.nodes.causal.live_decode import LiveVideo, Target
from frugal.nodes.causal.video_run import Settings, make_video
from frugal.nodes.vae import decode_run
from frugal.tests.helpers import causal as videos
from frugal.tests.helpers import rounding

SIDE = 4
ANY = Target("live/clip", 16.0, "MP4 (H.264)", "high")
SETTINGS = Settings(9, 2, 1.0, "simple", 2)
Cancelled = comfy.model_management.InterruptProcessingException


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    return videos.load(tmp_path_factory.mktemp("causal"))


@pytest.fixture(scope="module")
def model(plain):
    return videos.causal(plain, window=4, sink=1, relative=True)


@pytest.fixture(scope="module")
def vae():
    return comfy.sd.VAE(sd=fill(vae_shapes(4), 3, torch.float32), dtype=torch.float32)


@pytest.fixture(autouse=True)
def folders(tmp_path, monkeypatch):
    for kind in ("output", "input"):
        (tmp_path / kind).mkdir()
        where = str(tmp_path / kind)
        monkeypatch.setattr(folder_paths, f"get_{kind}_directory", lambda where=where: where)
    return tmp_path


@pytest.fixture
def written(monkeypatch):
    """Path -> every frame that was handed to its file."""
    frames: dict[Path, list] = {}
    write = live_decode.VideoWriter.write

    def watch(self, pixels):
        frames.setdefault(self.path, []).extend(pixels)
        write(self, pixels)

    monkeypatch.setattr(live_decode.VideoWriter, "write", watch)
    return frames


def make(model, vae, frames, target=ANY, settings=SETTINGS, batch=1, watch=None, **more):
    latent = {"samples": torch.zeros(batch, 16, frames, SIDE, SIDE)}
    conds = [[[videos.prompt_of(seed), {}]] for seed in (5, 6)]
    with torch.inference_mode(), LiveVideo(vae, target) as live:
        if watch:
            add = live.add
            live.add = lambda latents: watch(live, add(latents))
        made = make_video(model, *conds, latent, settings, live=live, **more)
    return made[0]["samples"], live, made[2]


def decoded(vae, samples):
    """By ComfyUI's own decode of everything at once."""
    with torch.inference_mode():
        return [decode_run.bytes_of(vae.decode(each[None])[0]) for each in samples]


def assert_same_pictures(vae, got, wanted):
    """uint8. The decoder's first convolution meets a few latents here and all of them there, which
    rounds otherwise: by far less than a level, so that only values between two levels differ.
    """
    assert got.shape == wanted.shape
    off = np.abs(got.astype(int) - wanted)
    limit = rounding.bound(torch.float32, rounding.terms(vae.first_stage_model, 0, torch.float32))
    assert off.max() <= 1 and (off > 0).mean() <= 2 * 255 * limit


def frames_of(path) -> int:
    import av

    with av.open(str(path)) as container:
        return sum(1 for _ in container.decode(video=0))


@pytest.mark.parametrize(
    ("frames", "block", "every", "batch"),
    [(7, 3, 1, 2), (4, 1, 1, 1), (6, 2, 2, 1)],
)
def test_the_frames_are_those_of_the_whole_latent(
    model, vae, written, folders, frames, block, every, batch
):
    target = Target("live/clip", 16.0, "MP4 (H.264)", "high", every)
    settings = Settings(9, 2, 1.0, "simple", block)
    samples, live, _ = make(model, vae, frames, target, settings, batch)
    conds = [[[videos.prompt_of(seed), {}]] for seed in (5, 6)]
    with torch.inference_mode():
        latent = {"samples": torch.zeros(batch, 16, frames, SIDE, SIDE)}
        alone = make_video(model, *conds, latent, settings)[0]["samples"]
    assert torch.equal(samples, alone)
    assert len(live.paths) == batch
    for path, wanted in zip(live.paths, decoded(vae, samples), strict=True):
        assert_same_pictures(vae, np.stack(written[path]), wanted)
        assert frames_of(path) == wanted.shape[0] == 4 * frames - 3
    assert live.pieces == math.ceil(math.ceil(frames / block) / every)
    # Nothing else is left.
    assert os.listdir(folders / "input") == []
    assert len(list((folders / "output" / "live").iterdir())) == batch


def test_the_first_frames_are_there_before_the_last_block(model, vae):
    seen = []

    def watch(live, did):
        writer = live._clips[0][1]
        seen.append((live._kept.frames, writer.frames, live.picture is not None, did))
        return did

    make(model, vae, 7, watch=watch)
    assert [each[0] for each in seen] == [2, 4, 6, 7]
    assert all(shown and did for *_, shown, did in seen)
    counts = [each[1] for each in seen]
    assert counts == sorted(counts) and 0 < counts[0] < counts[-1] == 25


def test_start_frames_and_prompts_that_change(model, vae, written):
    start = {
        "samples": torch.randn(1, 16, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(2))
    }
    changed = ((1.0, [[videos.prompt_of(7), {}]]),)
    samples, live, _ = make(model, vae, 9, start=start, prompts=changed)
    assert torch.equal(samples[:, :, :3], start["samples"])
    assert_same_pictures(vae, np.stack(written[live.paths[0]]), decoded(vae, samples)[0])


def test_progress_shows_the_pictures(model, vae, monkeypatch):
    import comfy.utils

    shown = []
    update = comfy.utils.ProgressBar.update_absolute

    def watch(self, value, total=None, preview=None):
        shown.append((value, total, preview))
        update(self, value, total, preview)

    monkeypatch.setattr(comfy.utils.ProgressBar, "update_absolute", watch)
    make(model, vae, 6)
    steps = [each for each in shown if each[1] == 6]
    assert [value for value, *_ in steps] == [1, 2, 3, 4, 5, 6]
    pictures = [preview[1].size for _, _, preview in steps if preview]
    # Two steps of the first block have no picture yet.
    assert pictures == [(8 * SIDE, 8 * SIDE)] * 4


@pytest.mark.parametrize(("at", "error"), [(1, Cancelled), (3, Cancelled), (2, RuntimeError)])
def test_what_is_cut_off_leaves_frames_latents_and_the_session(
    model, vae, written, folders, monkeypatch, at, error
):
    latent = {"samples": torch.zeros(1, 16, 4, SIDE, SIDE)}
    conds = [[[videos.prompt_of(seed), {}]] for seed in (5, 6)]
    with torch.inference_mode():
        keep = Settings(9, 2, 1.0, "simple", 2, keep=True)
        _, session, _ = make_video(model, *conds, latent, keep)
        whole = make_video(
            model, *conds, {"samples": torch.zeros(1, 16, 7, SIDE, SIDE)}, SETTINGS, session
        )
    before = session.pool.away_bytes
    calls = []

    def stop(live, did):
        calls.append(did)
        if len(calls) == at:
            raise error("no more")
        return did

    expected = Cancelled if error is Cancelled else FrugalError
    with pytest.raises(expected) as caught:
        make(model, vae, 7, watch=stop, session=session)
    (kept,) = (folders / "input").iterdir()
    (partial,) = (folders / "output" / "live").iterdir()
    assert partial.name == "clip_00001_.partial.mp4"
    samples = load_file(str(kept))[latent_file.LATENT]
    done = min(2 * at, 7)
    assert torch.equal(samples, whole[0]["samples"][:, :, :done])
    frames = written[partial.with_name("clip_00001_.mp4")]
    assert frames_of(partial) == len(frames) > 0
    wanted = decoded(vae, whole[0]["samples"])[0]
    assert_same_pictures(vae, np.stack(frames), wanted[: len(frames)])
    if error is RuntimeError:
        assert f"after latent frame {done} of 7 (no more)" in str(caught.value)
        assert kept.name in str(caught.value) and partial.name in str(caught.value)
    assert (session.pool.used_bytes, session.pool.away_bytes) == (0, before)


def test_a_refusal_before_the_first_frame_stays_as_it_is(model, vae, folders):
    with pytest.raises(FrugalError, match="block of 5 frames and a window of 4; expected"):
        make(model, vae, 6, settings=Settings(9, 2, 1.0, "simple", 5))
    assert list((folders / "output").rglob("*.mp4")) == []
    assert os.listdir(folders / "input") == []


def test_the_model_comes_back_after_each_piece(model, vae, monkeypatch):
    """The VAE is loaded by ComfyUI for every piece, and then the model again with the room that is
    left to make; what had to leave is counted.
    """
    loads, needs, network = [], [], model.model
    held, left = {"now": 100}, iter([40, 100, 90, 5])
    load = comfy.model_management.load_models_gpu

    def spy(models, memory_required=0, **more):
        loads.append("vae" if models[0] is vae.patcher else "model")
        needs.append(memory_required)
        held["now"] = next(left) if loads[-1] == "vae" else 100
        return load(models, memory_required=memory_required, **more)

    monkeypatch.setattr(comfy.model_management, "load_models_gpu", spy)
    # ComfyUI's own estimate is far above the bytes of so small a cache.
    monkeypatch.setattr(
        type(network),
        "memory_required",
        lambda self, input_shape, cond_shapes=None: 4096 * input_shape[2],
    )
    size = type(model).loaded_size
    monkeypatch.setattr(
        type(model),
        "loaded_size",
        lambda self: held["now"] if self.model is network else size(self),
    )
    _, live, _ = make(model, vae, 7)
    # After the last piece there is nothing more to sample.
    assert loads == ["model", "vae"] * 4
    assert (live.swaps, live.moved) == (3, 60 + 10 + 95)
    assert "made room 3 times" in live.report()
    # Pages that have their place need no more room to be made.
    room = [need for what, need in zip(loads, needs, strict=True) if what == "model"]
    assert room[0] > room[1] >= room[2]


def test_the_node(model, vae, folders):
    from frugal.nodes.causal.video_file import FrugalCausalVideoFile

    node = FrugalCausalVideoFile.PREPARE_CLASS_CLONE(None)
    conds = [[[videos.prompt_of(seed), {}]] for seed in (5, 6)]
    with torch.inference_mode():
        out = node.execute(
            model, *conds, {"samples": torch.zeros(1, 16, 3, SIDE, SIDE)}, 9, 2, 1.0, "simple", 2,
            True, True, vae, "live/clip", 16.0, "MP4 (H.264)", "high", 1,
        )  # fmt: skip
    shown, latent, session, report = out.args
    path = folders / "output" / "live" / "clip_00001_.mp4"
    assert len(shown) == 1 and frames_of(path) == 9 == 4 * latent["samples"].shape[2] - 3
    assert session.next_frame == 3
    assert "clip_00001_.mp4: 9 frames" in report and "decoded 2 times" in report
    assert [each["filename"] for each in out.ui.as_dict()["images"]] == [path.name]


def test_latents_on_disk_are_whole_at_every_moment(tmp_path):
    growing = latent_file.GrowingLatent(tmp_path / "a.latent")
    frame, bytes_written = torch.zeros(1, 16, 1, 2, 2), 0
    for count in range(1, 101):
        before = growing._written
        growing.add(frame + count)
        held = load_file(str(growing.path))[latent_file.LATENT]
        assert 0.8 * count <= held.shape[2] <= count
        assert [int(x) for x in held[0, 0, :, 0, 0]] == list(range(1, held.shape[2] + 1))
        if growing._written != before:
            bytes_written += growing._written
    assert bytes_written < 6 * 100
    growing.write()
    assert load_file(str(growing.path))[latent_file.LATENT].shape[2] == 100
    growing.remove()
    assert [each for each in tmp_path.iterdir() if each.is_file()] == []
