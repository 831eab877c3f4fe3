"""The Wan nodes."""

from __future__ import annotations

from .experts import FrugalWanTwoExperts
from .load import FrugalLoadWan

NODES = [FrugalLoadWan, FrugalWanTwoExperts]
