"""What one family does for another without being imported by it.

A family that could not load offers nothing, and who asks has to do without.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

PLAN = "plan a run's memory"
_OFFERS: dict[str, Callable[..., Any]] = {}


def offer(name: str, function: Callable[..., Any]) -> None:
    """Called by a family when it loads."""
    _OFFERS[name] = function


def offered(name: str) -> Callable[..., Any] | None:
    """The function of that name, or None if its family is not loaded."""
    return _OFFERS.get(name)
