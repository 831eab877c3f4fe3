"""The all-in-one node and the batch node on a real server, against the nodes they stand for."""

from __future__ import annotations

import io

import numpy as np
import pytest
from PIL import Image

from frugal.demo.tiny_wan import save
from frugal.tests.helpers.builders import tryon_unet, tryon_vae

pytestmark = pytest.mark.comfy
SIZES = ((70, 60), (96, 64))  # of the two persons, (H, W)


@pytest.fixture(scope="module")
def inputs(server, tmp_path_factory):
    """Uploaded names of pictures and masks; tiny models in the server's folders."""
    import torch

    folder, rng, names = tmp_path_factory.mktemp("people"), np.random.default_rng(5), {}
    pictures = {"garment0": rng.integers(0, 256, (50, 40, 3), dtype=np.uint8)}
    pictures["garment1"] = 255 - pictures["garment0"]
    for i, (h, w) in enumerate(SIZES):
        pictures[f"person{i}"] = rng.integers(0, 256, (h, w, 3), dtype=np.uint8)
        pictures[f"mask{i}"] = np.zeros((h, w, 3), np.uint8)
        pictures[f"mask{i}"][20 : h - 25, 15 : w - 12] = 255
    for name, pixels in pictures.items():
        Image.fromarray(pixels).save(folder / f"people_{name}.png")
        names[name] = server.upload(folder / f"people_{name}.png")
    torch.manual_seed(0)
    unet = {name: value.contiguous() for name, value in tryon_unet((32, 64)).state_dict().items()}
    file = server.models / "diffusion_models" / "people_unet.safetensors"
    save(unet, file, {"num_heads": "4"})
    tryon_vae(server.models / "vae" / "people_vae.safetensors")
    server.object_info(fresh=True)
    return names


def graph(inputs, **nodes):
    """Loaders, pictures and masks, and the given nodes as key=(class, inputs)."""
    base = {
        "model": ("FrugalLoadCatVTON", {
            "base": "people_unet.safetensors",
            "attention": "none: base is a merged file", "weight_dtype": "fp32",
        }),
        "vae": ("VAELoader", {"vae_name": "people_vae.safetensors"}),
    }  # fmt: skip
    for name, file in inputs.items():
        kind = "LoadImageMask" if name.startswith("mask") else "LoadImage"
        more = {"channel": "red"} if kind == "LoadImageMask" else {}
        base[name] = (kind, {"image": file, **more})
    return {k: {"class_type": c, "inputs": i} for k, (c, i) in {**base, **nodes}.items()}


def by_hand(key, person, garment, seed, blur=2):
    """The five nodes wired one by one, and a save, with keys that end in `key`."""
    size = {"width": 64, "height": 96, "fit": "crop around mask"}
    return {
        f"prepare{key}": ("FrugalTryOnPrepare", {
            "person": [f"person{person}", 0], "garment": [f"garment{garment}", 0],
            "mask": [f"mask{person}", 0], "context": 25, "mask_threshold": 0.5, **size,
        }),
        f"condition{key}": ("FrugalTryOnConditioning", {
            "person_canvas": [f"prepare{key}", 0], "garment_canvas": [f"prepare{key}", 1],
            "mask_canvas": [f"prepare{key}", 2], "vae": ["vae", 0],
        }),
        f"sigmas{key}": ("FrugalTryOnSigmas", {"model": ["model", 0], "steps": 2, "eta": 1.0}),
        f"sample{key}": ("SamplerCustom", {
            "model": ["model", 0], "add_noise": True, "noise_seed": seed, "cfg": 2.5,
            "positive": [f"condition{key}", 0], "negative": [f"condition{key}", 1],
            "sampler": [f"sigmas{key}", 1], "sigmas": [f"sigmas{key}", 0],
            "latent_image": [f"condition{key}", 2],
        }),
        f"stitch{key}": ("FrugalTryOnStitch", {
            "samples": [f"sample{key}", 0], "vae": ["vae", 0], "frame": [f"prepare{key}", 3],
            "mask_blur": blur,
        }),
        f"hand{key}": ("SaveImage", {
            "images": [f"stitch{key}", 0], "filename_prefix": f"hand{key}",
        }),
    }  # fmt: skip


