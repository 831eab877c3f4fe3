"""Which kernel computes a call: the state of one sampling run."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace

import torch

from ..errors import FrugalError
from ..retry import is_out_of_memory
from .backends import BACKENDS, NAMED, TORCH, Backend, launch, versions
from .call import (
    ADDITIVE,
    BOOL,
    NONE,
    Call,
    belong,
    capability_of,
    describe,
    device_kind,
    four_axes,
)
from .measure import Decision, measure, reason_of
from .torch_sdpa import Run
from .tuning_cache import place_key

AUTO = "auto"
# The attention that the host program would have used.
DEFAULT = "default"
HANDED_ON = "handed on"


@dataclass
class Route:
    """How calls of one kind are computed: `names` in order, the first that is not broken."""

    call: Call
    names: list[str]
    decision: Decision
    source: str
    calls: int = 0
    reasons: dict[str, str] = field(default_factory=dict)


class KernelSelector:
    """Chooses per shape and keeps count. One sampling run, one device, one thread.

    choice: "auto" or a backend's name. allow_lossy: 8-bit kernels may be chosen. decisions: what is
    remembered, read only; `fresh` collects what was measured. default_name tells one default
    attention from another. Raises FrugalError if there is no backend of the chosen name, or if it
    cannot run on this machine.
    """

    def __init__(
        self,
        device: torch.device,
        choice: str = AUTO,
        allow_lossy: bool = False,
        backends: Sequence[Backend] = BACKENDS,
        decisions: dict[str, Decision] | None = None,
        default_name: str = "",
    ):
        self.choice, self.allow_lossy = choice, allow_lossy
        self.capability = capability_of(device)
        self.backends = {each.name: each for each in backends}
        self.absent = absences(self.backends.values(), device_kind(device))
        if choice != AUTO:
            check_choice(choice, self.backends, self.absent)
        self.place = place_key(device, versions(backends), default_name)
        self.remembered = dict(decisions or {})
        self.fresh: dict[str, Decision] = {}
        self.routes: dict[tuple[Call, bool], Route] = {}
        self.broken: dict[str, str] = {}
        self.handed_on = 0
        # Names of kernels that gave results in this run.
        self.used: set[str] = set()

    def attend(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        mask: torch.Tensor | None = None,
        scale: float | None = None,
        *,
        lossy: bool = True,
        default: Run | None = None,
        chained: bool = False,
    ) -> torch.Tensor | None:
        """(B, H, Lq, Dv) in q's dtype, or None where the caller's own attention is to be used.

        q (B, H, Lq, D), k (B, Hkv, Lk, D), v (B, Hkv, Lk, Dv); mask of 2, 3 or 4 axes, bool (True:
        attend) or additive; scale: 1/sqrt(D) if None. lossy: this call bears 8-bit kernels.
        default: the caller's attention, a candidate of "auto" like the others. chained: another
        override is there. It may do more than attention, so only a kernel that was named goes
        before it, and what that declines is handed on; else the fastest exact one takes it.
        """
        if not belong(q, k, v) or (chained and self.choice == AUTO):
            return None
        call = describe(q, k, v, mask, lossy and self.allow_lossy, self.capability)
        scale = default_scale(call) if scale is None else float(scale)
        mask = four_axes(mask, q.dtype)
        if torch.compiler.is_compiling():
            return self._while_compiling(call, q, k, v, mask, scale, chained)
        if call.grad or torch.jit.is_tracing():  # pyright: ignore[reportPrivateImportUsage]
            return None
        route = self.routes.get((call, chained))
        if route is None:
            route = self._route(call, q, k, v, mask, scale, default, chained)
            self.routes[call, chained] = route
        route.calls += 1
        return self._run(route, q, k, v, mask, scale)

    def _run(self, route: Route, q, k, v, mask, scale) -> torch.Tensor | None:
        last: Exception | None = None
        for name in route.names:
            if name in (DEFAULT, HANDED_ON):
                self.handed_on += name == HANDED_ON
                return None
            if name in self.broken:
                continue
            try:
                out = launch(self.backends[name], q, k, v, mask, scale)
                self.used.add(name)
                return out
            except Exception as raised:
                # Memory may suffice at the next call, so this is no verdict on the kernel.
                if not is_out_of_memory(raised):
                    self.broken[name] = route.reasons[name] = reason_of(raised)
                last = raised
        if last is not None:
            raise last
        return None

    def distrust(self, reason: str) -> list[str]:
        """Use none of the kernels that gave results so far; their names. The next calls go to what
        is left, in the end to the caller's own attention.
        """
        names = sorted(self.used)
        self.broken |= dict.fromkeys(names, reason)
        self.used.clear()
        return names

    def lasting(self) -> dict[str, Decision]:
        """What was measured and is worth keeping: no choice of a kernel that failed since."""
        return {
            key: each
            for key, each in self.fresh.items()
            if not each.ranking or each.ranking[0][0] not in self.broken
        }

    def _route(self, call: Call, q, k, v, mask, scale, default, chained) -> Route:
        reasons = dict(self.absent)
        # A person who names an 8-bit kernel gets that one or an exact one, not another 8-bit one.
        exact = replace(call, lossy=call.lossy and self.choice == AUTO)
        named = self._named(call, reasons)
        if named is not None:
            decision, source = self._decide(call, [named], q, k, v, mask, scale, named.name)
            reasons |= decision.refused
            if decision.ranking:
                others = [each.name for each in self._candidates(exact, {})]
                names = [named.name, *([HANDED_ON] if chained else others)]
                return Route(call, names, decision, source, reasons=reasons)
        if self.choice != AUTO and chained:
            return Route(call, [HANDED_ON], Decision(()), HANDED_ON, reasons=reasons)
        candidates = [c for c in self._candidates(exact, reasons) if c.name not in reasons]
        if default is not None and not chained:
            candidates.append(_as_backend(default))
        first = [each for each in candidates if not each.fallback]
        decision, source = self._decide(exact, first, q, k, v, mask, scale)
        if not decision.ranking:
            reasons |= decision.refused
            fallback = [each for each in candidates if each.fallback]
            decision, source = self._decide(exact, fallback, q, k, v, mask, scale, "fallback")
        names = [name for name, _ in decision.ranking]
        # The rest has not been turned down for this call; it is there if the measured ones fail.
        names += [each.name for each in candidates if each.name not in (*names, *decision.refused)]
        return Route(call, names, decision, source, reasons=reasons | decision.refused)

    def _named(self, call: Call, reasons: dict[str, str]) -> Backend | None:
        if self.choice == AUTO:
            return None
        backend = self.backends[self.choice]
        why = self.broken.get(self.choice) or backend.refusal(call)
        if why is not None:
            reasons[self.choice] = why
        return backend if why is None else None

    def _candidates(self, call: Call, reasons: dict[str, str]) -> list[Backend]:
        found = []
        for name, backend in self.backends.items():
            why = self.absent.get(name) or self.broken.get(name) or backend.refusal(call)
            if why is None and not backend.automatic:
                why = "is used only when chosen by name"
            if why is None:
                found.append(backend)
            else:
                reasons.setdefault(name, why)
        return found

    def _decide(
        self, call: Call, candidates: list[Backend], q, k, v, mask, scale, only: str = ""
    ) -> tuple[Decision, str]:
        key = self._key(call, only)
        known = self.fresh.get(key) or self.remembered.get(key)
        if known is not None:
            seen = {name for name, _ in known.ranking} | known.refused.keys()
            if known.ranking and seen >= {each.name for each in candidates}:
                return known, "remembered" if key in self.remembered else "measured"
        decision = measure(candidates, q, k, v, mask, scale)
        self.fresh[key] = decision
        return decision, "measured"

    def _key(self, call: Call, only: str = "") -> str:
        return f"{self.place} | {call.key()}" + (f" only={only}" if only else "")

    def _while_compiling(self, call: Call, q, k, v, mask, scale, chained) -> torch.Tensor | None:
        """Nothing can be timed inside a graph: a remembered choice, else PyTorch's own."""
        named = None if self.choice == AUTO else self.backends[self.choice]
        if named is not None and named.compiles and named.refusal(call) is None:
            return launch(named, q, k, v, mask, scale)
        if named is not None and chained:
            return None
        exact = replace(call, lossy=call.lossy and self.choice == AUTO)
        known = self.remembered.get(self._key(exact))
        for name, _ in () if known is None else known.ranking:
            backend = self.backends.get(name)
            if backend is None or not backend.compiles or name in self.absent:
                continue
            if backend.refusal(exact) is None:
                return launch(backend, q, k, v, mask, scale)
        return launch(TORCH, q, k, v, mask, scale)


