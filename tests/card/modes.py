"""How ComfyUI runs on the simulated card: FRUGAL_CARD names one of MODES; unset, it does not."""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass
from types import ModuleType
from typing import Any


@dataclass(frozen=True)
class Mode:
    """dynamic: dynamic VRAM, which ComfyUI 0.3.75 has not. resident_mb: what its weights may take.
    streamed: the older patcher leaves what is beyond STATIC_MB of weights in host memory.
    """

    name: str
    dynamic: bool = False
    resident_mb: float | None = None
    streamed: bool = False


STATIC_MB = 3.0
# The tiny models hold 6 to 13 MB.
MODES = {
    mode.name: mode
    for mode in (
        Mode("dynamic", dynamic=True),
        Mode("tight", dynamic=True, resident_mb=3.0),
        Mode("static"),
        Mode("lowvram", streamed=True),
    )
}
# No card: ComfyUI on the CPU in the same torch. What the others are compared with.
CPU = "cpu"
NAME = os.environ.get("FRUGAL_CARD", "")
MODE = MODES.get(NAME)
ON_CARD = MODE is not None
OLDER = ON_CARD and not MODE.dynamic


def prepare() -> None:
    """Before torch and ComfyUI are imported."""
    if NAME not in (*MODES, CPU):
        raise ValueError(f"FRUGAL_CARD={NAME}: name one of {', '.join((*MODES, CPU))}")
    # Another environment's Triton may be visible; there is no card to compile for.
    sys.modules["triton"] = None  # type: ignore[assignment]
    if MODE is None:
        from .simulated_cuda import halves, torchvision_operators

        torchvision_operators.define()
        halves.install("CPU")
        return
    # First, for it comes before torch.
    from .simulated_cuda import card

    card.start()
    from .simulated_cuda import aimdo

    aimdo.install(MODE.dynamic, MODE.resident_mb)


def settle(arguments: Any) -> None:
    """Between ComfyUI's reading of its arguments and the import of its modules."""
    arguments.cpu = MODE is None
    arguments.disable_xformers = True
    arguments.use_pytorch_cross_attention = True
    arguments.lowvram = MODE is not None and MODE.streamed


def entered() -> None:
    """After ComfyUI's arguments are set: what its main.py does, and what a tiny model needs."""
    import comfy.model_management
    import comfy.model_patcher

    if MODE is None:
        _types_of_a_card(comfy.model_management)
    elif MODE.dynamic:
        import comfy.memory_management

        comfy.model_patcher.CoreModelPatcher = comfy.model_patcher.ModelPatcherDynamic
        comfy.memory_management.aimdo_enabled = True
    elif MODE.streamed:
        _leave_most_behind(comfy.model_management)


def server_arguments() -> tuple[str, ...]:
    """What a server of this mode is started with. Classic: it keeps results of the last graph."""
    own = ("--disable-xformers", "--use-pytorch-cross-attention", "--cache-classic")
    return (*own, "--lowvram") if MODE is not None and MODE.streamed else own


def serve() -> None:
    """What a server's main.py does not do by itself, before it starts."""
    if MODE is not None and not MODE.streamed:
        return
    import comfy.options

    comfy.options.enable_args_parsing()
    import comfy.model_management

    if MODE is None:
        _types_of_a_card(comfy.model_management)
    else:
        _leave_most_behind(comfy.model_management)


def _types_of_a_card(management: ModuleType) -> None:
    """Compute in the types that the card would: else results differ by what those round."""
    management.should_use_fp16 = lambda *_, **__: True
    management.should_use_bf16 = lambda *_, **__: True


def _leave_most_behind(management: ModuleType) -> None:
    """As if almost nothing was free: no tiny model is larger than what ComfyUI keeps in reserve."""
    load, limit = management.load_models_gpu, int(STATIC_MB * 1e6)
    management.minimum_inference_memory = lambda: 1 << 20

    def load_few(models, *args, **kwargs):
        load(models, *args, **kwargs)
        for loaded in management.current_loaded_models:
            patcher = loaded.model
            over = patcher.loaded_size() - limit if patcher is not None else 0
            if over > 0 and hasattr(patcher, "partially_unload"):
                patcher.partially_unload(patcher.offload_device, over)

    management.load_models_gpu = load_few