def all_in_one(seed, blur=2, **more):
    return {
        "tryon": ("FrugalTryOn", {
            "model": ["model", 0], "vae": ["vae", 0], "person": ["person0", 0],
            "garment": ["garment0", 0], "mask": ["mask0", 0], "width": 64, "height": 96,
            "fit": "crop around mask", "steps": 2, "cfg": 2.5, "eta": 1.0, "seed": seed,
            "mask_blur": blur, **more,
        }),
        "save": ("SaveImage", {"images": ["tryon", 0], "filename_prefix": "tryon"}),
        "canvas": ("SaveImage", {"images": ["tryon", 1], "filename_prefix": "canvas"}),
    }  # fmt: skip


def run(server, prompt):
    """Result and the saved pictures of each node, uint8 [H, W, 3]."""
    result = server.run(prompt)
    assert (result.status, result.errors) == ("success", [])
    shown: dict[str, list[np.ndarray]] = {}
    for node, file in result.files():
        with Image.open(io.BytesIO(server.view(**file))) as picture:
            shown.setdefault(node, []).append(np.asarray(picture.convert("RGB")))
    return result, shown


def test_one_node_gives_what_five_give(server, inputs):
    prompt = graph(inputs, **by_hand("", 0, 0, 11), **all_in_one(11))
    _, shown = run(server, prompt)
    np.testing.assert_array_equal(shown["save"][0], shown["hand"][0])
    assert shown["save"][0].shape == (*SIZES[0], 3) and shown["canvas"][0].shape == (96, 64, 3)
    _, other = run(server, graph(inputs, **all_in_one(12)))
    assert (other["save"][0] != shown["save"][0]).any(), "the seed has no effect"


def test_what_did_not_change_is_not_done_again(server, inputs):
    """Wires go through as wires, so the inner nodes keep their results between runs."""
    first, shown = run(server, graph(inputs, **all_in_one(21)))
    again, blurred = run(server, graph(inputs, **all_in_one(21, blur=0)))
    assert (shown["save"][0] != blurred["save"][0]).any()

    def ran(result, name):
        return any(node.endswith(f".{name}") for node in result.executed)

    assert ran(first, "sample") and ran(first, "stitch"), first.executed
    assert ran(again, "stitch") and not ran(again, "sample") and not ran(again, "condition")
    seeded, _ = run(server, graph(inputs, **all_in_one(22, blur=0)))
    assert ran(seeded, "sample") and not ran(seeded, "condition")


def test_an_error_inside_names_its_node(server, inputs):
    prompt = graph(inputs, **all_in_one(1, width=68))
    result = server.run(prompt)
    assert result.status == "error" and "multiples of 8 px" in result.errors[0], result.errors


def test_a_list_of_persons_and_garments_in_one_batch(server, inputs):
    """Two sizes of photo as lists through core's own list node, in order, with the same pixels."""
    lists = {
        "batch": ("FrugalTryOnBatch", {
            "model": ["model", 0], "vae": ["vae", 0], "persons": ["person0", 0],
            "garments": ["garments", 0], "masks": ["mask0", 0], "combine": "all combinations",
            "width": 64, "height": 96, "fit": "crop around mask", "steps": 2, "cfg": 2.5,
            "eta": 1.0, "seed": 31, "mask_blur": 2, "memory_budget": 0.0, "largest_group": 8,
        }),
        "garments": ("ImageBatch", {"image1": ["garment0", 0], "image2": ["garment1", 0]}),
        "save": ("SaveImage", {"images": ["batch", 0], "filename_prefix": "batch"}),
        "text": ("PreviewAny", {"source": ["batch", 1]}),
    }  # fmt: skip
    prompt = graph(inputs, **lists, **by_hand("a", 0, 0, 31), **by_hand("b", 0, 1, 32))
    result, shown = run(server, prompt)
    assert len(shown["save"]) == 2
    for picture, key in zip(shown["save"], "ab", strict=True):
        apart = np.abs(picture.astype(int) - shown[f"hand{key}"][0].astype(int))
        assert apart.max() <= 1, key
    assert (shown["save"][0] != shown["save"][1]).any()
    assert "groups of 2 " in str(result.outputs["text"])