def absences(backends: Iterable[Backend], device: str) -> dict[str, str]:
    """Name -> why that backend cannot run on this machine; the others are left out."""
    reasons = ((each.name, each.absent(device)) for each in backends)
    return {name: why for name, why in reasons if why is not None}


def check_choice(choice: str, backends: dict[str, Backend], absent: dict[str, str]) -> None:
    """Raises FrugalError where `choice` is no backend, or one that cannot run on this machine."""
    if choice not in backends:
        raise FrugalError(
            f"attention kernel {choice!r}",
            f"auto or one of {', '.join(backends)}",
            "choose one of these",
        )
    if choice in absent:
        raise FrugalError(
            f"attention kernel {choice} {absent[choice]}",
            "a kernel that can run on this machine",
            "install it, or choose auto",
        )


def attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    mask: torch.Tensor | None = None,
    scale: float | None = None,
    backend: str = TORCH.name,
) -> torch.Tensor:
    """softmax(Q K^T * scale + M) V as (B, H, Lq, Dv) in q's dtype, by the named backend, with
    nothing measured and nothing kept.

    q (B, H, Lq, D), k (B, Hkv, Lk, D), v (B, Hkv, Lk, Dv) with Hkv dividing H; mask of 2, 3 or 4
    axes, bool (True: attend) or additive; scale: 1/sqrt(D) if None. Raises FrugalError where the
    backend cannot serve the call.
    """
    check_choice(backend, NAMED, {})
    chosen = NAMED[backend]
    call = describe(q, k, v, mask, lossy=True)
    why = chosen.absent(call.device) or chosen.refusal(call)
    if why is not None:
        raise FrugalError(
            f"attention kernel {backend} {why}", "a call that it serves", "choose another kernel"
        )
    scale = default_scale(call) if scale is None else float(scale)
    return launch(chosen, q, k, v, four_axes(mask, q.dtype), scale)


def default_scale(call: Call) -> float:
    """The scale of scaled dot products: 1 / sqrt(width of a head)."""
    return 1.0 / math.sqrt(call.width)


def _as_backend(default: Run) -> Backend:
    return Backend(
        DEFAULT,
        default,
        devices=(),
        dtypes=(),
        masks=(NONE, BOOL, ADDITIVE),
        max_width=0,
        multiple=1,
        uneven_values=True,
    )
