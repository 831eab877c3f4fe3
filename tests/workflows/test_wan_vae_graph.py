"""The VAE nodes through a real server: the frames of VAE Decode, a file that plays, its LATENT."""

from __future__ import annotations

import io

import numpy as np
import pytest

from frugal.demo.tiny_wan import build_demo_wan
from frugal.tests.helpers.graphs import faults

pytestmark = pytest.mark.comfy
FRAMES, WIDTH, HEIGHT = 9, 64, 48


@pytest.fixture(scope="module")
def graph(server):
    files = {key: path.name for key, path in build_demo_wan(server.models).items()}
    size = {"width": WIDTH, "height": HEIGHT, "length": FRAMES, "batch_size": 1}
    kinds = {
        "1": ("VAELoader", {"vae_name": files["vae"]}),
        "2": ("EmptyHunyuanLatentVideo", size),
        "3": ("FrugalWanDecode", {"samples": ["2", 0], "vae": ["1", 0]}),
        "4": ("SaveImage", {"images": ["3", 0], "filename_prefix": "ours"}),
        "5": ("VAEDecode", {"samples": ["2", 0], "vae": ["1", 0]}),
        "6": ("SaveImage", {"images": ["5", 0], "filename_prefix": "theirs"}),
        "7": ("FrugalWanDecodeToFile", {
            "samples": ["2", 0], "vae": ["1", 0], "filename_prefix": "clips/wan", "fps": 16.0,
            "format": "MP4 (H.264)", "quality": "high",
        }),
        "8": ("FrugalWanEncode", {"vae": ["1", 0], "video": ["7", 0]}),
        "9": ("SaveLatent", {"samples": ["8", 0], "filename_prefix": "again"}),
    }  # fmt: skip
    return {key: {"class_type": kind, "inputs": given} for key, (kind, given) in kinds.items()}


def test_frames_file_and_latent(server, graph):
    import av
    from PIL import Image
    from safetensors.torch import load

    assert faults(graph, server.object_info()) == []
    steps: dict[str, list[tuple[int, int]]] = {}

    def follow(node: str, value: int, maximum: int) -> None:
        if maximum:
            steps.setdefault(node, []).append((value, maximum))

    result = server.run(graph, follow)
    assert (result.status, result.errors) == ("success", [])
    pictures: dict[str, list[np.ndarray]] = {"4": [], "6": []}
    found = {}
    for node, file in result.files():
        data = server.view(**file)
        if node in pictures:
            pictures[node].append(np.asarray(Image.open(io.BytesIO(data)).convert("RGB")))
        else:
            found[node] = data
    np.testing.assert_array_equal(np.stack(pictures["4"]), np.stack(pictures["6"]))
    assert len(pictures["4"]) == FRAMES and np.stack(pictures["4"]).std() > 5
    with av.open(io.BytesIO(found["7"])) as video:
        assert sum(1 for _ in video.decode(video=0)) == FRAMES
        assert "FrugalWanDecodeToFile" in video.metadata["prompt"]
    [name] = [path.name for path in (server.output / "clips").iterdir()]
    assert name == "wan_00001_.mp4"
    saved = list(server.output.glob("again_*.latent"))
    assert load(saved[0].read_bytes())["latent_tensor"].shape == (1, 16, 3, HEIGHT // 8, WIDTH // 8)
    for node in ("3", "7"):
        assert steps[node][-1] == (FRAMES, FRAMES) and len(steps[node]) >= 2
    assert result.previews >= 4
    assert not list((server.base / "input").glob("frugal_undecoded*"))


def test_a_latent_of_another_model_is_refused_before_anything_is_written(server, graph):
    picture = {"width": 64, "height": 64, "batch_size": 1}
    other = graph | {"2": {"class_type": "EmptyLatentImage", "inputs": picture}}
    result = server.run({key: other[key] for key in ("1", "2", "3", "4")})
    assert result.status == "error"
    assert any("the LATENT has the shape [1, 4, 8, 8]" in str(e) for e in result.errors)
    assert not list((server.base / "input").glob("frugal_undecoded*"))
