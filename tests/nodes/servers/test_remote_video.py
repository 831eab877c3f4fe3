"""The node that orders a video from a server, in ComfyUI."""

from __future__ import annotations

from io import BytesIO
from types import SimpleNamespace

import pytest
import torch
from PIL import Image

from frugal.kernels.errors import FrugalError
from frugal.servers import videos
from frugal.servers.dialects import VLLM
from frugal.tests.helpers.servers import scripted
from frugal.tests.helpers.video_server import Videos

WIDGETS = dict(
    dialect=VLLM,
    prompt="a cat",
    negative_prompt="",
    model="",
    width=64,
    height=32,
    frames=5,
    fps=16,
    steps=2,
    guidance=5.0,
    flow_shift=3.0,
    seed=1,
    timeout_minutes=15.0,
    filename_prefix="video/remote",
    key_variable="",
)


@pytest.fixture
def node(comfy_tree, tmp_path, monkeypatch):
    """The node class, with folders of its own and no server around it."""
    import folder_paths

    from frugal.nodes.servers.video import FrugalRemoteVideo

    for kind in ("user", "output"):
        place = tmp_path / kind
        monkeypatch.setattr(folder_paths, f"get_{kind}_directory", lambda place=place: str(place))
    monkeypatch.setattr(folder_paths, "output_directory", str(tmp_path / "output"))
    monkeypatch.setattr(videos, "POLL", 0.01)
    hidden = SimpleNamespace(unique_id=None)
    monkeypatch.setattr(FrugalRemoteVideo, "hidden", hidden, raising=False)
    return FrugalRemoteVideo


def run(node, one, **more):
    with scripted(one) as stub:
        return node.execute(**{**WIDGETS, "servers": f"\n{stub.url}/v1\n", **more})


def test_the_film_comes_in_as_images_and_as_a_file(node, tmp_path):
    one = Videos(VLLM)
    result = run(node, one)
    images, video, report = result.result
    assert images.shape == (5, 32, 64, 3) and images.dtype == torch.float32
    # It gets brighter from frame to frame, from 40 to 160 of 255.
    levels = images.mean((1, 2, 3)) * 255
    assert torch.allclose(levels, torch.linspace(40, 160, 5), atol=3)
    [path] = (tmp_path / "output" / "video").iterdir()
    assert path.suffix == ".mp4" and video.get_dimensions() == (64, 32)
    assert path.name in report and "5 frames of 64x32" in report
    assert path.name in str(result.ui.as_dict())
    # The same order again is the same job; a file of its own all the same.
    run(node, one)
    assert len(list((tmp_path / "output" / "video").iterdir())) == 2


def test_the_image_is_cut_and_scaled_to_the_video(node):
    one = Videos(VLLM, "i2v")
    halves = torch.cat([torch.zeros(1, 64, 64, 3), torch.ones(1, 64, 64, 3)], 2)
    run(node, one, image=halves)
    picture = Image.open(BytesIO(one.asked[0]["input_reference"]))
    assert picture.size == (64, 32)
    assert (picture.getpixel((5, 16)), picture.getpixel((60, 16))) == ((0, 0, 0), (255, 255, 255))


def test_what_came_instead_is_said(node):
    """A server that makes other frames than were asked for."""
    one = Videos(VLLM)

    async def shorter(request):
        for job in one.jobs.values():
            job["fields"]["num_frames"], job["size"] = 3, "32x32"

    one.on_content = shorter
    images, _, report = run(node, one).result
    assert images.shape == (3, 32, 32, 3)
    assert "note: 5 frames were asked for" in report and "note: 64x32 was asked for" in report


def test_what_cannot_be_read_is_an_error_and_kept(node, tmp_path):
    from aiohttp import web

    one = Videos(VLLM)

    async def noise(request):
        return web.Response(body=b"\x00" * 5000, content_type="video/mp4")

    one.on_content = noise
    with pytest.raises(FrugalError, match="kept in the output folder"):
        run(node, one)
    assert len(list((tmp_path / "output" / "video").iterdir())) == 1


def test_a_video_much_larger_than_asked_for_is_kept_and_not_unpacked(node, tmp_path, monkeypatch):
    from frugal.nodes.servers import video_run

    monkeypatch.setattr(video_run, "MOST_TIMES", 0.5)
    monkeypatch.setattr(video_run, "SMALL", 0)
    with pytest.raises(FrugalError, match=r"look at the file in the output folder.*or more frames"):
        run(node, Videos(VLLM))
    assert len(list((tmp_path / "output" / "video").iterdir())) == 1


def test_cancel(node):
    import comfy.model_management as mm

    one = Videos(VLLM, polls=10**9)
    presses = iter([True])

    # Once, as a person does: a second poll may come before the cancel is seen.
    async def press(request):
        if next(presses, False):
            mm.interrupt_current_processing()

    one.on_poll = press
    with pytest.raises(mm.InterruptProcessingException):
        run(node, one)
    assert one.deleted == ["video_gen_0"] and not mm.processing_interrupted()


def test_no_server(node):
    with pytest.raises(FrugalError, match="no server"):
        node.execute(**{**WIDGETS, "servers": " \n"})
