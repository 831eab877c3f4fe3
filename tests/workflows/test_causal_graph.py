"""On a real server a video made in two runs with a session between is the video of one run, and a
session comes back from the disk.
"""

from __future__ import annotations

import io

import av
import numpy as np
import pytest

from frugal.demo.tiny_wan import build_demo_wan
from frugal.tests.helpers.pictures import saved

pytestmark = pytest.mark.comfy
SIZE = {"width": 64, "height": 64, "batch_size": 1}


def video(session=None, length="5", keep=False) -> dict:
    inputs = {
        "causal_model": ["c", 0], "positive": ["2", 0], "negative": ["3", 0],
        "latent": [length, 0], "seed": 3, "steps": 2, "cfg": 2.0, "scheduler": "simple",
        "frames_per_block": 1, "recache": True, "keep_session": keep,
    }  # fmt: skip
    if session:
        inputs["session"] = session
    return {"class_type": "FrugalCausalSampler", "inputs": inputs}


@pytest.fixture(scope="module")
def nodes(server):
    files = {key: path.name for key, path in build_demo_wan(server.models).items()}
    model = {"model_name": files["t2v"], "weight_dtype": "default"}
    causal = {
        "wan_model": ["1", 0], "window": 2, "sink": 1, "positions": "relative", "kv_dtype": "int8",
        "kv_location": "device memory", "attention": "gathered", "max_cache_gb": 0.1, "shift": 5.0,
    }  # fmt: skip
    nodes = {
        "1": {"class_type": "FrugalLoadWan", "inputs": model},
        "c": {"class_type": "FrugalCausalModel", "inputs": causal},
        "4": {"class_type": "VAELoader", "inputs": {"vae_name": files["vae"]}},
    }
    for key, name in (("2", "positive"), ("3", "negative")):
        embeds = {"embeds_name": files[name]}
        nodes[key] = {"class_type": "FrugalLoadTextEmbeds", "inputs": embeds}
    for key, length in (("5", 5), ("9", 13)):
        sizes = {**SIZE, "length": length}
        nodes[key] = {"class_type": "EmptyHunyuanLatentVideo", "inputs": sizes}
    return nodes


def shown(samples: list, key: str) -> dict:
    return {
        f"d{key}": {"class_type": "VAEDecode", "inputs": {"samples": samples, "vae": ["4", 0]}},
        f"s{key}": {
            "class_type": "SaveImage",
            "inputs": {"images": [f"d{key}", 0], "filename_prefix": f"causal_{key}"},
        },
    }


def pictures(server, result, key: str) -> np.ndarray:
    return saved(server, result, f"s{key}")


def test_two_runs_are_one_and_a_session_comes_back(server, nodes):
    joined = {"samples1": ["a", 0], "samples2": ["b", 0], "dim": "t"}
    saved = {"session": ["a", 1], "filename_prefix": "graph"}
    graph = {
        **nodes,
        "a": video(keep=True),
        "b": video(["a", 1]),
        "j": {"class_type": "LatentConcat", "inputs": joined},
        "f": {"class_type": "FrugalSaveCausalSession", "inputs": saved},
        "w": video(length="9"),
        **shown(["j", 0], "parts"),
        **shown(["b", 0], "second"),
        **shown(["w", 0], "whole"),
    }
    graph["b"]["inputs"]["latent"] = ["5", 0]
    result = server.run(graph)
    assert (result.status, result.errors) == ("success", [])
    parts, whole = (pictures(server, result, key) for key in ("parts", "whole"))
    assert parts.shape[0] == whole.shape[0] == 13
    assert np.array_equal(parts, whole)

    path = next((server.base / "output" / "causal_sessions").glob("graph_*.safetensors"))
    loaded = {"session_name": path.name}
    again = {
        **nodes,
        "l": {"class_type": "FrugalLoadCausalSession", "inputs": loaded},
        "b": video(["l", 0]),
        **shown(["b", 0], "loaded"),
    }
    later = server.run(again)
    assert (later.status, later.errors) == ("success", [])
    assert np.array_equal(pictures(server, later, "loaded"), pictures(server, result, "second"))


def test_a_file_that_is_written_while_sampling_shows_the_same_video(server, nodes):
    """Its latents are those of the sampler node, its file is their decoded frames, on the node."""
    file = {
        "vae": ["4", 0], "filename_prefix": "causal/live", "fps": 16.0, "format": "MP4 (H.264)",
        "quality": "high", "decode_every": 2, "tile_size": 0, "overlap": 64,
    }  # fmt: skip
    whole = video(length="9")
    graph = {
        **nodes,
        "w": whole,
        "v": {"class_type": "FrugalCausalVideoFile", "inputs": {**whole["inputs"], **file}},
        **shown(["w", 0], "whole"),
        **shown(["v", 1], "live"),
    }
    result = server.run(graph)
    assert (result.status, result.errors) == ("success", [])
    whole, live = (pictures(server, result, key) for key in ("whole", "live"))
    assert np.array_equal(whole, live)
    (written,) = [server.view(**found) for where, found in result.files() if where == "v"]
    with av.open(io.BytesIO(written)) as container:
        frames = [each.to_ndarray(format="rgb24") for each in container.decode(video=0)]
    assert len(frames) == 13
    # Of the coloured noise that random weights make, a codec keeps brightness and little colour.
    brightness = np.array([0.2126, 0.7152, 0.0722])
    decoded, exact = np.stack(frames) @ brightness, whole @ brightness
    assert np.abs(decoded - exact).mean() < 0.25 * np.abs(decoded[::-1] - exact).mean()


def test_sampler_select_prompts_and_refusals(server, nodes):
    advanced = {
        "model": ["c", 0], "add_noise": True, "noise_seed": 3, "cfg": 1.0, "positive": ["2", 0],
        "negative": ["3", 0], "sampler": ["k", 0], "sigmas": ["g", 0], "latent_image": ["9", 0],
    }  # fmt: skip
    steps = {"model": ["c", 0], "scheduler": "simple", "steps": 2, "denoise": 1.0}
    prompt = {"conditioning": ["3", 0], "from_second": 0.5}
    graph = {
        **nodes,
        "k": {"class_type": "FrugalCausalSamplerSelect", "inputs": {"frames_per_block": 2}},
        "g": {"class_type": "BasicScheduler", "inputs": steps},
        "a": {"class_type": "SamplerCustom", "inputs": advanced},
        "p": {"class_type": "FrugalCausalPrompt", "inputs": prompt},
        "w": video(length="9"),
        **shown(["a", 0], "custom"),
        **shown(["w", 0], "changed"),
    }
    graph["w"]["inputs"]["prompts"] = ["p", 0]
    result = server.run(graph)
    assert (result.status, result.errors) == ("success", [])
    assert pictures(server, result, "custom").shape[0] == 13
    assert pictures(server, result, "changed").shape[0] == 13

    graph["a"]["inputs"]["model"] = graph["g"]["inputs"]["model"] = ["1", 0]
    kept = ("a", "k", "g", "dcustom", "scustom")
    refused = server.run({**nodes, **{key: graph[key] for key in kept}})
    assert refused.status == "error"
    assert "a model that is not causal" in refused.errors[0]
