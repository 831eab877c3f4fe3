"""A model that is not there: the loader names the file, the folder and the page it comes from."""

from __future__ import annotations

import importlib

import pytest

LOADERS = [
    ("wan", "FrugalLoadWan", "model_name", "models/diffusion_models"),
    ("text", "FrugalCachedTextEncode", "encoder_name", "models/text_encoders"),
    ("text", "FrugalLoadTextEmbeds", "embeds_name", "models/text_embeds or output/text_embeds"),
    ("causal", "FrugalLoadCausalSession", "session_name", "output/causal_sessions"),
    ("tryon", "FrugalLoadCatVTON", "base", "models/checkpoints, diffusion_models or CatVTON"),
    ("tryon", "FrugalLoadCatVTON", "attention", "models/CatVTON"),
    ("tryon", "FrugalHumanParse", "parser", "models/human_parsing"),
    ("quantize", "FrugalQuantize", "model_name", "models/diffusion_models"),
    ("lora", "FrugalLoraSide", "lora_name", "models/loras"),
]


# Of these there is no public file to name.
OWN_FILES = {"FrugalLoadTextEmbeds", "FrugalLoadCausalSession", "FrugalLoraSide"}


def node(family: str, name: str):
    module = importlib.import_module(f"frugal.nodes.{family}.nodes")
    return next(each for each in module.NODES if each.GET_SCHEMA().node_id == name)


@pytest.mark.parametrize(("family", "name", "choice", "folder"), LOADERS)
def test_the_sentence_leads_to_the_file(comfy_tree, family, name, choice, folder):
    check = node(family, name).validate_inputs
    said = check(**{choice: "wan_that_nobody_has.safetensors"})
    assert isinstance(said, str) and said.isascii()
    assert f": wan_that_nobody_has.safetensors is not in {folder}; expected " in said
    assert ("https://huggingface.co/" in said) == (name not in OWN_FILES)
    assert "then press R to refresh the lists: " in said
    # What another node gives is not known yet when a graph is checked.
    assert check() is True


def test_an_empty_choice_says_so(comfy_tree):
    said = node("wan", "FrugalLoadWan").validate_inputs(model_name="")
    assert ": nothing is chosen from models/diffusion_models; expected " in said


def test_a_file_on_offer_passes(comfy_tree):
    from frugal.nodes._models import offered

    assert offered("a.safetensors", ["a.safetensors"], "loras") is True
    assert offered("none: base is a merged file", ["none: base is a merged file"], "x") is True
