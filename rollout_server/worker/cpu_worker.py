"""vLLM's CPU worker, made to sleep. Runs in the engine's process.

vLLM's own CPU worker ignores `sleep`. Here the pages behind the weights and the KV cache are
given back to the system with `madvise(MADV_DONTNEED)`: addresses stay valid, resident memory falls
at once whatever allocator they came from, and a page that is touched again reads as zeros. So
waking costs nothing, the KV cache wakes up zeroed (stale NaNs would reach attention through masked
positions), and the weights must be written again, as after vLLM's sleep level 2.
"""

import ctypes
import mmap
from typing import Any

import torch
from vllm.model_executor.layers import utils as layer_utils
from vllm.v1.worker.cpu_worker import CPUWorker

from rollout_server.weights.storages import flat, storages
from rollout_server.worker.cpu_experts import keep_plain
from rollout_server.worker.lora import add_lora_linear

_libc = ctypes.CDLL(None, use_errno=True)
_libc.madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
_MADV_DONTNEED = 4


class CpuWorker(CPUWorker):
    def load_model(self, *args: Any, **kwargs: Any) -> None:
        # vLLM would repack linear weights for oneDNN, AMX or Zen and drop the originals, and new
        # weights would have nowhere to go. It looks this function up at each use.
        layer_utils.dispatch_cpu_unquantized_gemm = _plain_gemm
        keep_plain()
        if self.vllm_config.lora_config is not None:
            from vllm.lora.punica_wrapper.punica_cpu import PunicaWrapperCPU

            wrapper: Any = PunicaWrapperCPU
            wrapper.add_lora_linear = add_lora_linear
        super().load_model(*args, **kwargs)

    def sleep(self, level: int = 1) -> None:
        if level != 2:
            raise ValueError(f"sleep level {level}: on the CPU only level 2 is there")
        for storage in self._storages():
            _give_back(storage)

    def wake_up(self, tags: list[str] | None = None) -> None:
        """Nothing to do: pages come back, zeroed, when they are touched."""

    def _storages(self) -> list[torch.UntypedStorage]:
        """Each storage of a parameter or of the KV cache, once. Buffers stay: no sync brings
        those back that a model computes for itself. So do parameters that are the trainer's."""
        model = self.model_runner.get_model()
        shared = getattr(model, "rollout_shared", False)
        parameters = [] if shared else model.parameters()
        released = storages([*parameters, *flat(self.model_runner.kv_caches)])
        kept = storages(model.buffers())
        return [storage for at, storage in released.items() if at not in kept]


_repacking_gemm = layer_utils.dispatch_cpu_unquantized_gemm


def _plain_gemm(layer: Any, remove_weight: bool) -> None:
    if layer.weight.is_meta or layer.weight.ndim == 2:
        layer.cpu_linear = torch.nn.functional.linear
    else:  # convolutions
        _repacking_gemm(layer, remove_weight)


def _give_back(storage: torch.UntypedStorage) -> None:
    # Only whole pages inside the storage: its neighbours share the first and the last.
    page = mmap.PAGESIZE
    start = -(-storage.data_ptr() // page) * page
    end = (storage.data_ptr() + storage.nbytes()) // page * page
    if end > start and _libc.madvise(start, end - start, _MADV_DONTNEED) != 0:
        raise OSError(ctypes.get_errno(), "madvise(MADV_DONTNEED) failed")
