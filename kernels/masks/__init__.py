"""Mask refinement on the CPU: Numba leaf kernels, their driver, and the SciPy reference they are
tested against.
"""
