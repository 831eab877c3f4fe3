"""The try-on nodes as ComfyUI runs them: files in model folders, then the whole chain."""

from __future__ import annotations

from io import BytesIO

import comfy.sample
import comfy.sd
import comfy.utils
import folder_paths
import numpy as np
import pytest
import torch
from diffusers import UNet2DConditionModel
from PIL import Image
from safetensors.torch import save_file

from frugal.demo.codec import Codec
from frugal.kernels.checkpoints import catvton
from frugal.kernels.errors import FrugalError
from frugal.nodes.tryon import glue, nodes


def write_models(root):
    """A models folder with every kind of entry: tiny, random, in diffusers names."""
    torch.manual_seed(0)
    unet = UNet2DConditionModel(
        in_channels=9,
        out_channels=4,
        block_out_channels=(32, 64),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        layers_per_block=1,
        cross_attention_dim=8,
        attention_head_dim=4,
    )
    weights, codec = unet.state_dict(), Codec().export()
    attention = {}
    modules = [n for n, _ in unet.named_modules() if n.endswith("attn1")]
    for i, module in enumerate(sorted(modules, key=lambda n: n.startswith("mid_block"))):
        for tensor in catvton.TENSORS:
            attention[f"{8 * i}.{tensor}"] = -weights[f"{module}.{tensor}"]
    for file, tensors in (
        ("diffusion_models/tryon-tiny.safetensors", weights),
        ("CatVTON/sd/unet/diffusion_pytorch_model.safetensors", weights),
        ("CatVTON/sd/vae/diffusion_pytorch_model.safetensors", codec),
        ("CatVTON/mix/attention/model.safetensors", attention),
        ("CatVTON/merged.safetensors", weights),
        ("vae/tryon-tiny.safetensors", codec),
    ):
        path = root / file
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file({n: t.contiguous() for n, t in tensors.items()}, path, {"num_heads": "4"})
    (root / "CatVTON" / "readme.md").write_text("no model")


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """This process's model folders; the folder lists are put back afterwards."""
    root = tmp_path_factory.mktemp("models")
    write_models(root)
    kinds = ("diffusion_models", "checkpoints", "CatVTON", "vae")
    kept = {kind: folder_paths.folder_names_and_paths[kind] for kind in kinds}
    for kind in kinds:
        folder_paths.folder_names_and_paths[kind] = ([str(root / kind)], kept[kind][1])
    yield root
    folder_paths.folder_names_and_paths.update(kept)


def load_vae(name):
    """What core's VAELoader gives for that file."""
    path = folder_paths.get_full_path_or_raise("vae", name)
    return comfy.sd.VAE(sd=comfy.utils.load_torch_file(path))


def execute(node, *args):
    return node.PREPARE_CLASS_CLONE(None).execute(*args).args


def test_every_folder_entry_is_offered_once_and_nothing_else(models):
    assert sorted(glue.base_choices()) == [
        "merged.safetensors",
        "sd",
        "tryon-tiny.safetensors",
    ]
    assert glue.attention_choices() == [
        glue.NO_ATTENTION,
        "merged.safetensors",
        "mix/attention/model.safetensors",
    ]
    with pytest.raises(FrugalError, match="is not there"):
        glue.base_path("loras/x.safetensors")


def test_a_name_in_two_folders_takes_the_folder_with_it(models):
    twin, name = models / "checkpoints" / "tryon-tiny.safetensors", "tryon-tiny.safetensors"
    check = nodes.FrugalLoadCatVTON.validate_inputs
    assert check(base=name) is True and check(base=f"diffusion_models/{name}") is True
    twin.parent.mkdir(exist_ok=True)
    twin.write_bytes((models / "diffusion_models" / name).read_bytes())
    folder_paths.filename_list_cache.clear()
    try:
        both = [f"diffusion_models/{name}", f"checkpoints/{name}"]
        assert sorted(glue.base_choices()) == sorted([*both, "merged.safetensors", "sd"])
        assert [glue.base_path(choice) for choice in both] == [str(models / it) for it in both]
        said = check(base=name)
        assert said.startswith(f"choose '{both[0]}' or '{both[1]}' from the list: ")
        with pytest.raises(FrugalError, match="is there 2 times"):
            glue.base_path(name)
    finally:
        twin.unlink()
        folder_paths.filename_list_cache.clear()


def test_schemas_name_and_explain_every_socket():
    for node in nodes.NODES:
        schema = node.GET_SCHEMA()
        assert schema.node_id == node.__name__ and schema.category == "Frugal/try-on"
        assert schema.description and schema.description.isascii()
        for socket in (*schema.inputs, *schema.outputs):
            assert socket.tooltip and socket.tooltip.isascii(), (node, socket.id)


