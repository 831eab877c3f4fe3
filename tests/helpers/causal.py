"""Videos made block by block on tiny Wan models, and what they must equal: forwards of all frames
at once, in which each frame's attention is cut to what its block may see.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import comfy.model_management
import comfy.sample
import comfy.samplers
import torch
from comfy.ldm.modules.attention import attention_pytorch

from frugal.kernels.causal.options import CacheOptions
from frugal.nodes._comfy import ATTENTION_OVERRIDE
from frugal.nodes.causal import model_run, sampler_run
from frugal.nodes.wan import load_run
from frugal.tests.helpers import wan as bed
from frugal.tests.helpers.cross_kv import text

SEED, SIDE = 11, 8
SIGMAS = torch.tensor([1.0, 0.6, 0.0])
SHIFT = 5.0


def load(folder, config=bed.T2V, weights=None, metadata=None, dtype="fp32"):
    """A ModelPatcher of a seeded tiny Wan."""
    held = bed.base(weights or bed.weights(config), torch.float32)[0]
    path = bed.write(folder / "wan.safetensors", held, metadata)
    with torch.inference_mode():
        return load_run.load_wan(path, dtype)[0]


def causal(model, **options):
    return model_run.make_causal(model, CacheOptions(**options), SHIFT)[0]


def prompt_of(seed):
    """A text of 50 rows: as many keys as no number of frames has, by which attention is told."""
    return text(seed)[:, :50]


def noise(frames, first=0, batch=1, seed=SEED):
    """The same numbers for a frame whichever run makes it."""
    each = [
        torch.randn(batch, 16, 1, SIDE, SIDE, generator=torch.Generator().manual_seed(seed + f))
        for f in range(first, first + frames)
    ]
    return torch.cat(each, dim=2)


def make(model, frames, block=2, job=None, first=0, prompt=5, negative=6, cfg=1.0, batch=1,
         sigmas=SIGMAS, callback=None, extra=None):  # fmt: skip
    """The causal sampler as a node runs it: latents [batch, 16, frames, SIDE, SIDE], scaled as the
    network has them.
    """
    sampler = comfy.samplers.KSAMPLER(
        sampler_run.sample_causal, {"frames_per_block": block, "job": job}
    )
    start = torch.zeros(batch, 16, frames, SIDE, SIDE)
    conds = [[[prompt_of(seed), dict(extra or {})]] for seed in (prompt, negative)]
    with torch.inference_mode():
        made = comfy.sample.sample_custom(
            model, noise(frames, first, batch), cfg, sampler, sigmas, *conds, start,
            seed=SEED, disable_pbar=True, callback=callback,
        )  # fmt: skip
        return model.model.process_latent_in(made)


@dataclass
class Frame:
    number: int
    block: int  # number of the first frame of its block
    latent: torch.Tensor


@dataclass
class Reference:
    """Makes a video by forwards over all frames at once; keys and values are never kept.

    network: a stock WanModel with its weights in place.
    """

    network: Any
    window: int = 0
    sink: int = 0
    relative: bool = False
    known: list[Frame] = field(default_factory=list)
    blocks_made: int = 0

    def sees(self, block: int, size: int, frame: Frame) -> bool:
        last = block + size - 1
        return not self.window or frame.number > last - self.window or frame.number < self.sink

    def make(self, frames, block=2, prompt=5, negative=6, cfg=1.0, sigmas=SIGMAS, first=0, batch=1):
        out = []
        for start in range(0, frames, block):
            size = min(block, frames - start)
            latent = noise(size, first + start, batch)
            for i, sigma in enumerate(sigmas[:-1]):
                flows = [
                    self.forward(latent, first + start, sigma, seed)
                    for seed in ((prompt, negative) if cfg != 1 else (prompt,))
                ]
                flow = flows[0] if cfg == 1 else flows[1] + cfg * (flows[0] - flows[1])
                clean, after = latent - sigma * flow, sigmas[i + 1]
                torch.manual_seed(SEED + self.blocks_made * 1000 + i)
                latent = (1 - after) * clean + after * torch.randn(clean.shape)
            for i in range(size):
                at = first + start
                self.known.append(Frame(at + i, at, latent[:, :, i : i + 1]))
            self.blocks_made += 1
            out.append(latent)
        return torch.cat(out, dim=2)

    def forget_the_unseen(self, block, size):
        """What a recache starts from: the frames still kept, each recomputed beside the others."""
        self.known = [frame for frame in self.known if self.sees(block, size, frame)]

    def forward(self, latent, number, sigma, prompt):
        """Flow of the block `latent` that starts with frame `number`, at `sigma`."""
        size = latent.shape[2]
        block = [Frame(number + i, number, latent[:, :, i : i + 1]) for i in range(size)]
        frames = self.known + block
        times = torch.tensor([0.0] * len(self.known) + [float(sigma)] * size) * 1000
        x = torch.cat([frame.latent for frame in frames], dim=2)
        options = {"optimized_attention_override": lambda *a, **k: self.attention(frames, *a, **k)}
        context = prompt_of(prompt).expand(x.shape[0], -1, -1)
        with torch.inference_mode():
            flow = self.network(
                x, times.expand(x.shape[0], -1), context, transformer_options=options
            )
        return flow[:, :, -size:]

    def attention(self, frames, func, q, k, v, heads, **kwargs):
        """By definition, in float64, and only over what a block may see."""
        split = [each.unflatten(-1, (heads, -1)).double() for each in (q, k, v)]
        if q.shape[1] != k.shape[1]:
            return _softmax(*split).flatten(2).to(q.dtype)
        tokens = q.shape[1] // len(frames)
        q, k, v = (each.unflatten(1, (-1, tokens)) for each in split)
        out = torch.empty_like(q)
        for block in sorted({frame.block for frame in frames}):
            own = [i for i, frame in enumerate(frames) if frame.block == block]
            seen = [
                i
                for i, frame in enumerate(frames)
                if frame.block <= block and self.sees(block, len(own), frame)
            ]
            # The network placed frame i at i; it belongs at its number, or at its rank.
            turn = {i: (r if self.relative else frames[i].number) - i for r, i in enumerate(seen)}
            turned = [
                torch.cat([_turn(each[:, i], turn[i]) for i in which], dim=1)
                for each, which in ((q, own), (k, seen))
            ]
            values = v[:, seen].flatten(1, 2)
            out[:, own] = _softmax(*turned, values).unflatten(1, (-1, tokens))
        return out.flatten(1, 2).flatten(2).float()


def _softmax(q, k, v):
    q, k, v = (each.transpose(1, 2) for each in (q, k, v))
    return (torch.softmax(q @ k.mT / q.shape[-1] ** 0.5, -1) @ v).transpose(1, 2)


def _turn(x, by):
    """RoPE's time part by complex numbers: Wan's head of 128 has 44 dimensions of time."""
    axis = x.shape[-1] - 4 * (x.shape[-1] // 6)
    pairs = torch.view_as_complex(x[..., :axis].unflatten(-1, (-1, 2)).contiguous())
    turn = torch.exp(1j * by * 10000.0 ** (-torch.arange(0, axis, 2).double() / axis))
    return torch.cat([torch.view_as_real(pairs * turn).flatten(-2), x[..., axis:]], -1)


def stock(model):
    """The network of a ModelPatcher, with its weights and patches in place."""
    comfy.model_management.load_models_gpu([model])
    return model.model.diffusion_model


# Rows of the prompts of `run`: beside a tiny model the usual 512 of 4096 would be all there is.
WORDS = 4


def fused(model):
    """Have the ModelPatcher attend without scores, as is counted, and load it."""
    options = model.model_options["transformer_options"]
    options[ATTENTION_OVERRIDE] = lambda _, *a, **k: attention_pytorch(*a, **k)
    comfy.model_management.load_models_gpu([model])
    # The first run of a model leaves things behind that no other makes.
    run(causal(model), 2, 2, SIDE)


def run(model, frames, block, side, cfg=1.0):
    """As `make`, without inference mode, in which torch hides what its operations make inside; of
    latents `side` wide and high.
    """
    job = sampler_run.Job(keep=True)
    sampler = comfy.samplers.KSAMPLER(
        sampler_run.sample_causal, {"frames_per_block": block, "job": job}
    )
    start = torch.zeros(1, 16, frames, side, side)
    conds = [[[prompt_of(seed)[:, :WORDS].clone(), {}]] for seed in (5, 6)]
    with torch.no_grad():
        made = comfy.sample.sample_custom(
            model, torch.randn(start.shape, generator=torch.Generator().manual_seed(SEED)), cfg,
            sampler, torch.tensor([1.0, 0.0]), *conds, start, seed=SEED, disable_pbar=True,
        )  # fmt: skip
    job.cache.release()
    return made


def far(one, other):
    """Largest difference, relative to the largest value."""
    return float((one - other).abs().max() / other.abs().max())
