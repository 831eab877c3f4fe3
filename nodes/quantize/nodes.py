"""Quantising nodes: one module per node, collected here."""

from __future__ import annotations

from .calibrate import FrugalCalibrate
from .quality_check import FrugalQualityCheck
from .convert import FrugalQuantize
from ..lora.unmerged import FrugalLoraSide
from .export import FrugalServerExport

NODES: list = [
    FrugalQuantize,
    FrugalCalibrate,
    FrugalQualityCheck,
    FrugalLoraSide,
    FrugalServerExport,
]
