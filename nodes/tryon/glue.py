"""The try-on family's touch points with ComfyUI: model folders, VAE calls, conditioning."""

from __future__ import annotations

import os
from collections import Counter
from typing import Any

import comfy.model_management
import folder_paths
import torch

from ...kernels.errors import FrugalError
from ...kernels.tryon import canvas, latents, pictures
from .._models import offered

KIND = "CatVTON"
BASE_KINDS = ("diffusion_models", "checkpoints")
# For the sentence about a file that is not there: folders, and who offers the files.
BASE_FOLDERS = "models/checkpoints, diffusion_models or CatVTON"
BASE_PAGE = "https://huggingface.co/webui/stable-diffusion-inpainting"
ATTENTION_PAGE = "https://huggingface.co/zhengchong/CatVTON/tree/main/mix-48k-1024/attention"
NO_ATTENTION = "none: base is a merged file"
WEIGHTS = (".safetensors", ".sft", ".ckpt", ".pt", ".pth", ".bin")
# Parts of a diffusers folder; such a folder is offered as a whole.
DIFFUSERS_PARTS = {"unet", "vae", "text_encoder", "safety_checker", "scheduler", "tokenizer"}
CONTEXT_WIDTH = 768  # SD 1.5's text width; the tensor is never read, other nodes expect one


def register_folder() -> None:
    """Make models/CatVTON a folder kind of its own, beside whatever the user's paths file names."""
    folder_paths.add_model_folder_path(KIND, os.path.join(folder_paths.models_dir, KIND))


def _catvton_files() -> list[str]:
    names = folder_paths.get_filename_list(KIND)
    return [name for name in names if name.lower().endswith(WEIGHTS)]


def _parts(name: str) -> list[str]:
    return name.replace("\\", "/").split("/")


def _bases() -> list[tuple[str, str]]:
    """(folder kind, name in it) of possible base files, and of diffusers folders."""
    found = [(kind, name) for kind in BASE_KINDS for name in folder_paths.get_filename_list(kind)]
    for name in _catvton_files():
        parts = _parts(name)
        if "unet" in parts[1:-1]:
            folder = "/".join(parts[: parts.index("unet", 1)])
            found += [(KIND, folder)] if (KIND, folder) not in found else []
        elif not DIFFUSERS_PARTS & set(parts[:-1]) and "attention" not in parts[:-1]:
            found.append((KIND, name))
    return found


def base_choices() -> list[str]:
    """Names of possible bases. Bare ones, since ComfyUI's page looks for a file of that very name
    in one folder, and offers to download no other; with the folder in front of it, "kind/name",
    where several folders have the name.
    """
    found = _bases()
    often = Counter(name for _, name in found)
    return [name if often[name] == 1 else f"{kind}/{name}" for kind, name in found]


def _base_called(choice: str) -> tuple[str, str] | None:
    """(folder kind, name in it) of a base; None if it is not there. Raises FrugalError if several
    folders have it.
    """
    found = [(kind, name) for kind, name in _bases() if choice in (name, f"{kind}/{name}")]
    if len(found) > 1:
        whole = [f"{kind}/{name}" for kind, name in found]
        raise FrugalError(
            f"the base '{choice}' is there {len(found)} times: models/{' and models/'.join(whole)}",
            "a name that one folder has, or the folder in front of it",
            f"choose '{whole[0]}' or '{whole[1]}' from the list",
        )
    return found[0] if found else None


def base_offered(choice: str | None) -> bool | str:
    """For `validate_inputs`: True, or the sentence on a base that is not there or not clear."""
    try:
        if choice is not None and _base_called(choice):
            return True
    except FrugalError as error:
        return str(error)
    return offered(choice, base_choices(), BASE_FOLDERS, BASE_PAGE)


def attention_choices() -> list[str]:
    """Names under models/CatVTON of files that may be attention files, after the choice of none."""
    return [
        NO_ATTENTION,
        *(name for name in _catvton_files() if not DIFFUSERS_PARTS & set(_parts(name)[:-1])),
    ]


def base_path(choice: str) -> str:
    """Absolute path of a `base_choices` entry: a file or a diffusers folder."""
    called = _base_called(choice)
    if called is None:
        raise FrugalError(
            f"the base '{choice}' is not there",
            f"a file in {BASE_FOLDERS}",
            "press R to refresh the lists and choose again",
        )
    kind, name = called
    for root in folder_paths.get_folder_paths(kind):
        path = os.path.join(root, *_parts(name))
        if os.path.isdir(path):
            return path
    return folder_paths.get_full_path_or_raise(kind, name)


