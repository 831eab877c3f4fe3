"""Causal Wan: model, sampler, prompts, sessions."""
