"""The VAE nodes."""

from __future__ import annotations

from .decode import FrugalWanDecode, FrugalWanDecodeToFile
from .encode import FrugalWanEncode

NODES = [FrugalWanDecode, FrugalWanDecodeToFile, FrugalWanEncode]
