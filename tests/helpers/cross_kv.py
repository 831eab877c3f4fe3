"""Runs of tiny Wan models as users sample them, and the weights that each step of a run reads."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from types import SimpleNamespace
from typing import Any

import comfy.sample
import comfy.samplers
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from frugal.nodes.memory import cross_kv_run
from frugal.tests.helpers import wan as bed

STEPS, CFG, SEED = 4, 3.0, 11
ROWS, WORDS = 64, 12


@cache
def text(seed: int, words: int = WORDS) -> torch.Tensor:
    """What a text encoder gives, [1, ROWS, 4096]: `words` tokens and zeros as padding."""
    make = torch.Generator().manual_seed(seed)
    rows = torch.zeros(1, ROWS, 4096)
    rows[:, :words] = torch.randn(1, words, 4096, generator=make)
    return rows


@cache
def image(seed: int = 1) -> dict[str, Any]:
    """What a start image adds to a prompt, for 2 latent frames of 8 x 8."""
    make = torch.Generator().manual_seed(seed)
    mask = torch.ones(1, 1, 2, 8, 8)
    mask[:, :, 0] = 0
    seen = SimpleNamespace(penultimate_hidden_states=torch.randn(1, 257, 1280, generator=make))
    return {
        "concat_latent_image": torch.randn(1, 16, 2, 8, 8, generator=make),
        "concat_mask": mask,
        "clip_vision_output": seen,
    }


def prompts(*seeds: int, **more: Any) -> list[list[list[Any]]]:
    """One conditioning of one prompt per seed: positive, negative."""
    return [[[text(seed), dict(more)]] for seed in seeds or (5, 6)]


def sample(
    model: Any,
    given: list[list[list[Any]]] | None = None,
    callback: Callable[..., None] | None = None,
    frames: int = 2,
    cfg: float = CFG,
    batch: int = 1,
) -> torch.Tensor:
    """euler, a few steps of an empty latent [batch, 16, frames, 8, 8]."""
    start = torch.zeros(batch, 16, frames, 8, 8)
    noise = comfy.sample.prepare_noise(start, SEED)
    sigmas = comfy.samplers.calculate_sigmas(
        model.get_model_object("model_sampling"), "simple", STEPS
    )
    with torch.inference_mode():
        return comfy.sample.sample_custom(
            model, noise, cfg, comfy.samplers.sampler_object("euler"), sigmas,
            *(given or prompts()), start, seed=SEED, disable_pbar=True, callback=callback,
        )  # fmt: skip


class TouchedWeights(TorchDispatchMode):
    """Which of a network's weights take part in any operation at all, per step of a run: told by
    their memory, so nothing of the code under test is asked.
    """

    def __init__(self, network: torch.nn.Module):
        super().__init__()
        self.names = {_memory(weight): name for name, weight in network.named_parameters()}
        self.sizes = {name: weight.nbytes for name, weight in network.named_parameters()}
        self.steps: list[set[str]] = [set()]

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        for suffix in tree_leaves((args, kwargs)):
            if isinstance(suffix, torch.Tensor):
                name = self.names.get(_memory(suffix))
                if name is not None:
                    self.steps[-1].add(name)
        return func(*args, **(kwargs or {}))

    def next_step(self, *_: Any) -> None:
        """A sampler's callback."""
        self.steps.append(set())

    def bytes(self) -> list[int]:
        return [sum(self.sizes[name] for name in names) for names in self.steps[:-1]]


def _memory(tensor: Any) -> int:
    return getattr(tensor, "_qdata", tensor).untyped_storage().data_ptr()


def touched(model: Any, given: Any = None) -> list[set[str]]:
    """Names of the weights that each step of a run reads."""
    return _counted(model, given).steps[:-1]


def touched_bytes(model: Any, given: Any = None) -> list[int]:
    return _counted(model, given).bytes()


def _counted(model: Any, given: Any) -> TouchedWeights:
    # A model that never ran has its weights elsewhere than where they will be read.
    assert model.model.model_loaded_weight_memory, "sample the model first"
    counter = TouchedWeights(model.model.diffusion_model)
    with counter:
        sample(model, given, counter.next_step)
    return counter


def lora(seed: int, layers: list[str] | None = None) -> dict[str, torch.Tensor]:
    """A LoRA file on every cross-attention projection of the T2V bed, large enough to be seen."""
    from frugal.tests.helpers import lora as lora_bed

    chosen = layers or [name for name in bed.block_linears(lora_bed.SOURCE) if "cross_attn" in name]
    return lora_bed.lora(chosen, seed)[0]


def constant(model: Any, **options: Any) -> tuple[Any, list, Any]:
    """(model with the node's change, reports of its runs, plan)."""
    reports: list = []
    chosen = cross_kv_run.Options(**options)
    changed, plan = cross_kv_run.apply(model, chosen, reports.append)
    return changed, reports, plan


def weights_of(model: Any) -> dict[str, torch.Tensor]:
    """Copies of everything that the MODEL's network holds, as it would be saved."""
    return {name: tensor.clone() for name, tensor in model.model_state_dict().items()}


def same_weights(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(
        one[name].dtype == other[name].dtype and torch.equal(_raw(one[name]), _raw(other[name]))
        for name in one
    )


def _raw(tensor: torch.Tensor) -> torch.Tensor:
    return getattr(tensor, "_qdata", tensor).contiguous().view(torch.uint8)
