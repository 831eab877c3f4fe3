"""Several garments or persons at once: the conditioning of a batch is that of its members."""

from __future__ import annotations

import comfy.sd
import comfy.utils
import pytest
import torch

from frugal.kernels.errors import FrugalError
from frugal.nodes.tryon import nodes
from frugal.tests.helpers.builders import tryon_vae

pytestmark = pytest.mark.card

PERSONS, GARMENTS = 3, 3


@pytest.fixture(scope="module")
def scene(tmp_path_factory):
    """VAE, canvases of persons and garments [3, 64, 32, 3], and masks."""
    file = tryon_vae(tmp_path_factory.mktemp("vae") / "vae.safetensors")
    g = torch.Generator().manual_seed(2)
    person, garment = (torch.rand(3, 64, 32, 3, generator=g) for _ in range(2))
    mask = torch.zeros(3, 64, 32)
    for i in range(3):
        mask[i, 8 : 40 + 8 * i, 8:24] = 1
    return comfy.sd.VAE(sd=comfy.utils.load_torch_file(str(file))), person, garment, mask


@torch.no_grad()
def make(scene, persons, garments, masks):
    vae, person, garment, mask = scene
    node = nodes.FrugalTryOnConditioning.PREPARE_CLASS_CLONE(None)
    positive, negative, latent = node.execute(
        person[persons], garment[garments], mask[masks], vae
    ).args
    assert len(positive) == len(negative) == 1
    return [side[0][1] for side in (positive, negative)], latent["samples"]


ALL = [0, 1, 2]


@pytest.mark.parametrize(
    ("persons", "garments", "masks"),
    [(ALL, ALL, ALL), ([1], ALL, [1]), (ALL, [2], ALL), (ALL, [0], [1]), ([0], [0], ALL)],
)
def test_a_batch_is_its_members(scene, persons, garments, masks):
    sides, latent = make(scene, persons, garments, masks)
    assert latent.shape == (3, 4, 16, 4) and not latent.any()
    for i in range(3):
        member = [[part[min(i, len(part) - 1)]] for part in (persons, garments, masks)]
        single, _ = make(scene, *member)
        for side, alone in zip(sides, single, strict=True):
            for name in ("concat_latent_image", "concat_mask"):
                assert side[name].shape[0] == 3
                assert torch.allclose(side[name][i], alone[name][0], rtol=0, atol=1e-5), name
    # Able to fail: members that are not broadcast are told apart.
    if len(persons) > 1 or len(garments) > 1:
        rows = sides[0]["concat_latent_image"]
        assert (rows[0] - rows[1]).abs().max() > 1e-2
    lower = sides[1]["concat_latent_image"][:, :, 8:]
    assert not lower.any() and sides[0]["concat_latent_image"][:, :, 8:].any()


def test_unequal_batches_are_refused(scene):
    for given in (([0, 1], ALL, [0]), (ALL, [0, 1], ALL), (ALL, ALL, [0, 1])):
        with pytest.raises(FrugalError, match="equal numbers, or 1 for all"):
            make(scene, *given)
