"""vLLM-Omni 0.30 on a CPU, for tests: it has no such platform of its own and lets others add one.

Runs inside the server's environment, not in the pack's. What differs from a card: memory is the
machine's, attention is torch's, finished videos are packed without a second stream, and the INT4
kernel, which wants matrices, gets its inputs flattened. vLLM builds that kernel for AVX-512 only:
elsewhere the weights that it was given are unpacked by vLLM's own function and multiplied by torch.
"""

from __future__ import annotations

import contextlib
import logging
import os

import psutil
import torch
from vllm.platforms.cpu import CpuPlatform
from vllm_omni.platforms.interface import OmniPlatform, OmniPlatformEnum

CPU = torch.device("cpu")
BY_TORCH = "INT4 products by torch: vLLM has no kernel for this processor"


class CpuOmniPlatform(OmniPlatform, CpuPlatform):
    _omni_enum = OmniPlatformEnum.OOT

    @classmethod
    def get_torch_device(cls, local_rank=None):
        return CPU

    @classmethod
    def set_device(cls, device):
        pass

    @classmethod
    def get_device_count(cls):
        return int(os.environ.get("FRUGAL_OMNI_RANKS", "1"))

    @classmethod
    def get_device_version(cls):
        return None

    @classmethod
    def synchronize(cls, *_):
        pass

    @classmethod
    def empty_cache(cls):
        pass

    @classmethod
    def current_stream(cls, *_):
        return None

    @classmethod
    def stream(cls, *_):
        return contextlib.nullcontext()

    @classmethod
    def get_free_memory(cls, device=None):
        return psutil.virtual_memory().available

    @classmethod
    def get_device_memory(cls, device=None):
        return psutil.virtual_memory().available, psutil.virtual_memory().total

    mem_get_info = get_device_memory

    @classmethod
    def memory_allocated(cls, *_):
        return 0

    memory_reserved = max_memory_allocated = max_memory_reserved = memory_allocated

    @classmethod
    def reset_peak_memory_stats(cls, *_):
        pass

    @classmethod
    def supports_torch_inductor(cls):
        return False

    supports_cpu_offload = supports_diffusion_dense_flash_attention = supports_torch_inductor

    @classmethod
    def get_default_stage_config_path(cls):
        return "vllm_omni/deploy"

    @classmethod
    def get_diffusion_attn_backend_cls(cls, selected_backend, head_size, *_, **__):
        return "frugal_omni_attention.CpuBackend"

    @classmethod
    def init_diffusion_worker_vllm_config(cls, vllm_config):
        _flatten_int4()
        _pack_without_stream()


def _flatten_int4() -> None:
    from vllm.model_executor.kernels.linear.mixed_precision.cpu import CPUWNA16LinearKernel

    inner = CPUWNA16LinearKernel.apply_weights
    if inner.__name__ in ("flattened", "multiplied"):
        return
    if not hasattr(torch.ops._C, "cpu_gemm_wna16"):
        _multiply_by_torch(CPUWNA16LinearKernel)
        return

    def flattened(self, layer, x, bias=None):
        out = inner(self, layer, x.reshape(-1, x.shape[-1]), bias)
        return out.reshape(*x.shape[:-1], out.shape[-1])

    CPUWNA16LinearKernel.apply_weights = flattened


def _multiply_by_torch(kernel: type) -> None:
    from vllm.model_executor.layers.quantization.utils.quant_utils import (
        unpack_quantized_values_into_int32,
    )

    print(BY_TORCH, flush=True)  # noqa: T201

    def unpacked(self, layer) -> None:
        words, scales, _ = self._get_weight_params(layer)
        kind = self.config.weight_type
        values = unpack_quantized_values_into_int32(words.data, kind, 0) - kind.bias
        steps = scales.data.float().repeat_interleave(len(values) // len(scales), 0)
        layer.frugal_weight = (values * steps).t().to(scales.dtype).contiguous()

    def multiplied(self, layer, x, bias=None):
        return torch.nn.functional.linear(x, layer.frugal_weight, bias)

    kernel.process_weights_after_loading, kernel.apply_weights = unpacked, multiplied


def _pack_without_stream() -> None:
    from vllm_omni.diffusion.data import AsyncDiffusionOutput, AsyncOutputKind
    from vllm_omni.diffusion.ipc import pack_diffusion_output_shm
    from vllm_omni.diffusion.worker import diffusion_worker

    def loop(self) -> None:
        while (item := self._async_output_queue.get()) is not None:
            output, name, _ = item
            said = {"output": output}
            try:
                pack_diffusion_output_shm(output)
            except Exception as error:
                logging.exception("the output of %s was not packed", name)
                said = {"error": str(error)}
            ready = AsyncOutputKind.OUTPUT_READY
            self._enqueue_result(AsyncDiffusionOutput(kind=ready, async_output_id=name, **said))
            with self._async_output_done:
                self._async_output_pending = max(0, self._async_output_pending - 1)
                self._async_output_done.notify_all()

    diffusion_worker.WorkerProc._async_output_loop = loop
