"""Operators that torchvision's Python side asks for at import; its library is for another torch."""

from __future__ import annotations

import importlib.machinery
import sys
import types

import torch

OPERATORS = (
    "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
)
_library = torch.library.Library("torchvision", "FRAGMENT")


def define() -> None:
    for text in OPERATORS:
        if not hasattr(torch.ops.torchvision, text.partition("(")[0]):
            _library.define(text)
    _absent("torchaudio", "torchaudio.functional", "torchaudio.transforms")


class _Absent(types.ModuleType):
    def __getattr__(self, name: str):
        if name.startswith("__"):
            raise AttributeError(name)
        raise NotImplementedError(f"{self.__name__}.{name} is not there on the simulated card")


def _absent(*names: str) -> None:
    """ComfyUI imports torchaudio; no graph of the pack needs it, and its libraries do not load."""
    for name in names:
        module = _Absent(name)
        module.__path__ = []
        module.__spec__ = importlib.machinery.ModuleSpec(name, None, is_package=True)
        sys.modules[name] = module
        parent, _, leaf = name.rpartition(".")
        if parent:
            setattr(sys.modules[parent], leaf, module)
