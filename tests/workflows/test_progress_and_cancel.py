"""Every long operation shows how far it is, and stops where it is when its user says so."""

from __future__ import annotations

import shutil

import pytest
from PIL import Image

from frugal.demo.comfy_server import pack_node_ids
from frugal.demo.graph_builder import Node, build
from frugal.demo.layout import MODELS
from frugal.demo.tiny_wan import WanSize, build_demo_wan, fill, save, wan_shapes
from frugal.kernels.masks.labels import ATR
from frugal.kernels.tryon.precision import INT8
from frugal.tests.helpers.parsers import save_parser

pytestmark = pytest.mark.comfy
DEEP = "cancel_deep"
TRYON = "frugal_demo_tryon_base.safetensors"
ATTENTION = "frugal_demo_tryon_attention.safetensors"
STEPS, FRAMES = 200, 161
# Long nodes whose cancel tests/nodes covers, with a stand-in for the server or model they need.
ELSEWHERE = {
    "FrugalCalibrate", "FrugalCausalVideoFile", "FrugalClothMask", "FrugalMaskBBoxCrop",
    "FrugalMaskBBoxUncrop", "FrugalMaskClean", "FrugalMaskComposite", "FrugalMaskFeather",
    "FrugalMaskFromLabels", "FrugalMaskGrow", "FrugalMaskHull", "FrugalMaskRefine",
    "FrugalMaskTemporal", "FrugalPromptExtend", "FrugalQualityCheck", "FrugalRemoteVideo",
    "FrugalTryOnBatch", "FrugalTryOnFolder",
}  # fmt: skip
# Work with the very progress of a node that is cancelled below.
LIKE = {"FrugalServerExport": "FrugalQuantize"}
# One short piece of work, one pass of a model that ComfyUI runs, or nodes that others run.
AT_ONCE = {
    "FrugalAttention", "FrugalCachedTextEncode", "FrugalCausalModel", "FrugalCausalPrompt",
    "FrugalCausalSamplerSelect", "FrugalCompile", "FrugalDoctor", "FrugalGuidanceRange",
    "FrugalLoadCausalSession", "FrugalLoadTextEmbeds", "FrugalLoraSide", "FrugalMemoryPlan",
    "FrugalReport", "FrugalSaveCatVTON", "FrugalSaveCausalSession", "FrugalSaveTextEmbeds",
    "FrugalStepCache", "FrugalTryOn", "FrugalTryOnConditioning", "FrugalTryOnGather",
    "FrugalTryOnMaskFree", "FrugalTryOnPrepare", "FrugalTryOnSigmas", "FrugalTryOnStitch",
    "FrugalWanConstantContext", "FrugalWanTwoExperts",
}  # fmt: skip


@pytest.fixture(scope="module")
def files(server):
    found = {key: path.name for key, path in build_demo_wan(server.models).items()}
    deep = server.models / "diffusion_models" / f"{DEEP}.safetensors"
    save(fill(wan_shapes(WanSize(dim=256, ffn=512, layers=24)), 9), deep)
    shutil.copytree(MODELS, server.models, dirs_exist_ok=True)
    save_parser(server.models / "human_parsing" / "cancel_tiny", ATR)
    pictures = server.base / "input" / "cancel_pictures"
    pictures.mkdir()
    for number in range(4):
        Image.new("RGB", (16, 16)).save(pictures / f"{number}.png")
    return found