def chain(base, attention, photo, garment, mask, steps=3, fit="crop around mask"):
    model, report = execute(nodes.FrugalLoadCatVTON, base, attention, "fp32")
    vae = load_vae("tryon-tiny.safetensors")
    person, cloth, small, frame = execute(
        nodes.FrugalTryOnPrepare, photo, garment, mask, 64, 96, fit, 25, 0.5
    )
    positive, negative, latent = execute(nodes.FrugalTryOnConditioning, person, cloth, small, vae)
    sigmas, sampler = execute(nodes.FrugalTryOnSigmas, model, steps, 1.0)
    noise = comfy.sample.prepare_noise(latent["samples"], 5)
    samples = comfy.sample.sample_custom(
        model,
        noise,
        2.5,
        sampler,
        sigmas,
        positive,
        negative,
        latent["samples"],
        disable_pbar=True,
        seed=5,
    )
    return *execute(nodes.FrugalTryOnStitch, {"samples": samples}, vae, frame, 2), report


@torch.no_grad()
def test_the_whole_chain_changes_the_mask_and_nothing_else(models):
    g = torch.Generator().manual_seed(1)
    photo, garment = torch.rand(1, 131, 97, 3, generator=g), torch.rand(2, 50, 60, 4, generator=g)
    mask = torch.zeros(1, 131, 97)
    mask[:, 40:80, 30:70] = 1
    args = (photo, garment, mask)
    image, shown, report = chain("sd", "mix/attention/model.safetensors", *args)
    assert image.shape == (2, 131, 97, 3) and shown.shape == (2, 96, 64, 3)
    changed = (image != photo).any(dim=-1)
    assert changed[:, 45:75, 35:65].all()
    assert not changed[:, :34].any() and not changed[:, 86:].any()
    assert not changed[:, :, :24].any() and not changed[:, :, 76:].any()
    assert not torch.equal(image[0], image[1]), "the garment has no effect"
    assert "non-commercial" in report
    again = chain("sd", "mix/attention/model.safetensors", *args)[0]
    assert torch.equal(again, image)
    # The attention file counts: the same base alone paints something else, from any of its files.
    plain = chain("sd", glue.NO_ATTENTION, *args)
    assert not torch.equal(plain[0], image) and "non-commercial" not in plain[2]
    for base in ("merged.safetensors", "diffusion_models/tryon-tiny.safetensors"):
        assert torch.equal(chain(base, glue.NO_ATTENTION, *args)[0], plain[0])


@torch.no_grad()
def test_mismatched_wires_are_refused(models):
    photo = torch.rand(1, 40, 40, 3)
    made = execute(
        nodes.FrugalTryOnPrepare, photo, photo, torch.ones(1, 40, 40), 64, 96, "letterbox", 0, 0.5
    )
    vae = load_vae("tryon-tiny.safetensors")
    with pytest.raises(FrugalError, match="LATENT has the shape"):
        execute(nodes.FrugalTryOnStitch, {"samples": torch.zeros(1, 4, 12, 8)}, vae, made[3], 0)
    with pytest.raises(FrugalError, match="result 2, frame 3"):
        three = execute(
            nodes.FrugalTryOnPrepare,
            photo,
            photo.expand(3, -1, -1, -1),
            torch.ones(1, 40, 40),
            64,
            96,
            "letterbox",
            0,
            0.5,
        )
        execute(nodes.FrugalTryOnStitch, {"samples": torch.zeros(2, 4, 24, 8)}, vae, three[3], 0)
    with pytest.raises(FrugalError, match="differ"):
        execute(nodes.FrugalTryOnConditioning, made[0], photo, made[2], vae)


def api_graph(person, garment, mask, seed):
    """The stock KSampler way, in API form."""
    nodes = {
        "person": ("LoadImage", {"image": person}),
        "garment": ("LoadImage", {"image": garment}),
        "mask": ("LoadImageMask", {"image": mask, "channel": "red"}),
        "unet": (
            "FrugalLoadCatVTON",
            {
                "base": "sd",
                "attention": "mix/attention/model.safetensors",
                "weight_dtype": "auto",
            },
        ),
        "vae": ("VAELoader", {"vae_name": "tryon-tiny.safetensors"}),
        "prepare": (
            "FrugalTryOnPrepare",
            {
                "person": ["person", 0],
                "garment": ["garment", 0],
                "mask": ["mask", 0],
                "width": 64,
                "height": 128,
                "fit": "crop around mask",
                "context": 25,
                "mask_threshold": 0.5,
            },
        ),
        "condition": (
            "FrugalTryOnConditioning",
            {
                "person_canvas": ["prepare", 0],
                "garment_canvas": ["prepare", 1],
                "mask_canvas": ["prepare", 2],
                "vae": ["vae", 0],
            },
        ),
        "sampler": (
            "KSampler",
            {
                "model": ["unet", 0],
                "positive": ["condition", 0],
                "negative": ["condition", 1],
                "latent_image": ["condition", 2],
                "seed": seed,
                "steps": 4,
                "cfg": 2.5,
                "sampler_name": "euler_ancestral",
                "scheduler": "ddim_uniform",
                "denoise": 1.0,
            },
        ),
        "stitch": (
            "FrugalTryOnStitch",
            {
                "samples": ["sampler", 0],
                "vae": ["vae", 0],
                "frame": ["prepare", 3],
                "mask_blur": 2,
            },
        ),
        "save": ("SaveImage", {"images": ["stitch", 0], "filename_prefix": "tryon"}),
    }
    return {key: {"class_type": kind, "inputs": inputs} for key, (kind, inputs) in nodes.items()}


