"""Whether a latent and prompts belong to the model, asked before the model fails on them."""

from __future__ import annotations

from typing import Any

from ...kernels.errors import FrugalError

# Of a start image: as it is, and beside a control video.
IMAGES = (1, 2)


def check(model: Any, prompts: tuple[Any, ...], latent: dict[str, Any]) -> None:
    """Raises FrugalError where a Wan MODEL cannot take these CONDITIONINGs and this LATENT."""
    width = getattr(model.model.diffusion_model, "text_dim", None)
    if width is None:
        return
    channels = model.model.latent_format.latent_channels
    samples = latent["samples"]
    # ComfyUI itself gives an empty one the channels that the model needs.
    if not getattr(samples, "is_nested", False) and samples.shape[1] != channels and samples.any():
        raise FrugalError(
            f"a latent of {samples.shape[1]} channels",
            f"{channels}, as this model has them",
            "connect a latent from the VAE of the model's own Wan version (Wan 2.1 and 2.2 14B: "
            "Wan 2.1 VAE; Wan 2.2 5B: Wan 2.2 VAE)",
        )
    for name, entries in zip(("positive", "negative"), prompts, strict=True):
        for words, extra in entries:
            if getattr(words, "shape", (width,))[-1] != width:
                raise FrugalError(
                    f"the {name} prompt has {words.shape[-1]} values per token",
                    f"{width}",
                    "encode the prompts with the umT5-XXL text encoder (CLIPLoader, type wan)",
                )
            image = extra.get("concat_latent_image")
            if image is not None and image.shape[1] not in [n * channels for n in IMAGES]:
                raise FrugalError(
                    f"the start image in the {name} prompt has {image.shape[1]} channels",
                    f"{channels}, as this model has them",
                    "connect the VAE of the model's own Wan version where the start image is "
                    "encoded (Wan 2.1 and 2.2 14B: Wan 2.1 VAE; Wan 2.2 5B: Wan 2.2 VAE)",
                )
