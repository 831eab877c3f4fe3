"""Streamed VAE halves equal ComfyUI's own encode and decode to the bit, also after they ran out of
memory; tiles differ by what the report says.
"""

from __future__ import annotations

import os
import re

import comfy.ldm.wan.vae2_2
import comfy.model_management
import comfy.model_patcher
import comfy.sd
import comfy.utils
import folder_paths
import pytest
import torch

from frugal.demo.tiny_wan import fill, vae_shapes
from frugal.kernels.errors import FrugalError
from frugal.nodes.vae import decode_run, encode_run, halves, stream
from frugal.tests.helpers import rounding

OOM = comfy.model_management.OOM_EXCEPTION
TYPES = [torch.float32, torch.bfloat16]


def wan_vae(dtype: torch.dtype = torch.float32):
    made = comfy.sd.VAE(sd=fill(vae_shapes(4), 3, torch.float32), dtype=dtype)
    assert made.vae_dtype == dtype
    return made


@pytest.fixture(scope="module")
def vaes():
    return {dtype: wan_vae(dtype) for dtype in TYPES}


@pytest.fixture(scope="module")
def vae(vaes):
    return vaes[torch.float32]


@pytest.fixture(scope="module")
def vae22():
    """The VAE of Wan 2.2 with its own structure and few channels; ComfyUI's size is fixed."""
    made = wan_vae()
    model = comfy.ldm.wan.vae2_2.WanVAE(
        dim=4, dec_dim=4, z_dim=48, num_res_blocks=1, temperal_downsample=[False, True, True]
    )
    shapes = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    model.load_state_dict(fill(shapes, 4, torch.float32))
    made.first_stage_model = model.eval()
    patcher = getattr(comfy.model_patcher, "CoreModelPatcher", comfy.model_patcher.ModelPatcher)
    made.patcher = patcher(model, made.device, made.patcher.offload_device)
    made.latent_channels = 48
    made.upscale_ratio = (made.upscale_ratio[0], 16, 16)
    made.downscale_ratio = (made.downscale_ratio[0], 16, 16)
    return made


def latent(frames: int, height: int = 2, width: int = 3, batch: int = 1, channels: int = 16):
    make = torch.Generator().manual_seed(frames)
    return {"samples": torch.randn(batch, channels, frames, height, width, generator=make)}


def clip(frames: int, height: int = 16, width: int = 24) -> torch.Tensor:
    make = torch.Generator().manual_seed(frames)
    return torch.rand(frames, height, width, 3, generator=make)


def whole(vae, given: dict) -> torch.Tensor:
    with torch.inference_mode():
        images = vae.decode(given["samples"])
    return images.reshape(-1, *images.shape[-3:])


def decode(vae, given, tile=0, overlap=64):
    with torch.inference_mode():
        return decode_run.to_images(vae, given, tile, overlap)


def encode(vae, images=None, video=None, tile=0, overlap=64):
    with torch.inference_mode():
        given, report = encode_run.encode(vae, images, video, tile, overlap)
    return given["samples"], report


def kept() -> list[str]:
    found = folder_paths.get_input_directory()
    os.makedirs(found, exist_ok=True)
    return sorted(name for name in os.listdir(found) if name.startswith(decode_run.KEPT))


DECODED = [(torch.float32, frames) for frames in (1, 2, 3, 4, 5, 8, 9, 41)]
DECODED += [(torch.bfloat16, frames) for frames in (1, 2, 5, 8)]


@pytest.mark.parametrize(("dtype", "frames"), DECODED)
def test_decode_equals_the_whole(vaes, dtype, frames):
    given = latent(frames)
    images, _ = decode(vaes[dtype], given)
    expected = whole(vaes[dtype], given)
    assert images.shape[0] == 4 * frames - 3 and images.dtype == expected.dtype
    assert torch.equal(images, expected) and kept() == []


@pytest.mark.parametrize("frames", [1, 2, 5, 6, 7, 8, 9, 13, 21])
def test_encode_equals_the_whole(vae, frames):
    images = clip(frames)
    samples, report = encode(vae, images)
    with torch.inference_mode():
        expected = vae.encode(images)
    assert samples.dtype == expected.dtype and torch.equal(samples, expected)
    assert samples.shape[2] == 1 + (frames - 1) // 4
    assert ("left out" in report) == (frames % 4 != 1)


def test_encode_in_16_bit_and_cropped(vaes):
    images = clip(9, 21, 27)
    samples, report = encode(vaes[torch.bfloat16], images)
    with torch.inference_mode():
        assert torch.equal(samples, vaes[torch.bfloat16].encode(images))
    assert "27 x 21 are cropped" in report


def test_batch_and_mask(vae):
    given = latent(3, batch=2) | {"noise_mask": torch.ones(1, 1, 2, 3)}
    images, report = decode(vae, given)
    assert images.shape[0] == 18 and "2 clips" in report
    alone = [whole(vae, {"samples": given["samples"][item : item + 1]}) for item in range(2)]
    assert torch.equal(images, torch.cat(alone)) and not torch.equal(*alone)
    # Together, the sums of ComfyUI's convolutions are rounded in another order.
    added = rounding.terms(vae.first_stage_model.decoder, 2 * 3, torch.float32)
    within = rounding.bound(torch.float32, added)
    assert rounding.distance(images, whole(vae, given)) < within


