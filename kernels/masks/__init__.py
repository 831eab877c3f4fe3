"""Mask refinement on the CPU: Numba kernels, their dispatch, and the SciPy reference they are
tested against.
"""
