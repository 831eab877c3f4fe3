"""Quantising nodes: one module per node, collected here."""

from __future__ import annotations

from .calibrate import FrugalCalibrate
from .check import FrugalQualityCheck
from .convert import FrugalQuantize
from .lora_side import FrugalLoraSide
from .server_export import FrugalServerExport

NODES: list = [
    FrugalQuantize,
    FrugalCalibrate,
    FrugalQualityCheck,
    FrugalLoraSide,
    FrugalServerExport,
]
