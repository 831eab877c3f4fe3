"""The loop of a video VAE is learnt from the loop itself, tiles cover and join."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from frugal.kernels.errors import FrugalError
from frugal.kernels.video.cadence import observe
from frugal.kernels.video.latent_file import write_latent
from frugal.kernels.video.tiles import cut, grid, join


def loop(self, z, listed, step, patch):
    state = [None] * sum(isinstance(m, nn.Conv3d) for m in self.network.modules())
    x, out = self.conv2(z), None
    for start in [0, *range(1, x.shape[2], step)]:
        stop = 1 if start == 0 else start + step
        made = self.network(x[:, :, start:stop], feat_cache=state, feat_idx=[0], first=start == 0)
        if out is None:
            out = made
        elif listed:
            out += made
        else:
            out = torch.cat([out, made], 2)
    out = torch.cat(out, 2) if listed else out
    return out.repeat_interleave(patch, -1) if patch > 1 else out


def model(listed=False, step=1, patch=1, run=None):
    class Made(nn.Module):
        def decode(self, z):
            return (run or loop)(self, z, listed, step, patch)

    made = Made()
    made.network = nn.Sequential(nn.Conv3d(1, 1, 1), nn.Conv3d(1, 1, 1))
    made.network.forward = lambda *_: pytest.fail("the network was run")
    return made


@pytest.mark.parametrize("listed", [False, True])
@pytest.mark.parametrize(("step", "frames"), [(1, 1), (1, 4), (2, 4), (2, 5), (4, 9)])
def test_calls_are_those_of_the_loop(listed, step, frames):
    cadence = observe(model(listed, step), "decode", "network", frames)
    places = [place for call in cadence.calls for place in range(call.start, call.stop)]
    assert places == list(range(frames)) and cadence.used == frames
    lengths = [call.stop - call.start for call in cadence.calls]
    assert lengths[0] == 1 and set(lengths[1:-1]) <= {step}
    assert [call.flags for call in cadence.calls] == [
        {"first": n == 0} for n in range(len(lengths))
    ]
    assert (cadence.slots, cadence.patch) == (2, 1)


def test_patches_are_noticed():
    assert observe(model(patch=2), "decode", "network", 3).patch == 2


def backwards(self, z, *_):
    for start in reversed(range(z.shape[2])):
        out = self.network(z[:, :, start : start + 1], feat_cache=[], feat_idx=[0])
    return out


def at_once(self, z, *_):
    return z


@pytest.mark.parametrize("run", [backwards, at_once])
def test_another_loop_is_refused(run):
    with pytest.raises(FrugalError, match="not known here"):
        observe(model(run=run), "decode", "network", 3)


SIDES = st.integers(1, 40)


@settings(max_examples=60, deadline=None)
@given(SIDES, SIDES, SIDES, SIDES, st.integers(0, 20), st.integers(1, 3))
def test_tiles_cover_and_join_what_was_cut(height, width, rows, columns, overlap, scale):
    tiles = grid(height, width, (rows, columns), overlap)
    make = torch.Generator().manual_seed(height)
    picture = torch.rand(2, height * scale, width * scale, generator=make)
    parts = [cut(picture, tile, height) for tile in tiles]
    assert {part.shape for part in parts} == {
        (2, min(rows, height) * scale, min(columns, width) * scale)
    }
    torch.testing.assert_close(join(parts, tiles, height, width), picture)
    shared = min(overlap, min(columns, width) // 2)
    starts = sorted({tile.left for tile in tiles})
    assert all(b - a <= min(columns, width) - shared for a, b in pairwise(starts))


def test_blend_goes_evenly_from_one_tile_to_the_next():
    tiles = grid(2, 6, (2, 4), 2)
    assert [tile.left for tile in tiles] == [0, 2]
    zero, one = torch.zeros(2, 4), torch.ones(2, 4)
    row = join([zero, one], tiles, 2, 6)[0]
    torch.testing.assert_close(row, torch.tensor([0, 0, 0.25, 0.75, 1, 1]))


def test_latent_file_is_whole_or_not_there(tmp_path, monkeypatch):
    from safetensors.torch import load_file

    samples = torch.randn(1, 16, 3, 2, 2).to(torch.bfloat16).movedim(2, 3)
    write_latent(samples, tmp_path / "a.latent")
    found = load_file(tmp_path / "a.latent")
    assert torch.equal(found["latent_tensor"], samples)
    assert found["latent_format_version_0"].numel() == 0
    monkeypatch.setattr("os.replace", lambda *_: (_ for _ in ()).throw(OSError("disk")))
    with pytest.raises(OSError):
        write_latent(samples, tmp_path / "b.latent")
    assert [path.name for path in tmp_path.iterdir()] == ["a.latent"]
