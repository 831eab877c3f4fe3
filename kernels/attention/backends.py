"""The attention backends: what each can serve, the reason where it cannot, and how it is called."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from importlib.machinery import ModuleSpec

import torch

from . import eager, packages, torch_sdpa
from .call import ADDITIVE, BOOL, NONE, Call
from .torch_sdpa import Run

ANY_MASK = (NONE, BOOL, ADDITIVE)
HALF = (torch.float16, torch.bfloat16)
FLOATS = (*HALF, torch.float32)
# Below this an 8-bit kernel gains nothing that one would notice, and the few keys of a text or an
# image prompt each weigh a lot.
LOSSY_KEYS = 1024


@dataclass(frozen=True)
class Backend:
    """One way to compute attention.

    run: (q, k, v, mask, scale) -> (B, H, Lq, Dv) in q's dtype, q untouched. exact: 16-bit or better
    throughout. devices, dtypes: () is any. least, below: compute capabilities on NVIDIA, bfloat16:
    the least for that type. widths of a head: up to max_width (0: any), a multiple of `multiple`,
    one of `widths` if given. gqa: takes fewer key heads than heads; else they are repeated first.
    package: import name that must be there. missing: a further question, answered with the reason.
    automatic: False is for kernels that only a person should ask for. spare: tried where no other
    serves. compiles: may stand in a graph of torch.compile.
    """

    name: str
    run: Run
    exact: bool = True
    devices: tuple[str, ...] = ("cuda",)
    least: tuple[int, int] = (0, 0)
    below: tuple[int, int] | None = None
    bfloat16: tuple[int, int] = (0, 0)
    dtypes: tuple[torch.dtype, ...] = HALF
    masks: tuple[str, ...] = (NONE,)
    max_width: int = 256
    multiple: int = 8
    widths: tuple[int, ...] = ()
    gqa: bool = True
    uneven_values: bool = False
    gradients: bool = False
    package: str | None = None
    distribution: str | None = None
    missing: Callable[[], str | None] | None = None
    automatic: bool = True
    fallback: bool = False
    compiles: bool = True

    def absent(self, device: str) -> str | None:
        """Why it cannot run on a `device` (as in Call) of this machine at all, or None."""
        if self.devices and device not in self.devices:
            return f"runs on {' and '.join(self.devices)}, not on {device}"
        if self.package is not None and not importable(self.package):
            return "is not installed"
        return self.missing() if self.missing is not None else None

    def refusal(self, call: Call) -> str | None:
        """Why it does not serve this call, where it is not `absent`, or None."""
        why = self.refused_card(call.capability, call.dtype)
        if why is not None:
            return why
        if self.dtypes and call.dtype not in self.dtypes:
            return f"takes {names(self.dtypes)}, not {names([call.dtype])}"
        if call.mask not in self.masks:
            return "takes no mask" if self.masks == (NONE,) else f"takes no {call.mask} mask"
        if call.v_width != call.width and not self.uneven_values:
            return f"needs values as wide as keys, not {call.v_width} for keys of {call.width}"
        if (
            (self.max_width and call.width > self.max_width)
            or call.width % self.multiple
            or (self.widths and call.width not in self.widths)
        ):
            return f"takes heads {self._width_text()} wide, not {call.width}"
        if call.grad and not self.gradients:
            return "gives no gradients"
        if not self.exact:
            return self._lossy_refusal(call)
        return None

    def refused_card(
        self, capability: tuple[int, int] | None, dtype: torch.dtype | None = None
    ) -> str | None:
        """Why an NVIDIA card of this compute capability cannot run it, for a type if one is given,
        or None; None for a capability that is not known.
        """
        if capability is None:
            return None
        if capability < self.least:
            return f"needs compute capability {dotted(self.least)}, not {dotted(capability)}"
        if self.below is not None and capability >= self.below:
            return f"is made for GPUs before compute capability {dotted(self.below)}"
        if dtype == torch.bfloat16 and capability < self.bfloat16:
            return (
                f"needs compute capability {dotted(self.bfloat16)} for bfloat16, not "
                f"{dotted(capability)}"
            )
        return None

    def _lossy_refusal(self, call: Call) -> str | None:
        if not call.lossy:
            return "computes in 8 bits, which is not allowed here"
        if call.k_len < LOSSY_KEYS:
            return f"computes in 8 bits, for {LOSSY_KEYS} keys or more, not {call.k_len}"
        return None

    def _width_text(self) -> str:
        if self.widths:
            return ", ".join(map(str, self.widths))
        most = f"up to {self.max_width}" if self.max_width else "of any size"
        return f"{most}, in steps of {self.multiple}" if self.multiple > 1 else most


def importable(name: str) -> bool:
    """Whether a module of this name can be found; only the packages above it are imported."""
    if name in sys.modules:
        module = sys.modules[name]
        return module is not None and not _bare(module.__spec__)
    try:
        spec = importlib.util.find_spec(name)
        return spec is not None and not _bare(spec)
    except (ImportError, ValueError):
        return False


def _bare(spec: ModuleSpec | None) -> bool:
    """A folder without code of its own, such as the flash_attn of FlashAttention 4 alone."""
    return spec is not None and spec.origin is None


def dotted(capability: tuple[int, int]) -> str:
    """A compute capability as it is written: 8.9."""
    return f"{capability[0]}.{capability[1]}"


def names(dtypes: Iterable[torch.dtype]) -> str:
    """Names of types for a sentence, without `torch.`."""
    return ", ".join(str(each).removeprefix("torch.") for each in dtypes)


def launch(
    backend: Backend,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    mask: torch.Tensor | None,
    scale: float,
) -> torch.Tensor:
    """(B, H, Lq, Dv) by `backend`, which must not refuse the call; mask with four axes or None."""
    if k.shape[1] != q.shape[1] and not backend.gqa:
        times = q.shape[1] // k.shape[1]
        k, v = k.repeat_interleave(times, dim=1), v.repeat_interleave(times, dim=1)
    return backend.run(q, k, v, mask, scale)


TORCH = Backend(
    "torch",
    torch_sdpa.own_choice,
    devices=(),
    dtypes=(),
    masks=ANY_MASK,
    max_width=0,
    multiple=1,
    gqa=False,
    uneven_values=True,
    gradients=True,
)
CHUNKED = Backend(
    "chunked",
    eager.chunked,
    fallback=True,
    devices=(),
    dtypes=(),
    masks=ANY_MASK,
    max_width=0,
    multiple=1,
    gqa=False,
    uneven_values=True,
)
# The order is the order of trust where nothing has been measured.
BACKENDS: tuple[Backend, ...] = (
    TORCH,
    Backend(
        "torch-cudnn",
        torch_sdpa.forced("CUDNN_ATTENTION"),
        least=(8, 0),
        masks=ANY_MASK,
        gqa=False,
    ),
    Backend(
        "torch-flash",
        torch_sdpa.forced("FLASH_ATTENTION"),
        devices=("cuda", "hip"),
        least=(8, 0),
        multiple=1,
        gqa=False,
    ),
    Backend(
        "torch-efficient",
        torch_sdpa.forced("EFFICIENT_ATTENTION"),
        devices=("cuda", "hip"),
        least=(5, 0),
        bfloat16=(8, 0),
        dtypes=FLOATS,
        masks=ANY_MASK,
        max_width=0,
        gqa=False,
        uneven_values=True,
    ),
    Backend(
        "torch-math",
        torch_sdpa.forced("MATH"),
        fallback=True,
        devices=(),
        dtypes=(),
        masks=ANY_MASK,
        max_width=0,
        multiple=1,
        gqa=False,
        uneven_values=True,
        gradients=True,
    ),
    Backend(
        "torch-upcast",
        torch_sdpa.upcast,
        devices=("cpu",),
        masks=ANY_MASK,
        max_width=0,
        multiple=1,
        gqa=False,
        uneven_values=True,
        gradients=True,
    ),
    Backend(
        "torch-fa3",
        torch_sdpa.switched("FA3"),
        least=(9, 0),
        below=(10, 0),
        gqa=False,
        package="flash_attn_interface",
        distribution="flash-attn-3",
        compiles=False,
    ),
    Backend(
        "flash-attn-4",
        packages.flash_4,
        least=(9, 0),
        max_width=128,
        package="flash_attn.cute",
        distribution="flash-attn-4",
    ),
    Backend(
        "flash-attn-3",
        packages.flash_3,
        least=(9, 0),
        below=(10, 0),
        package="flash_attn_interface",
        distribution="flash-attn-3",
    ),
    Backend(
        "flash-attn-2",
        packages.flash_2,
        least=(8, 0),
        package="flash_attn",
        distribution="flash-attn",
    ),
    Backend(
        "xformers",
        packages.xformers,
        least=(6, 0),
        bfloat16=(8, 0),
        dtypes=FLOATS,
        masks=ANY_MASK,
        gqa=False,
        package="xformers",
    ),
    Backend(
        "kitchen-int8",
        packages.kitchen_int8,
        exact=False,
        least=(7, 5),
        dtypes=FLOATS,
        masks=ANY_MASK,
        multiple=1,
        package="comfy_kitchen",
        distribution="comfy-kitchen",
        missing=packages.kitchen_missing,
    ),
    Backend(
        "sage",
        packages.sage,
        exact=False,
        least=(8, 0),
        max_width=128,
        package="sageattention",
    ),
    Backend(
        "flex",
        packages.flex,
        # Triton's own; it emulates bfloat16 on cards that have none.
        least=(7, 0),
        bfloat16=(8, 0),
        dtypes=FLOATS,
        package="triton",
        automatic=False,
    ),
    CHUNKED,
)

NAMED = {each.name: each for each in BACKENDS}


def versions(backends: Iterable[Backend]) -> str:
    """The packages of these backends with their versions: a new version is measured again."""
    found = set()
    for backend in backends:
        if backend.package is None or not importable(backend.package):
            continue
        name = backend.distribution or backend.package
        try:
            found.add(f"{name} {importlib.metadata.version(name)}")
        except importlib.metadata.PackageNotFoundError:
            found.add(name)
    return ", ".join(sorted(found))
