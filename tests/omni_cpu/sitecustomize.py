"""Lets torchvision's CUDA build be imported beside a torch for CPUs.

Its extension cannot load there, and its Python part then stumbles over operators that nobody
declared. They are declared here, just before, and never called.
"""

from __future__ import annotations

import importlib.abc
import sys

OPERATORS = (
    "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
)


class Declare(importlib.abc.MetaPathFinder):
    def find_spec(self, fullname, path=None, target=None):
        if fullname == "torchvision":
            sys.meta_path.remove(self)
            import torch

            if torch.version.cuda is None:
                library = torch.library.Library("torchvision", "DEF")
                for operator in OPERATORS:
                    library.define(operator)
                # It would take the declarations with it.
                torch.library.frugal_torchvision = library
        return None


sys.meta_path.insert(0, Declare())
