"""Sampling: which attention kernel runs, which steps are computed, and the sampler itself."""