def attention_path(choice: str) -> str | None:
    """Absolute path of an `attention_choices` entry, None for the choice of none."""
    return None if choice == NO_ATTENTION else folder_paths.get_full_path_or_raise(KIND, choice)


def vae_factor(vae) -> int:
    """Pixels per latent cell along one side of a picture VAE."""
    factor = vae.spacial_compression_encode()
    if not isinstance(factor, int):
        raise FrugalError(
            "the VAE has no single compression factor",
            "an SD 1.5 picture VAE",
            "load sd-vae-ft-mse",
        )
    return factor


def require_masked_model(model) -> None:
    """Raise FrugalError unless the MODEL takes mask and masked picture beside the latent."""
    found = tuple(getattr(model.model, "concat_keys", ()))
    if found != ("mask", "masked_image"):
        raise FrugalError(
            f"the model takes {' and '.join(found) or 'nothing'} beside the latent",
            "mask and masked_image, 9 channels in all",
            "connect the MODEL of 'Load CatVTON'",
        )


def encode(vae, picture: torch.Tensor) -> torch.Tensor:
    """Unscaled posterior mean [B, 4, H/8, W/8] of a picture [B, H, W, 3]."""
    found = vae.encode(picture)
    factor = vae_factor(vae)
    want = (picture.shape[0], 4, picture.shape[1] // factor, picture.shape[2] // factor)
    if tuple(found.shape) != want:
        raise FrugalError(
            f"the VAE gives latents of shape {tuple(found.shape)}",
            f"{want} as of SD 1.5",
            "load sd-vae-ft-mse",
        )
    return found


def conditioning(
    person: torch.Tensor, garment: torch.Tensor, mask: torch.Tensor, vae
) -> tuple[list[Any], list[Any], dict[str, torch.Tensor]]:
    """(positive, negative, LATENT) of core's inpainting conditioning for prepared canvases.

    The two sides differ in the garment half of `concat_latent_image` alone; that difference is
    what CFG strengthens. Core scales `concat_latent_image` itself.
    """
    person, garment = pictures.as_rgb(person, "person"), pictures.as_rgb(garment, "garment")
    size = (person.shape[1], person.shape[2])
    factor = vae_factor(vae)
    latents.check_canvas(size, (garment.shape[1], garment.shape[2]), tuple(mask.shape), factor)
    B = pictures.common_batch(person=person.shape[0], garment=garment.shape[0], mask=mask.shape[0])
    views = pictures.common_batch(person=person.shape[0], mask=mask.shape[0])
    upper, small = encode_person(person.expand(views, -1, -1, -1), mask.expand(views, -1, -1), vae)
    lower = encode(vae, garment)
    return assemble(*(part.expand(B, -1, -1, -1) for part in (upper, lower, small)))


def encode_person(
    person: torch.Tensor, mask: torch.Tensor, vae
) -> tuple[torch.Tensor, torch.Tensor]:
    """(latent of the greyed out person [B, 4, h, w], mask [B, 1, h, w] at latent size)."""
    return encode(vae, canvas.grey_out(person, mask)), latents.latent_mask(mask, vae_factor(vae))


def assemble(
    upper: torch.Tensor, lower: torch.Tensor, small: torch.Tensor
) -> tuple[list[Any], list[Any], dict[str, torch.Tensor]]:
    """(positive, negative, LATENT) of latents of persons and garments, and masks, all [B, ...]."""

    def side(below: torch.Tensor) -> list[Any]:
        entries = {
            "concat_latent_image": latents.stack(upper, below),
            "concat_mask": latents.stack(small, torch.zeros_like(small)),
        }
        return [[torch.zeros((1, 1, CONTEXT_WIDTH)), entries]]

    start = torch.zeros(
        (upper.shape[0], 4, 2 * upper.shape[2], upper.shape[3]),
        device=comfy.model_management.intermediate_device(),
    )
    return side(lower), side(torch.zeros_like(lower)), {"samples": start}


def decode(samples: dict[str, torch.Tensor], vae, size: tuple[int, int]) -> torch.Tensor:
    """Person canvases [B, H, W, 3] out of a stacked LATENT; size is (H, W) of the canvas."""
    upper = latents.person_half(samples["samples"], size, vae_factor(vae))
    return vae.decode(upper)
