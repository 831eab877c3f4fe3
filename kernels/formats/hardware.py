"""What ComfyUI's number formats need of a card (constraints of comfy-kitchen's kernels, and of fp8
matrix units): the one table that loader, plan and Doctor read.
"""

from __future__ import annotations

Capability = tuple[int, int]
# ComfyUI's name of a format -> (name people use, least compute capability).
FORMATS: dict[str, tuple[str, Capability]] = {
    "float8_e4m3fn": ("fp8 e4m3", (8, 9)),
    "float8_e5m2": ("fp8 e5m2", (8, 9)),
    "int8_tensorwise": ("int8", (7, 5)),
    "convrot_w4a4": ("W4A4", (7, 5)),
    "asym_w4a8_int8": ("W4A8", (8, 0)),
    "nvfp4": ("NVFP4", (10, 0)),
    "mxfp8": ("MXFP8", (10, 0)),
}
# These run as integers on any device, through PyTorch where comfy-kitchen's kernel of this name is
# off; the others are expanded to the compute type where the device cannot multiply in them.
INTEGER = {
    "int8_tensorwise": "int8_linear",
    "convrot_w4a4": "convrot_w4a4_linear",
    "asym_w4a8_int8": "w4a8_int8_linear",
}
