"""Attention: one public function, backends with declared constraints, a choice by measurement."""

from .selector import AUTO, Chooser, attention

__all__ = ["AUTO", "Chooser", "attention"]