@pytest.mark.comfy
def test_the_stock_sampler_graph_through_the_server(server, tmp_path):
    write_models(server.models)
    server.object_info(fresh=True)
    g = np.random.default_rng(0)
    photo = g.integers(0, 256, (150, 101, 3), dtype=np.uint8)
    painted = np.zeros_like(photo)
    painted[50:100, 30:70] = 255
    names = []
    for name, pixels in (
        ("tryon-person", photo),
        ("tryon-mask", painted),
        ("tryon-garment", photo[:60, :80]),
    ):
        Image.fromarray(pixels).save(tmp_path / f"{name}.png")
        names.append(server.upload(tmp_path / f"{name}.png"))
    pictures = []
    for seed in (1, 2):
        result = server.run(api_graph(names[0], names[2], names[1], seed))
        assert result.status == "success", result.errors
        entry = next(entry for node, entry in result.files() if node == "save")
        pictures.append(np.array(Image.open(BytesIO(server.view(**entry)))))
        assert seed == 2 or "cross-attention skipped" in result.outputs["unet"]["text"][0]
    changed = (pictures[0] != photo).any(axis=-1)
    assert changed[53:97, 33:67].mean() > 0.9
    changed[44:106, 24:76] = False
    assert not changed.any()
    assert (pictures[0] != pictures[1]).any()


@pytest.mark.comfy
def test_a_list_of_photos_gives_them_all(server, tmp_path):
    """Three photos of three sizes through the one node and through the five it stands for."""
    write_models(server.models)
    g = np.random.default_rng(5)
    for kind in ("persons", "masks"):
        (server.base / "input" / kind).mkdir(parents=True, exist_ok=True)
    for i in range(3):
        photo = g.integers(0, 256, (90 + 9 * i, 70, 3), dtype=np.uint8)
        painted = np.zeros_like(photo)
        painted[30:60, 20:50] = 255
        Image.fromarray(photo).save(server.base / "input" / "persons" / f"{i}.png")
        Image.fromarray(painted).save(server.base / "input" / "masks" / f"{i}.png")
    Image.fromarray(g.integers(0, 256, (40, 40, 3), dtype=np.uint8)).save(tmp_path / "list-g.png")
    garment = server.upload(tmp_path / "list-g.png")
    server.object_info(fresh=True)
    five = api_graph(garment, garment, garment, 1)
    for key, folder in (("person", "persons"), ("painted", "masks")):
        five[key] = {"class_type": "LoadImageDataSetFromFolder", "inputs": {"folder": folder}}
    five["mask"] = {
        "class_type": "ImageToMask",
        "inputs": {"image": ["painted", 0], "channel": "red"},
    }
    one = {key: five[key] for key in ("person", "garment", "painted", "mask", "unet", "vae")}
    one["tryon"] = {
        "class_type": "FrugalTryOn",
        "inputs": {
            "model": ["unet", 0], "vae": ["vae", 0], "person": ["person", 0],
            "garment": ["garment", 0], "mask": ["mask", 0], "width": 64, "height": 128,
            "fit": "crop around mask", "steps": 2, "cfg": 1.0, "eta": 1.0, "seed": 3,
            "mask_blur": 2,
        },
    }  # fmt: skip
    for key, output in (("save", 0), ("canvas", 1)):
        one[key] = {
            "class_type": "SaveImage",
            "inputs": {"images": ["tryon", output], "filename_prefix": key},
        }
    photos = {"save": {90, 99, 108}}
    for graph, want in ((five, photos), (one, photos | {"canvas": {128}})):
        result = server.run(graph)
        assert result.status == "success", result.errors
        for key, heights in want.items():
            saved = [server.view(**entry) for node, entry in result.files() if node == key]
            found = [Image.open(BytesIO(data)).height for data in saved]
            assert len(found) == 3 and set(found) == heights, (key, found)
