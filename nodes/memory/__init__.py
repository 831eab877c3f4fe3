"""Memory plan, cached cross-attention, Doctor, run report."""
