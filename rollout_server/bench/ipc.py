"""vLLM's own weight transfer on one GPU: its "ipc" engine, driven as its HTTP client does.

The same from vLLM 0.26 to 0.33: handles go pickled in base64, which the engine's process must be
told to accept.
"""

import base64
import contextlib
import pickle
from collections.abc import Mapping
from typing import Any

import torch

from rollout_server.engine.spawn import set_variables

ENGINE_ARGS = {
    "weight_transfer_config": {"backend": "ipc"},
    "worker_extension_cls": "rollout_server.bench.receiver.Receiver",
}


def accepting_pickles() -> contextlib.AbstractContextManager[None]:
    """For engines that are started meanwhile."""
    return set_variables({"VLLM_ALLOW_INSECURE_SERIALIZATION": "1"})


async def initialise(engine: Any) -> None:
    """Once, before the first `transfer`."""
    from vllm.distributed.weight_transfer.base import WeightTransferInitRequest

    await engine.client.init_weight_transfer_engine(WeightTransferInitRequest(init_info={}))


async def transfer(engine: Any, tensors: Mapping[str, torch.Tensor]) -> None:
    """Give all tensors to the engine, in one update."""
    from vllm.distributed.weight_transfer.base import WeightTransferUpdateRequest

    client = engine.client
    await client.start_weight_update()
    update, kept = _update(tensors)
    await client.update_weights(WeightTransferUpdateRequest(update_info=update))
    await client.finish_weight_update()
    del kept  # what the handles are of
    torch.cuda.ipc_collect()


def _update(tensors: Mapping[str, torch.Tensor]) -> tuple[dict[str, Any], list[torch.Tensor]]:
    """(fields of vLLM's `IPCWeightTransferUpdateInfo`, tensors that must live until it is done)."""
    from torch.multiprocessing.reductions import reduce_tensor

    device = str(torch.cuda.get_device_properties(torch.cuda.current_device()).uuid)
    kept = [tensor.detach().contiguous() for tensor in tensors.values()]
    torch.cuda.synchronize()
    handles = [{device: reduce_tensor(tensor)[1]} for tensor in kept]
    update = {
        "names": list(tensors),
        "dtype_names": [str(t.dtype).removeprefix("torch.") for t in kept],
        "shapes": [list(t.shape) for t in kept],
        "ipc_handles_pickled": base64.b64encode(pickle.dumps(handles)).decode(),
    }
    return update, kept
