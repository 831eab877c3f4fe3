"""Attention: one public function, backends with declared constraints, a choice by measurement."""

from .selector import AUTO, KernelSelector, attention

__all__ = ["AUTO", "KernelSelector", "attention"]
