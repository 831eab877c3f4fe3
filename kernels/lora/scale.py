"""The strength of a LoRA where its file states it beside the tensors and not as `alpha` tensors.

peft multiplies by lora_alpha / r, with use_rslora by lora_alpha / sqrt(r), and alpha_pattern and
rank_pattern change both per layer. diffusers (and SimpleTuner) keep that as JSON under
`lora_adapter_metadata`, Finetrainers under `lora_config`, others entry by entry; names may carry
the part of the pipeline, as in `transformer.lora_alpha`. peft itself leaves it in
adapter_config.json beside adapter_model.safetensors.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .. import json_text
from ..errors import FrugalError

JSON_ENTRIES = ("lora_adapter_metadata", "lora_config", "adapter_config", "peft_config")
FIELDS = {
    "r": "r",
    "rank": "r",
    "lora_rank": "r",
    "lora_alpha": "lora_alpha",
    "use_rslora": "use_rslora",
    "rank_pattern": "rank_pattern",
    "alpha_pattern": "alpha_pattern",
}
PEFT_FILE, PEFT_CONFIG = "adapter_model.safetensors", "adapter_config.json"
TEXT_ENCODERS = ("text_encoder", "te")
MAX_CONFIG_BYTES = 1_000_000
SAVE = "save the LoRA again with an alpha tensor for each layer, or download it again"


class StatedScale:
    """What a file states: part of the pipeline ("" if none is named) -> field -> value."""

    def __init__(self, file: str, parts: Mapping[str, Mapping[str, Any]]):
        self.file, self.parts = file, parts

    def alpha(self, layer: str, rank: int) -> float | None:
        """The alpha of a layer, given by its name in the file, so that its factor is alpha / rank;
        None where nothing is stated. Raises FrugalError for values that are no numbers, or for
        another rank.
        """
        stated = self._part(layer)
        alpha = _match(stated.get("alpha_pattern"), layer, stated.get("lora_alpha"))
        if alpha is None:
            return None
        alpha = self._number("lora_alpha", alpha)
        meant = _match(stated.get("rank_pattern"), layer, stated.get("r"))
        if meant is not None and self._number("r", meant) != rank:
            raise FrugalError(
                f"{self.file} states the rank {ascii(meant)[:20]} for {ascii(layer)[1:-1][:80]} "
                f"and holds {rank}",
                "one rank",
                SAVE,
            )
        return alpha * math.sqrt(rank) if _is_true(stated.get("use_rslora")) else alpha

    def _part(self, layer: str) -> Mapping[str, Any]:
        named = [part for part in self.parts if not part or layer.startswith(f"{part}.")]
        others = [part for part in self.parts if part.partition(".")[0] not in TEXT_ENCODERS]
        if not named and len(others) == 1:
            named = others
        return self.parts[max(named, key=len)] if named else {}

    def _number(self, field: str, value: Any) -> float:
        try:
            number = float(value)
        except (TypeError, ValueError):
            number = math.nan
        if not math.isfinite(number) or isinstance(value, bool):
            raise FrugalError(
                f"{self.file} states {field} as {ascii(value)[:40]}", "a number", SAVE
            )
        return number


def stated_scale(path: Path, metadata: Mapping[str, str] | None) -> StatedScale:
    """What the LoRA file at `path` with these metadata states. Raises FrugalError for JSON that
    cannot be read where a scale should be.
    """
    sources: list[Mapping[str, Any]] = []
    config = path.parent / PEFT_CONFIG
    if path.name == PEFT_FILE and config.is_file():
        if config.stat().st_size > MAX_CONFIG_BYTES:
            raise FrugalError(f"{PEFT_CONFIG} beside {path.name} is very large", "JSON", SAVE)
        sources.append(_object(PEFT_CONFIG, config.read_text("utf-8", "replace")))
    held = dict(metadata or {})
    sources.append({key: value for key, value in held.items() if key not in JSON_ENTRIES})
    sources += [_object(f"{path.name}: {key}", held[key]) for key in JSON_ENTRIES if key in held]
    parts: dict[str, dict[str, Any]] = {}
    for source in sources:
        for key, value in source.items():
            part, _, field = key.rpartition(".")
            if field in FIELDS and value is not None:
                if field.endswith("_pattern") and isinstance(value, str):
                    value = _object(f"{path.name}: {key}", value)
                parts.setdefault(part, {})[FIELDS[field]] = value
    return StatedScale(path.name, parts)


def _object(name: str, text: str) -> Mapping[str, Any]:
    try:
        found = json_text.parse(text)
    except ValueError:
        found = None
    if not isinstance(found, dict):
        raise FrugalError(f"{ascii(name)[1:-1][:120]} is no JSON object", "a JSON object", SAVE)
    return found


def _match(pattern: Any, layer: str, otherwise: Any) -> Any:
    """The value of the first pattern that names the layer, by peft's rule: the whole name or its
    end after a dot, as a regular expression.
    """
    for key, value in (pattern if isinstance(pattern, Mapping) else {}).items():
        try:
            if re.fullmatch(rf"(?:.*\.)?(?:{key})", layer):
                return value
        except re.error:
            continue
    return otherwise


def _is_true(value: Any) -> bool:
    return value is True or str(value).lower() in ("true", "1")
