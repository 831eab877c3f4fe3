"""The entry point that vLLM-Omni finds; a module of its own, since it is asked for while vLLM-Omni
is being imported.
"""

from __future__ import annotations


def platform() -> str:
    """Where the platform's class is."""
    return "frugal_omni_cpu.CpuOmniPlatform"
