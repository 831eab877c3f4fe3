"""Calls of a model that are kept to be made again: what went in, what came out.

In a calibration file call i is an entry of the list `calls` in its JSON, with `sigma` (or null),
`model` (what was recorded, JSON), and `arguments`: name -> {"tensor": name in the file} or
{"value": number, text, bool or null} or {"list": [the same again]}. The output is the tensor
`call.i.output`. Tensors keep the type in which they arrived.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

OUTPUT = "output"


@dataclass(frozen=True)
class ReferenceCall:
    """One call. arguments: name -> tensor, plain value, or list of these. output: float tensor.
    sigma: noise level, None if unknown. model: what was recorded, JSON.
    """

    arguments: Mapping[str, Any]
    output: torch.Tensor
    sigma: float | None = None
    model: Mapping[str, Any] = field(default_factory=dict)


def unstorable(arguments: Mapping[str, Any]) -> str | None:
    """The first argument that cannot be kept, with its type; None if all can."""
    for name, value in arguments.items():
        rest = value if isinstance(value, (list, tuple)) else (value,)
        for each in rest:
            plain = each is None or isinstance(each, (bool, int, str, torch.Tensor))
            if not plain and not (isinstance(each, float) and math.isfinite(each)):
                return f"{name} ({type(each).__name__})"
    return None


def packed(calls: Sequence[ReferenceCall]) -> tuple[dict[str, torch.Tensor], list[dict[str, Any]]]:
    """(tensors by their names in the file, JSON entries) of calls that `unstorable` passes."""
    tensors: dict[str, torch.Tensor] = {}
    entries = []
    for number, call in enumerate(calls):
        start = f"call.{number}"

        def place(key: str, value: Any) -> dict[str, Any]:
            if isinstance(value, (list, tuple)):
                return {"list": [place(f"{key}.{i}", each) for i, each in enumerate(value)]}
            if not isinstance(value, torch.Tensor):
                return {"value": value}
            # A copy: safetensors refuses tensors that share memory.
            tensors[key] = value.detach().cpu().clone().contiguous()
            return {"tensor": key}

        place(f"{start}.{OUTPUT}", call.output)
        given = call.arguments.items()
        arguments = {name: place(f"{start}.in.{name}", value) for name, value in given}
        entries.append({"sigma": call.sigma, "model": dict(call.model), "arguments": arguments})
    return tensors, entries


def unpacked(
    entries: Sequence[Mapping[str, Any]], read: Callable[[str], torch.Tensor]
) -> list[ReferenceCall]:
    """The calls of entries that `checked` let pass; `read` gives a tensor by its name."""

    def value(spec: Mapping[str, Any]) -> Any:
        if "list" in spec:
            return [value(each) for each in spec["list"]]
        return read(spec["tensor"]) if "tensor" in spec else spec["value"]

    return [
        ReferenceCall(
            {name: value(spec) for name, spec in entry["arguments"].items()},
            read(f"call.{number}.{OUTPUT}"),
            entry["sigma"],
            entry["model"],
        )
        for number, entry in enumerate(entries)
    ]


def checked(entries: Any, held: Collection[str]) -> tuple[dict[str, Any], ...]:
    """The JSON entries of a file that holds the tensors `held`. Raises ValueError, KeyError or
    TypeError for entries that are damaged or name tensors that are not there.
    """

    def check(spec: Mapping[str, Any]) -> None:
        if "list" in spec:
            for each in spec["list"]:
                check(each)
        elif "tensor" in spec:
            if spec["tensor"] not in held:
                raise ValueError(spec["tensor"])
        elif "value" not in spec:
            raise KeyError("value")

    for number, entry in enumerate(entries):
        if f"call.{number}.{OUTPUT}" not in held:
            raise ValueError(OUTPUT)
        if entry["sigma"] is not None and not math.isfinite(float(entry["sigma"])):
            raise ValueError("sigma")
        dict(entry["model"])
        for spec in entry["arguments"].values():
            check(spec)
    return tuple(entries)
