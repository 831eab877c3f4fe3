"""A whole video by the node: in one run or several, with prompts that change, kept on disk."""

from __future__ import annotations

import gc
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file

from frugal.kernels.causal import session_file
from frugal.kernels.errors import FrugalError
from frugal.kernels.memory.causal import Needs
from frugal.nodes.causal import model_run, session_files
from frugal.nodes.causal.video_run import Settings, make_video, segments
from frugal.tests.helpers import causal as videos

KEEP = Settings(9, 2, 1.0, "simple", 2, keep=True)
DROP = Settings(9, 2, 1.0, "simple", 2)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    plain = videos.load(tmp_path_factory.mktemp("causal"))
    return videos.causal(plain, window=4, sink=1, relative=True)


def prompt(seed=5):
    return [[videos.prompt_of(seed), {}]]


def made(model, frames, settings=DROP, positive=5, **more):
    latent = {"samples": torch.zeros(1, 16, frames, 8, 8)}
    with torch.inference_mode():
        found, session, report = make_video(
            model, prompt(positive), prompt(6), latent, settings, **more
        )
    return found["samples"], session, report


def test_a_session_goes_on_as_one_run_and_stays_as_it_is(model):
    whole, empty, report = made(model, 8)
    assert not empty.kept
    assert "8 latent frames in 11 model calls\n3 of 6 frames in the cache" in report
    first, session, report = made(model, 4, KEEP)
    assert "4 latent frames in 6 model calls\n4 of 4 frames in the cache" in report
    # Parked: nothing of it is where attention runs, all of it in main memory.
    pool = session.pool
    assert (pool.used_bytes, pool.held_bytes) == (0, 0)
    assert pool.away_bytes == 2 * 4 * pool.page_bytes
    for _ in range(2):
        second, later, _ = made(model, 4, KEEP, session=session)
        assert torch.equal(torch.cat([first, second], dim=2), whole)
        assert [each.frame for each in session.kept] == [0, 1, 2, 3]
        assert [each.frame for each in later.kept] == [0, 4, 5, 6, 7]
    del later
    gc.collect()
    assert pool.away_bytes == 2 * 4 * pool.page_bytes
    assert not torch.equal(made(model, 4)[0], second)


def test_prompts_change_where_they_should(model):
    whole, _, _ = made(model, 8, prompts=((1.0, prompt(7)),))
    first, session, _ = made(model, 4, KEEP)
    for recache in (True, False):
        settings = Settings(9, 2, 1.0, "simple", 2, recache=recache)
        second = made(model, 4, settings, positive=7, session=session)[0]
        assert torch.equal(torch.cat([first, second], dim=2), whole) is recache
    assert torch.equal(made(model, 4)[0], first)


def test_parts_of_a_run():
    a, b, c = "abc"
    assert segments(a, (), 7, 3) == [(0, 7, a)]
    # Second 1 is latent frame 4, in the block from 3: the next block begins at 6.
    assert segments(a, ((5.0, c), (1.0, b)), 30, 3) == [(0, 6, a), (6, 21, b), (21, 30, c)]
    assert segments(a, ((0.0, b), (90.0, c)), 30, 3) == [(0, 30, b)]
    with pytest.raises(FrugalError, match="latent frame 6"):
        segments(a, ((1.0, b), (1.5, c)), 30, 3)


def test_given_start_frames_come_first(model, monkeypatch):
    start = {"samples": torch.randn(1, 16, 1, 8, 8, generator=torch.Generator().manual_seed(2))}
    found, session, _ = made(model, 5, KEEP, start=start)
    assert torch.equal(found[:, :, :1], start["samples"])
    assert found.shape[2] == session.next_frame == 5
    # Their keys and values need room as those of a session do.
    told = []
    monkeypatch.setattr(model_run, "Needs", lambda *what: told.append(what) or Needs(*what))
    made(model, 5, start=start)
    made(model, 4, session=session)
    assert told == [(2, 1, 1), (2, 5, 1)]
    other = {"samples": start["samples"] + 1}
    assert videos.far(made(model, 5, start=other)[0][:, :, 1:], found[:, :, 1:]) > 1e-4


@pytest.mark.parametrize("kind", ["model", "fp8", "int8"])
def test_a_saved_session_goes_on_to_the_bit(model, kind, tmp_path):
    if kind != "model":
        model = videos.causal(model, window=4, kind=kind)
    _, session, _ = made(model, 4, KEEP)
    path = tmp_path / "session.safetensors"
    session_file.save(session, path)
    assert [each.name for each in tmp_path.iterdir()] == [path.name]
    back = session_file.load(path, torch.device("cpu"))
    assert (back.error, back.kept) == (session.error, session.kept)
    wanted = made(model, 4, session=session)[0]
    assert torch.equal(made(model, 4, session=back)[0], wanted)


