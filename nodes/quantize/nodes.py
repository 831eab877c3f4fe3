"""Quantising nodes: one module per node, collected here."""

from __future__ import annotations

from .calibrate import FrugalCalibrate
from .convert import FrugalQuantize
from .export import FrugalServerExport
from .quality_check import FrugalQualityCheck

NODES: list = [
    FrugalQuantize,
    FrugalCalibrate,
    FrugalQualityCheck,
    FrugalServerExport,
]
