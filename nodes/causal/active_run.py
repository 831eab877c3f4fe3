"""One run of a causal model: where the block stands in time, and what its attention sees."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import comfy.sampler_helpers
import torch
from comfy.patcher_extension import WrappersMP, add_wrapper_with_key, copy_nested_dicts

from ...kernels.causal.cache import VideoCache
from ...kernels.causal.strategies import over_pages
from ...kernels.errors import FrugalError
from .model_run import NEEDS, OPTIONS, RUN

# Up to this number every latent frame has a position of its own in that type.
EXACT = {torch.bfloat16: 256, torch.float16: 2048}


class CausalRun:
    """An APPLY_MODEL wrapper, and what CausalForward asks. first: number of the run's first frame;
    frames: of its latent.
    """

    def __init__(self, cache: VideoCache, first: int, frames: int):
        self.cache, self.first, self.frames = cache, first, frames
        self.calls = 0
        self._block: range | Sequence[int] = ()
        self._place = 0

    def installed(self, extra_args: dict[str, Any]) -> dict[str, Any]:
        """`extra_args` of a sampler function with this run in them; the given are not changed."""
        model_options = dict(extra_args["model_options"])
        options = dict(model_options.get("transformer_options", {}))
        options["wrappers"] = copy_nested_dicts(options.get("wrappers", {}))
        add_wrapper_with_key(WrappersMP.APPLY_MODEL, OPTIONS, self, options)
        add_wrapper_with_key(WrappersMP.CALC_COND_BATCH, OPTIONS, self._conditions, options)
        model_options["transformer_options"] = options
        return {**extra_args, "model_options": model_options}

    def start_block(self, count: int, frames: Sequence[int] | None = None) -> None:
        """The model's calls from now on are on `count` frames, the next or those with the numbers
        `frames`. Raises FrugalError where the compute type cannot tell their positions apart.
        """
        begin = self.cache.next_frame
        self._block = range(begin, begin + count) if frames is None else frames
        self._place = self.cache.start_block(count, frames)
        exact = EXACT.get(self.cache.fmt.dtype)
        if exact and self._place + count - 1 > exact:
            raise FrugalError(
                f"latent frame {self._place + count - 1} in {self.cache.fmt.dtype}",
                f"positions up to {exact}, the last that this type tells apart",
                "choose relative positions and a window",
            )

    def __call__(
        self, executor, x, t, c_concat=None, c_crossattn=None, control=None,
        transformer_options=None, **kwargs,
    ):  # fmt: skip
        """Arguments and result of BaseModel.apply_model, x of the block's frames."""
        options = dict(transformer_options or {})
        # ComfyUI joins lists of wrappers, so one can come twice.
        if options.get(RUN) is self:
            return executor(x, t, c_concat, c_crossattn, control, options, **kwargs)
        _check_inputs(control, kwargs)
        if c_concat is not None and c_concat.shape[2] == self.frames != len(self._block):
            places = [frame - self.first for frame in self._block]
            if not 0 <= places[0] <= places[-1] < self.frames:
                raise FrugalError(
                    f"a start image, and latent frame {self._block[0]} from before this run to be "
                    "recomputed",
                    "a text to video model",
                    "turn recache off",
                )
            c_concat = c_concat[:, :, places]
        rope = dict(options.get("rope_options") or {})
        if rope.get("scale_t", 1.0) != 1.0:
            raise FrugalError(f"time stretched by {rope['scale_t']:g}", "1", "remove the RoPE node")
        rope["shift_t"] = rope.get("shift_t", 0.0) + self._place
        options["rope_options"], options[RUN] = rope, self
        self.calls += 1
        return executor(x, t, c_concat, c_crossattn, control, options, **kwargs)

    def _conditions(self, executor, *args, **kwargs):
        """A CALC_COND_BATCH wrapper. Whoever repeats a call that failed, as a memory plan does, has
        it start again.
        """
        try:
            return executor(*args, **kwargs)
        except BaseException:
            self.cache.take_back()
            raise

    def attention(
        self, layer: int, streams: Sequence[int], before: Callable[..., Any] | None
    ) -> Callable[..., torch.Tensor]:
        """The attention override of one self-attention. before: the override that was there, which
        is then asked for the attention over all frames.
        """
        cache = self.cache

        def attend(func, q, k, v, heads, *args, **kwargs):
            if kwargs.get("mask") is not None or kwargs.get("skip_reshape") or args:
                raise FrugalError(
                    "self-attention with a mask or in another layout",
                    "Wan's plain self-attention",
                    "remove the node that changes it",
                )

            def whole(q, k, v):
                if before is not None:
                    return before(func, q, k, v, heads, **kwargs)
                return func(q, k, v, heads, **kwargs)

            return over_pages(cache, layer, streams, q, k, v, heads, whole)

        return attend


def load_again(guider: Any, shape: Sequence[int], held: int) -> None:
    """Bring the model back to its device in the middle of a run, as at the start of it, after
    another took its place. shape: of the run's latent. held: bytes of pages on the device.
    """
    model_options = dict(guider.model_options)
    options = dict(model_options.get("transformer_options", {}))
    needs = options.get(NEEDS)
    if needs is not None:
        options[NEEDS] = replace(needs, held=held)
    model_options["transformer_options"] = options
    comfy.sampler_helpers.prepare_sampling(guider.model_patcher, shape, guider.conds, model_options)


def _check_inputs(control: Any, inputs: dict[str, Any]) -> None:
    for name, value in inputs.items():
        shaped = isinstance(value, torch.Tensor) and value.ndim >= 4
        if name != "clip_fea" and (shaped or isinstance(value, (list, tuple))):
            raise FrugalError(
                f"the conditioning has {name}, which spans the whole video",
                "a prompt, and at most a start image",
                "remove that conditioning",
            )
    if control is not None:
        raise FrugalError("a ControlNet", "none", "remove the ControlNet from the conditioning")
