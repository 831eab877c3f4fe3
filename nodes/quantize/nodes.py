"""Quantising nodes: one module per node, collected here."""

from __future__ import annotations

from .calibrate import FrugalCalibrate
from .check import FrugalQualityCheck
from .convert import FrugalQuantize
from .lora_side import FrugalLoraSide

NODES: list = [FrugalQuantize, FrugalCalibrate, FrugalQualityCheck, FrugalLoraSide]
