"""Attention of vLLM-Omni on a CPU: its own call of torch, which it makes for cards only."""

from __future__ import annotations

from vllm_omni.diffusion.attention.backends.sdpa import SDPABackend, SDPAImpl


class CpuAttention(SDPAImpl):
    def forward(self, query, key, value, attn_metadata=None):
        return self._forward_impl(query, key, value, attn_metadata, mask_mode="broadcast_k")


class CpuBackend(SDPABackend):
    @staticmethod
    def get_impl_cls():
        return CpuAttention