def described(files: dict[str, str], kind: str) -> dict[str, Node]:
    """A graph in which the node of this kind, under the key `it`, has a lot to do."""
    size = {"width": 64, "height": 64, "length": 9}
    text = {
        key: Node("FrugalLoadTextEmbeds", 0, {"embeds_name": files[key]})
        for key in ("positive", "negative")
    }
    wan = Node("FrugalLoadWan", 0, {"model_name": files["t2v"]})
    vae = Node("VAELoader", 0, {"vae_name": files["vae"]})
    latent = Node("EmptyHunyuanLatentVideo", 0, size)
    long_latent = Node("EmptyHunyuanLatentVideo", 0, {**size, "length": FRAMES})
    given = {"positive": ("positive", 0), "negative": ("negative", 0)}
    steps = {"seed": 1, "steps": STEPS, "cfg": 1.0}
    decoded = {"samples": ("latent", 0), "vae": ("vae", 0)}
    match kind:
        case "FrugalSampler":
            links = {"model": ("wan", 0), "latent_image": ("latent", 0), **given}
            nodes = {"wan": wan, "latent": latent, **text}
            values = {"preset": "off", **steps}
        case "FrugalCausalSampler":
            nodes = {"wan": wan, "latent": long_latent, **text}
            nodes["causal"] = Node("FrugalCausalModel", 0, {}, {"wan_model": ("wan", 0)})
            links = {"causal_model": ("causal", 0), "latent": ("latent", 0), **given}
            values = {**steps, "steps": 20}
        case "FrugalWanDecode" | "FrugalWanDecodeToFile":
            nodes, links, values = {"vae": vae, "latent": long_latent}, decoded, {}
        case "FrugalWanEncode":
            values = {"width": 64, "height": 64, "batch_size": FRAMES}
            nodes = {"vae": vae, "pictures": Node("EmptyImage", 0, values)}
            links, values = {"vae": ("vae", 0), "images": ("pictures", 0)}, {}
        case "FrugalQuantize":
            nodes, links = {}, {}
            values = {"model_name": f"{DEEP}.safetensors", "format": "W4A8"}
            values["filename_prefix"] = DEEP
        case "FrugalLoadWan":
            nodes, links = {}, {}
            values = {"model_name": f"{DEEP}.safetensors", "quantize": "fp8 per-channel"}
        case "FrugalLoadCatVTON":
            nodes, links = {}, {}
            values = {"base": TRYON, "attention": ATTENTION, "quantize": INT8}
        case "FrugalHumanParse":
            picture = {"width": 64, "height": 64, "batch_size": FRAMES}
            nodes = {"pictures": Node("EmptyImage", 0, picture)}
            links, values = {"image": ("pictures", 0)}, {"parser": "cancel_tiny"}
        case "FrugalLoadPictures":
            nodes, links, values = {}, {}, {"folder": "cancel_pictures"}
    nodes["it"] = Node(kind, 1, values, links)
    nodes["seen"] = Node("PreviewAny", 2, {}, {"source": ("it", 0)})
    return nodes


HERE = (
    "FrugalCausalSampler", "FrugalHumanParse", "FrugalLoadCatVTON", "FrugalLoadPictures",
    "FrugalLoadWan", "FrugalQuantize", "FrugalSampler", "FrugalWanDecode", "FrugalWanDecodeToFile",
    "FrugalWanEncode",
)  # fmt: skip


@pytest.mark.parametrize("kind", HERE)
def test_a_cancel_in_the_middle_stops_the_node(server, files, kind):
    info = server.object_info(fresh=True)
    prompt = server.convert(build(info, described(files, kind), [], []))
    [it] = [key for key, node in prompt.items() if node["class_type"] == kind]
    seen: list[tuple[int, int]] = []

    def cancel(node: str, value: int, maximum: int) -> None:
        if node == it and maximum and 0 < value < maximum and not seen:
            seen.append((value, maximum))
            server.interrupt()

    # However late the cancel comes on a busy machine, it comes in the middle.
    held = server.run({"1": {"class_type": "TestHold", "inputs": {"value": it}}})
    assert held.status == "success", held.errors
    result = server.run(prompt, cancel)
    assert seen, f"{kind} told of no progress"
    assert result.status == "interrupted"
    # Not merely before the next node.
    assert result.executed[-1] == it


def test_every_node_was_thought_of():
    """A new node joins the one list or the others; a long one needs its cancel tested."""
    assert set(LIKE.values()) <= set(HERE)
    listed = [*HERE, *ELSEWHERE, *LIKE, *AT_ONCE]
    assert len(listed) == len(set(listed))
    assert set(listed) == pack_node_ids()
