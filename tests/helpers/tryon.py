"""A tiny CatVTON in diffusers: random UNets, attention files, the published loop's parts."""

from __future__ import annotations

import comfy.model_management
import comfy.sample
import torch
from diffusers import DDIMScheduler, UNet2DConditionModel

from frugal.kernels.checkpoints import catvton
from frugal.nodes.tryon import sigmas as sampling

HEADS = 4
META = {"num_heads": str(HEADS)}


class Skip:
    """The published processor: gives its input back."""

    def __call__(self, attn, hidden_states, *args, **kwargs):
        return hidden_states


def skip_cross_attention(unet):
    unet.set_attn_processor(
        {
            name: Skip() if name.endswith("attn2.processor") else processor
            for name, processor in unet.attn_processors.items()
        }
    )
    return unet


def make_unet(seed, in_channels=9, widths=(64, 128, 192)):
    torch.manual_seed(seed)
    unet = UNet2DConditionModel(
        in_channels=in_channels,
        out_channels=4,
        block_out_channels=widths,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        layers_per_block=1,
        cross_attention_dim=8,
        attention_head_dim=HEADS,
    ).eval()
    with torch.no_grad():
        for name, parameter in unet.named_parameters():
            # Spread norm weights: with all of them 1 a missing norm2 would hardly show.
            if "norm" in name:
                parameter.add_(0.3 * torch.randn_like(parameter))
    return unet.requires_grad_(False)


def state(unet):
    return {name: tensor.contiguous() for name, tensor in unet.state_dict().items()}


def attention_tensors(unet, stride=8):
    """Numbered as the published training code numbers modules: module tree order, middle last."""
    names = [name for name, _ in unet.named_modules() if name.endswith("attn1")]
    names.sort(key=lambda name: name.startswith("mid_block"))
    weights = unet.state_dict()
    return {
        f"{stride * i}.{tensor}": weights[f"{name}.{tensor}"].contiguous()
        for i, name in enumerate(names)
        for tensor in catvton.TENSORS
    }


def inputs(seed=3, batch=2):
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(batch, 9, 32, 12, generator=g)
    return x, torch.full((batch,), 601)


def run(patcher, x, t, context=None):
    comfy.model_management.load_models_gpu([patcher])
    device = patcher.load_device
    with torch.no_grad():
        return patcher.model.diffusion_model(x.to(device), t.to(device), context=context).cpu()


def relative(a, b):
    return float((a - b).norm() / b.norm())


def forward(unet, x, t):
    with torch.no_grad():
        return unet(x, t, encoder_hidden_states=torch.zeros(x.shape[0], 1, 8)).sample


class FakeVAE:
    """Averages 8 x 8 pixels into four channels: enough to see what goes where."""

    def spacial_compression_encode(self):
        return 8

    def encode(self, pixels):
        small = torch.nn.functional.avg_pool2d(pixels.movedim(-1, 1) * 2 - 1, 8)
        return torch.cat([small, small.mean(dim=1, keepdim=True)], dim=1)


def scene(batch=1, H=64, W=32):
    g = torch.Generator().manual_seed(5)
    person, garment = torch.rand(2, batch, H, W, 3, generator=g)
    mask = torch.zeros(batch, H, W)
    mask[:, 19:45, 9:23] = 1
    return person, garment, mask


def scheduler():
    """DDIM as the base repository configures it."""
    return DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
        timestep_spacing="leading",
    )


SCALE = 0.18215


def published_loop(unet, sides, start, fresh, cfg, eta):
    """The published sampling loop in diffusers: (uncond, cond) extra channels, injected noise.

    start [B, 4, h, w]; fresh: one noise tensor per step. Gives latents on the model's scale.
    """
    schedule = scheduler()
    schedule.set_timesteps(len(fresh))
    x = start.clone()
    for t, noise in zip(schedule.timesteps, fresh, strict=True):
        uncond, cond = (forward(unet, torch.cat([x, extra], 1), t) for extra in sides)
        # Guidance is off at 1 and below, as in the published pipeline.
        guess = uncond + cfg * (cond - uncond) if cfg > 1 else cond
        x = schedule.step(guess, t, x, eta=eta, variance_noise=noise if eta else None)[0]
    return x


def native_loop(patcher, conditioning, start, fresh, cfg, eta):
    """The same through ComfyUI's sampling, on the model's scale."""
    positive, negative, latent = conditioning
    sigmas, _ = sampling.reference_schedule(patcher, len(fresh), eta)
    queue = iter(fresh)
    sampler = sampling.DDIMSampler(eta, noise_sampler=lambda *_: next(queue))
    made = comfy.sample.sample_custom(
        patcher,
        start,
        cfg,
        sampler,
        sigmas,
        positive,
        negative,
        latent["samples"],
        disable_pbar=True,
        seed=0,
    )
    return SCALE * made


def noises(shape, steps, seed=7):
    """(start, one tensor per step)."""
    g = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=g), [torch.randn(shape, generator=g) for _ in range(steps)]