def test_a_damaged_session_is_refused(model, tmp_path):
    path = tmp_path / "session.safetensors"
    session_file.save(made(model, 2, KEEP)[1], path)
    cpu = torch.device("cpu")
    metadata = session_file.safe_open(path, framework="pt").metadata()
    tensors = load_file(path)
    gone = dict(tensors)
    gone.pop("0.1.1.v")
    save_file(gone, tmp_path / "gone.safetensors", metadata)
    with pytest.raises(FrugalError, match=r"gone\.safetensors cannot be read"):
        session_file.load(tmp_path / "gone.safetensors", cpu)
    narrow = tensors | {"0.1.1.v": tensors["0.1.1.v"][:, :3].contiguous()}
    save_file(narrow, tmp_path / "narrow.safetensors", metadata)
    with pytest.raises(FrugalError, match=r"0\.1\.1\.v is"):
        session_file.load(tmp_path / "narrow.safetensors", cpu)
    save_file(tensors, tmp_path / "other.safetensors", {"format": "pt"})
    with pytest.raises(FrugalError, match="no session"):
        session_file.load(tmp_path / "other.safetensors", cpu)
    (tmp_path / "cut.safetensors").write_bytes(path.read_bytes()[:-40])
    with pytest.raises(FrugalError, match=r"cut\.safetensors cannot be read"):
        session_file.load(tmp_path / "cut.safetensors", cpu)


def test_files_stay_in_their_folder(model, tmp_path, monkeypatch):
    import folder_paths

    monkeypatch.setattr(folder_paths, "get_output_directory", lambda: str(tmp_path))
    _, session, _ = made(model, 2, KEEP)
    names = [session_files.save(session, "trip/day").name for _ in range(2)]
    assert names == ["day_00001_.safetensors", "day_00002_.safetensors"]
    assert session_files.names() == [f"trip/{name}" for name in names]
    assert session_files.load(f"trip/{names[0]}").next_frame == 2
    for bad in ("../day.safetensors", "trip/none.safetensors"):
        with pytest.raises(FrugalError):
            session_files.load(bad)
    with pytest.raises(FrugalError, match="name is empty"):
        session_files.save(session, " ")


def test_what_cannot_be_made_is_refused_and_leaves_the_session(model):
    _, empty, _ = made(model, 2)
    _, session, _ = made(model, 4, KEEP)
    before = session.pool.away_bytes
    start = {"samples": torch.zeros(1, 16, 1, 8, 8)}
    for words, more in (
        ("an empty session", {"session": empty}),
        ("a session and start frames", {"session": session, "start": start}),
        ("start frames", {"start": {"samples": torch.zeros(1, 16, 6, 8, 8)}}),
        ("condition 1 appears", {"session": session, "settings": Settings(9, 2, 3.0, "simple", 2)}),
        ("block of 5 frames", {"session": session, "settings": Settings(9, 2, 1.0, "simple", 5)}),
    ):
        with pytest.raises(FrugalError, match=words):
            made(model, 6, **more)
        assert (session.pool.used_bytes, session.pool.away_bytes) == (0, before)
    masked = {"samples": torch.zeros(1, 16, 2, 8, 8), "noise_mask": torch.ones(1, 1, 8, 8)}
    with pytest.raises(FrugalError, match="noise mask"):
        make_video(model, prompt(), prompt(6), masked, DROP)
    image = [[videos.prompt_of(5), {"concat_latent_image": torch.zeros(1, 16, 6, 8, 8)}]]
    with pytest.raises(FrugalError, match="start image and prompts that change"):
        made(model, 6, prompts=((1.0, image),))
    with pytest.raises(FrugalError, match="kind fp8 for a video"):
        other = videos.causal(model, window=4, relative=True, kind="fp8")
        made(other, 2, session=session)


@pytest.mark.parametrize("block", [1, 2])
def test_noise_of_neighbouring_seeds_and_frames_is_independent(model, block):
    """Of every frame, and of every step between: none repeats another, whatever the distance."""
    from frugal.kernels.causal.noise_seed import FRAME, STEP, noise_seed

    seen = {noise_seed(seed, FRAME, frame) for seed in range(60) for frame in range(60)}
    steps = {
        noise_seed(seed, STEP, block, step)
        for seed in range(30) for block in range(15) for step in range(8)
    }  # fmt: skip
    assert (len(seen), len(steps), len(seen & steps)) == (3600, 3600, 0)
    first, later = (
        made(model, 6, replace(DROP, seed=s, frames_per_block=block))[0] for s in (5, 6)
    )
    moved = torch.stack([later[:, :, :-1].flatten(), first[:, :, 1:].flatten()])
    still = torch.stack([later.flatten(), first.flatten()])
    assert abs(float(torch.corrcoef(moved)[0, 1]) - float(torch.corrcoef(still)[0, 1])) < 0.15


def test_a_session_of_other_weights_is_named(model, tmp_path):
    other = model.clone()
    key = "diffusion_model.blocks.0.ffn.0.weight"
    weight = dict(model.model.named_parameters())[key]
    other.add_patches({key: (torch.full_like(weight, 0.05),)})
    _, session, _ = made(model, 4, KEEP)
    mark = session.weights["mark"]
    session_files_saved = tmp_path / "s.safetensors"
    session_file.save(session, session_files_saved)
    session = session_file.load(session_files_saved, torch.device("cpu"))
    assert session.weights["mark"] == mark
    assert "recomputed" not in made(model, 2, KEEP, session=session)[2]
    with pytest.raises(FrugalError, match=r"^turn recache on, or connect .* a session made with"):
        made(other, 2, replace(KEEP, recache=False), session=session)
    _, later, report = made(other, 2, KEEP, session=session)
    assert mark in report and "with LoRAs on 1 layers" in report and "recomputed" in report
    # Made with the other model from here on.
    assert "recomputed" not in made(other, 2, KEEP, session=later)[2]
    assert "recomputed" not in made(model, 2, KEEP, session=session)[2]
