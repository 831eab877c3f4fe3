"""The nodes of text embeddings."""

from __future__ import annotations

from .cached_encode import FrugalCachedTextEncode
from .embeds import FrugalLoadTextEmbeds, FrugalSaveTextEmbeds

NODES = [FrugalSaveTextEmbeds, FrugalLoadTextEmbeds, FrugalCachedTextEncode]
