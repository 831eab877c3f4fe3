"""The choice of a kernel by measurement: each candidate is tried on a copy, checked, then timed."""

from __future__ import annotations

import inspect
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

import torch

from ..errors import FrugalError
from . import check
from .backends import Backend, launch
from .call import describe

Tensors = tuple[torch.Tensor, torch.Tensor, torch.Tensor, "torch.Tensor | None"]
RUNS = 3
# A kernel that once took this much longer than the best so far is not timed again.
HOPELESS = 1.5
# A trial works on copies of at most this many bytes, so that measuring fits beside a large model.
TRIAL_BYTES = 256 * 2**20
# On a CPU a whole call may take minutes: work of one trial there.
TRIAL_FLOPS = 4e9
OUT_OF_MEMORY = torch.OutOfMemoryError.__name__


@dataclass(frozen=True)
class Decision:
    """ranking: (name, seconds of one call), fastest first. refused: name -> why it was turned
    down. scaled: the seconds were measured on a part of the call and scaled by its work.
    """

    ranking: tuple[tuple[str, float], ...]
    refused: dict[str, str] = field(default_factory=dict)
    scaled: bool = False

    @property
    def lasting(self) -> bool:
        """False where memory ran out: there may be more of it next time."""
        return not any(OUT_OF_MEMORY in why for why in self.refused.values())


def measure(
    candidates: Iterable[Backend],
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    mask: torch.Tensor | None,
    scale: float,
) -> Decision:
    """Try `candidates`, which must not refuse the call, on it: q (B, H, Lq, D), k and v with Hkv
    heads, mask with four axes or None.

    Waits for the device. A kernel that raises, gives NaN, a wrong shape, dtype or value, or changes
    its inputs, is turned down with the reason.
    """
    whole = describe(q, k, v, mask)
    on_cpu = q.device.type == "cpu"
    part = _part(q, k, v, mask, TRIAL_FLOPS if on_cpu else float("inf"))
    refused: dict[str, str] = {}
    able: list[Backend] = []
    for backend in candidates:
        # A GPU is only filled by the whole call, and some kernels prepare for each new length; a
        # CPU's time grows with the work.
        wrong = _trial(backend, part, scale) or (
            None if on_cpu else _rehearsal(backend, (q, k, v, mask), scale)
        )
        if wrong is None:
            able.append(backend)
        else:
            refused[backend.name] = wrong
    share = whole.flops / describe(*part[:3], None).flops if on_cpu else 1.0
    times = _times(able, part if on_cpu else (q, k, v, mask), scale, refused)
    ranking = sorted(((name, share * each) for name, each in times.items()), key=lambda it: it[1])
    return Decision(tuple(ranking), refused, scaled=share > 1.0)


def reason_of(raised: BaseException) -> str:
    """First line of an exception, ASCII and short, with its kind."""
    line = next(iter(str(raised).strip().splitlines()), "")
    text = f"raised {type(raised).__name__}: {line}" if line else f"raised {type(raised).__name__}"
    return text.encode("ascii", "replace").decode()[:160]


def _trial(backend: Backend, tensors: Tensors, scale: float) -> str | None:
    """What is wrong with `backend` on copies of these tensors, or None."""
    q, k, v, mask = tensors
    try:
        inputs = q.clone(), k.clone(), v.clone()
        before = check.fingerprint(*inputs)
        out = launch(backend, *inputs, mask, scale)
        after = check.fingerprint(*inputs)
        changed = [name for name, a, b in zip("qkv", before, after, strict=True) if a != b]
        if changed:
            return f"changes {' and '.join(changed)} in place"
        return check.complaint(out, q, k, v, mask, scale, backend.exact)
    except Exception as raised:
        return reason_of(raised)


def _rehearsal(backend: Backend, whole: Tensors, scale: float) -> str | None:
    """What is wrong with `backend` on the whole call, or None; raises FrugalError where it spoils
    the inputs, of which there is no copy.
    """
    before = check.fingerprint(*whole[:3])
    try:
        wrong = check.complaint(launch(backend, *whole, scale), *whole, scale, backend.exact)
    except Exception as raised:
        wrong = reason_of(raised)
    if check.fingerprint(*whole[:3]) != before:
        raise FrugalError(
            f"attention kernel {backend.name} changed its inputs, which a trial on a part had not "
            "shown",
            "a kernel that leaves q, k and v alone",
            "choose another kernel by name and run again",
        )
    return wrong


def _times(
    backends: list[Backend], tensors: Tensors, scale: float, refused: dict[str, str]
) -> dict[str, float]:
    """Name -> least of RUNS timed calls, in turns; one that raises goes to `refused`.

    What other programs do to a time only adds to it, so the least is the truest.
    """
    clock = _clock(tensors[0].device)
    times: dict[str, float] = {}
    for _ in range(RUNS):
        for backend in backends:
            start = clock()
            try:
                launch(backend, *tensors, scale)
            except Exception as raised:
                refused[backend.name] = reason_of(raised)
                times.pop(backend.name, None)
                continue
            taken = clock() - start
            times[backend.name] = min(taken, times.get(backend.name, taken))
        best = min(times.values(), default=0.0)
        backends = [
            each for each in backends if times.get(each.name, float("inf")) <= HOPELESS * best
        ]
    return times


def _clock(device: torch.device) -> Callable[[], float]:
    wait = getattr(getattr(torch, device.type, None), "synchronize", None)
    if device.type == "cpu" or wait is None:
        return time.perf_counter

    # Of MPS there is one device, and its function takes none.
    named = (device,) if inspect.signature(wait).parameters else ()

    def after_waiting() -> float:
        wait(*named)
        return time.perf_counter()

    return after_waiting


def _part(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None, flops: float
) -> Tensors:
    """The first key heads, with their heads, of the first pictures, and on a CPU the first rows:
    as much as the limits allow, at least one row of one head.
    """
    batch, heads, q_len, _ = q.shape
    group = heads // k.shape[1]
    one = describe(q[:1, :group], k[:1, :1], v[:1, :1], None)
    per_head = (q[:1, :group].numel() + k[:1, :1].numel() + v[:1, :1].numel()) * q.element_size()
    many = max(1, int(min(TRIAL_BYTES / per_head, flops / one.flops)))
    kv, pictures = min(k.shape[1], many), max(1, min(batch, many // k.shape[1]))
    rows = max(1, min(q_len, int(q_len * flops / one.flops))) if flops < one.flops else q_len
    if mask is not None:
        mask = mask.expand(batch, heads, q_len, k.shape[2])
        mask = mask[:pictures, : kv * group, :rows]
    return q[:pictures, : kv * group, :rows], k[:pictures, :kv], v[:pictures, :kv], mask
