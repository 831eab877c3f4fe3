"""A tiny try-on through a whole graph on a real server: photo, mask, sampling, stitch, report."""

from __future__ import annotations

import io
import json

import numpy as np
import pytest

from frugal.tests.helpers.builders import tryon_model, tryon_vae

pytestmark = pytest.mark.comfy
# Odd on purpose: the stitch has to find its way back from a canvas of another size.
WIDTH, HEIGHT = 83, 121
BOX = (slice(40, 90), slice(22, 61))


@pytest.fixture(scope="module")
def inputs(server, tmp_path_factory):
    """Uploaded names of a noisy photo, a garment and a mask, and the files of the models."""
    from PIL import Image

    folder, rng = tmp_path_factory.mktemp("tryon"), np.random.default_rng(1)
    mask = np.zeros((HEIGHT, WIDTH), np.uint8)
    mask[BOX] = 255
    pictures = {
        "person": rng.integers(0, 256, (HEIGHT, WIDTH, 3), dtype=np.uint8),
        "garment": rng.integers(0, 256, (70, 90, 3), dtype=np.uint8),
        "mask": np.repeat(mask[..., None], 3, axis=2),
    }
    names = {}
    for name, picture in pictures.items():
        Image.fromarray(picture).save(folder / f"tryon_{name}.png")
        names[name] = server.upload(folder / f"tryon_{name}.png")
    names["base"] = tryon_model(server.models / "diffusion_models" / "tryon_tiny.safetensors").name
    names["vae"] = tryon_vae(server.models / "vae" / "tryon_tiny_vae.safetensors").name
    return names


def graph(info: dict, inputs: dict[str, str], **widgets) -> dict:
    def node(kind: str, **given) -> dict:
        """A node with the defaults of its schema under the given values."""
        filled = {}
        for name, (type_, *rest) in info[kind]["input"].get("required", {}).items():
            if name in given:
                continue
            options = rest[0] if rest else {}
            if "default" in options:
                filled[name] = options["default"]
            elif isinstance(type_, list) or type_ == "COMBO":
                filled[name] = (type_ if isinstance(type_, list) else options["options"])[0]
        return {"class_type": kind, "inputs": {**filled, **given}}

    prepare = {"width": 64, "height": 96, **widgets}
    return {
        "person": node("LoadImage", image=inputs["person"]),
        "garment": node("LoadImage", image=inputs["garment"]),
        "mask": node("LoadImageMask", image=inputs["mask"], channel="red"),
        "refine": node("FrugalMaskRefine", mask=["mask", 0]),
        "model": node("FrugalLoadCatVTON", base=inputs["base"]),
        "vae": node("VAELoader", vae_name=inputs["vae"]),
        "prepare": node(
            "FrugalTryOnPrepare",
            person=["person", 0],
            garment=["garment", 0],
            mask=["refine", 0],
            **prepare,
        ),
        "cond": node(
            "FrugalTryOnConditioning",
            person_canvas=["prepare", 0],
            garment_canvas=["prepare", 1],
            mask_canvas=["prepare", 2],
            vae=["vae", 0],
        ),
        "sample": node(
            "KSampler",
            model=["model", 0],
            positive=["cond", 0],
            negative=["cond", 1],
            latent_image=["cond", 2],
            seed=3,
            steps=2,
            cfg=2.5,
            sampler_name="ddim",
            scheduler="ddim_uniform",
        ),
        "stitch": node(
            "FrugalTryOnStitch",
            samples=["sample", 0],
            vae=["vae", 0],
            frame=["prepare", 3],
            mask_blur=0,
        ),
        "report": node("FrugalReport", model=["model", 0], images=["stitch", 0]),
        "save": node("SaveImage", images=["stitch", 0]),
        # The untouched photo by the same two nodes, so that rounding on the way cancels.
        "plain": node("SaveImage", images=["person", 0], filename_prefix="plain"),
    }


def run(server, prompt: dict) -> tuple[np.ndarray, np.ndarray, dict]:
    """Dressed photo, untouched photo (uint8 [H, W, 3]) and what the report node left."""
    from PIL import Image

    result = server.run(prompt)
    assert (result.status, result.errors) == ("success", [])
    saved = {
        node: server.view(**file) for node, file in result.files() if node in ("save", "plain")
    }
    opened = {node: Image.open(io.BytesIO(data)) for node, data in saved.items()}
    pictures = {node: np.asarray(picture.convert("RGB")) for node, picture in opened.items()}
    return pictures["save"], pictures["plain"], result.outputs["report"]


@pytest.mark.parametrize("fit", ["crop around mask", "letterbox"])
def test_only_the_masked_area_changes(server, inputs, fit):
    dressed, plain, report = run(server, graph(server.object_info(fresh=True), inputs, fit=fit))
    assert dressed.shape == plain.shape == (HEIGHT, WIDTH, 3)
    outside = np.ones((HEIGHT, WIDTH), bool)
    outside[BOX] = False
    np.testing.assert_array_equal(dressed[outside], plain[outside])
    assert (dressed[BOX] != plain[BOX]).mean() > 0.9
    numbers = json.loads(report["frugal_report"][0])
    assert numbers and report["text"][0].strip()


def test_an_empty_mask_is_refused_with_a_remedy(server, inputs):
    prompt = graph(server.object_info(fresh=True), inputs)
    prompt["mask"] = {
        "class_type": "SolidMask",
        "inputs": {"value": 0.0, "width": WIDTH, "height": HEIGHT},
    }
    result = server.run(prompt)
    assert result.status == "error"
    assert len(result.errors) == 1 and result.errors[0].startswith("FrugalTryOnPrepare: ")
    assert "mask" in result.errors[0] and "expected" in result.errors[0]
