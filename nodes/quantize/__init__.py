"""Quantize, calibrate, check, export."""