@pytest.mark.parametrize("frames", [1, 2, 5])
def test_the_vae_of_wan_2_2(vae22, frames):
    given = latent(frames, channels=48)
    images, _ = decode(vae22, given)
    assert images.shape == (4 * frames - 3, 32, 48, 3)
    assert torch.equal(images, whole(vae22, given))
    pictures = clip(4 * frames - 3, 32, 48)
    samples, _ = encode(vae22, pictures)
    with torch.inference_mode():
        assert torch.equal(samples, vae22.encode(pictures))


class Failing:
    """The network's forward, out of memory in the middle of chosen calls."""

    def __init__(self, monkeypatch, network, calls):
        self.count, self.calls = 0, set(calls)
        layer, own = network.head[-1], network.head[-1].forward

        def forward(*arguments, **more):
            self.count += 1
            if self.count in self.calls:
                raise OOM("injected")
            return own(*arguments, **more)

        # The last layer, so that the state of all others has been replaced by then.
        monkeypatch.setattr(layer, "forward", forward)


def layer_calls(vae, given, monkeypatch) -> int:
    with monkeypatch.context() as patch:
        counting = Failing(patch, vae.first_stage_model.decoder, ())
        decode(vae, given)
    return counting.count


def test_out_of_memory_once_at_any_piece_changes_nothing(vae, monkeypatch):
    given = latent(4)
    expected, _ = decode(vae, given)
    total = layer_calls(vae, given, monkeypatch)
    assert total >= 3
    for place in range(1, total + 1):
        with monkeypatch.context() as patch:
            Failing(patch, vae.first_stage_model.decoder, [place])
            images, report = decode(vae, given)
        assert torch.equal(images, expected), place
        [note] = re.findall(r"note: out of memory at latent \d+: (.*)", report)
        assert note == "the state was moved to main memory; same result"


def test_out_of_memory_in_encode_changes_nothing(vae, monkeypatch):
    images = clip(9)
    expected, _ = encode(vae, images)
    Failing(monkeypatch, vae.first_stage_model.encoder, [2])
    samples, report = encode(vae, images)
    assert torch.equal(samples, expected) and "out of memory" in report


def test_out_of_memory_twice_goes_on_in_tiles(vae, monkeypatch):
    given = latent(4, 4, 14)
    expected, _ = decode(vae, given)
    with monkeypatch.context() as patch:
        # The second piece fails whole, then whole with the state parked.
        Failing(patch, vae.first_stage_model.decoder, [2, 3])
        images, report = decode(vae, given)
    assert "continued in 3 tiles of 64 x 32 pixels" in report and report.count("note:") == 2
    assert torch.equal(images[:1], expected[:1])
    off = (images - expected).abs()
    # Not the same, but the same picture: a state lost or put in the wrong place would show.
    assert 0 < off.mean() < 0.25 * (expected - expected.mean()).abs().mean()
    monkeypatch.setattr(stream.VaeStream, "_run", lambda *_: (_ for _ in ()).throw(OOM("always")))
    with pytest.raises(FrugalError, match="even in tiles of 64 x 32 pixels"):
        decode(vae, given)
    [name] = kept()
    remove(name)


def remove(name: str) -> None:
    os.remove(os.path.join(folder_paths.get_input_directory(), name))


def test_two_tiles_are_two_whole_decodes_blended(vae):
    """Each tile keeps its own state; the oracle decodes each part of the LATENT alone."""
    given = latent(4, 8, 12)
    images, report = decode(vae, given, 64, 32)
    left, right = (given["samples"][..., start : start + 8] for start in (0, 4))
    with torch.inference_mode():
        left, right = (vae.first_stage_model.decode(part) for part in (left, right))
        fall = 1 - (torch.arange(32) + 0.5) / 32
        middle = left[..., 32:] * fall + right[..., :32] * (1 - fall)
        blended = torch.cat([left[..., :32], middle, right[..., 32:]], -1)
        expected = vae.process_output(blended)[0].movedim(0, -1)
    assert (images - expected).abs().max() < 1e-5
    # What the report says is what can be seen in the first frame.
    off = (images[0] - whole(vae, given)[0]).abs()
    [largest, mean] = re.search(r"at most ([\d.]+), on average ([\d.]+), of", report).groups()
    assert off.max() > 0.01 and float(off.max()) == pytest.approx(float(largest), abs=1e-4)
    assert float(off.mean()) == pytest.approx(float(mean), abs=1e-5)


def test_seams_are_not_measured_where_a_frame_does_not_fit(vae, monkeypatch):
    monkeypatch.setattr(comfy.model_management, "get_free_memory", lambda *_, **__: 1)
    report = decode(vae, latent(1, 8, 12), 64, 32)[1]
    assert "2 tiles: the first frame does not fit in one, the seams are not measured" in report


