"""Numerics of sampling: what can be saved of the model calls of one run."""