def test_tiles_of_encode_report_their_difference(vae):
    images = clip(5, 64, 96)
    samples, report = encode(vae, images, tile=64, overlap=32)
    with torch.inference_mode():
        off = (samples - vae.encode(images))[:, :, :1].abs().max()
    largest = re.search(r"2 tiles change the first latent by at most ([\d.]+)", report)[1]
    assert off > 1e-3 and float(off) == pytest.approx(float(largest), abs=1e-4)


def test_a_tile_that_covers_all_is_exact(vae):
    given = latent(3)
    assert torch.equal(decode(vae, given, 64)[0], whole(vae, given))


def test_only_one_piece_is_asked_for(vae, monkeypatch):
    asked = []
    own = comfy.model_management.load_models_gpu

    def load(models, memory_required=0, **more):
        asked.append(memory_required)
        return own(models, memory_required=memory_required, **more)

    monkeypatch.setattr(comfy.model_management, "load_models_gpu", load)
    for frames in (9, 21):
        decode(vae, latent(frames))
    assert asked[0] == asked[1] == vae.memory_used_decode((1, 16, 5, 2, 3), torch.float32)


def test_state_does_not_grow(vae):
    sizes = []
    for frames in (5, 9, 21):
        report = decode(vae, latent(frames))[1]
        sizes.append(re.search(r"between chunks: ([\d.]+ \w+)", report)[1])
    assert len(set(sizes)) == 1 and sizes[0] != "0.0 MB"


def test_cancel_between_pieces_leaves_nothing(vae, monkeypatch):
    pieces = []
    own = stream.VaeStream.feed

    def feed(self, piece, call):
        pieces.append(call)
        comfy.model_management.interrupt_current_processing(len(pieces) == 2)
        return own(self, piece, call)

    monkeypatch.setattr(stream.VaeStream, "feed", feed)
    with pytest.raises(comfy.model_management.InterruptProcessingException):
        decode(vae, latent(9))
    assert len(pieces) == 2 and kept() == []
    comfy.model_management.interrupt_current_processing(False)


def test_a_failed_decode_keeps_the_latent_for_load_latent(vae, monkeypatch):
    import nodes

    given = latent(5)
    expected, _ = decode(vae, given)
    own = stream.VaeStream.feed

    def feed(self, piece, call):
        if call.start > 2:
            raise RuntimeError("the card fell off the bus")
        return own(self, piece, call)

    with monkeypatch.context() as patch:
        patch.setattr(stream.VaeStream, "feed", feed)
        with pytest.raises(FrugalError, match=r"after frame \d+ of 17 .*fell off") as caught:
            decode(vae, given)
    [name] = kept()
    assert f"input/{name}" in caught.value.found and name in caught.value.do
    [loaded] = nodes.LoadLatent().load(name)
    assert torch.equal(decode(vae, loaded)[0], expected)
    remove(name)


def test_progress_and_preview_of_every_piece(vae, monkeypatch):
    seen = []

    def hook(value, total, preview, node_id=None):
        seen.append((value, total, preview))

    monkeypatch.setattr(comfy.utils, "PROGRESS_BAR_HOOK", hook)
    images, _ = decode(vae, latent(5))
    assert [value for value, _, _ in seen] == sorted({value for value, _, _ in seen})
    assert seen[-1][:2] == (17, 17)
    form, picture, _ = seen[-1][2]
    assert form == "JPEG" and picture.size == (24, 16)
    assert picture.getpixel((3, 5)) == tuple((images[-1, 5, 3] * 255).round().byte().tolist())


def test_refusals(vae):
    sd = {name: torch.zeros(shape) for name, shape in taesd_shapes().items()}
    other = comfy.sd.VAE(sd=sd)
    for call in (lambda: decode(other, latent(3)), lambda: encode(other, clip(5))):
        with pytest.raises(FrugalError, match=r"use ComfyUI's own 'VAE.*keeps no state"):
            call()
    for shape in ((1, 16, 8, 8), (1, 48, 3, 8, 8), (1, 16, 0, 8, 8)):
        with pytest.raises(FrugalError, match="has the shape"):
            decode(vae, {"samples": torch.zeros(shape)})
    with pytest.raises(FrugalError, match="neither images nor a video"):
        encode(vae)
    with pytest.raises(FrugalError, match="has no frames"):
        encode(vae, torch.zeros(0, 16, 16, 3))
    with pytest.raises(FrugalError, match="at least 8 x 8"):
        encode(vae, torch.zeros(1, 16, 4, 3))


def taesd_shapes() -> dict:
    import comfy.taesd.taesd

    model = comfy.taesd.taesd.TAESD(latent_channels=4)
    return {name: value.shape for name, value in model.state_dict().items()}


def test_the_vae_is_left_as_it_was(vae):
    before = {name: value.clone() for name, value in vae.first_stage_model.state_dict().items()}
    modules = [name for name, _ in vae.first_stage_model.named_modules()]
    decode(vae, latent(3))
    encode(vae, clip(5))
    after = vae.first_stage_model.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[name], value) for name, value in before.items())
    assert [name for name, _ in vae.first_stage_model.named_modules()] == modules
    assert halves.decoder_of(vae, 9, 2, 3).cadence.used == 9
