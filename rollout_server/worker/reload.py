"""A sync through vLLM's loader, for layers that it repacks after loading. Runs in the engine's
process.

Parameters are marked before, and none may bear the mark afterwards: where vLLM's reload skips a
layer, it would go on with what was there. Tensors are kept by vLLM until their layer is complete,
so what may be overwritten meanwhile is copied, and pieces are put together first.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from vllm.config import set_current_vllm_config
from vllm.model_executor.model_loader.reload import (
    finalize_layerwise_reload,
    initialize_layerwise_reload,
)

from rollout_server.weights.wire import Piece, TensorSpec
from rollout_server.worker.marks import mark, marked
from rollout_server.worker.plan import checkpoint_tensors


def part(worker: Any, pieces: Sequence[Piece], first: bool, last: bool, layerwise: bool) -> None:
    """Load `pieces`, which are all there is if they are both the `first` and the `last`.

    layerwise: layers are repacked as they get complete; else vLLM's loader alone is run. Raises
    `RuntimeError` that names what wasn't written, with the `last`.
    """
    model = worker.get_model()
    plan = model.rollout_plan
    # Layers that are processed anew look up how they were built.
    device = torch.device(next(model.parameters()).device)
    with set_current_vllm_config(worker.vllm_config), device:
        if first:
            worker.rollout_assembly = {}
            mark(model)
            if layerwise:
                initialize_layerwise_reload(model)
        specs = {} if first and last else plan.specs
        whole = _whole(pieces, specs, worker.rollout_assembly)
        model.load_weights(checkpoint_tensors(plan.views, whole))
        if last:
            left = worker.rollout_assembly
            del worker.rollout_assembly
            if layerwise:
                finalize_layerwise_reload(model, worker.model_runner.model_config)
            if left:
                raise RuntimeError(f"only pieces came of {sorted(left)}")
            if lines := marked(model):
                raise RuntimeError("vLLM's loader left out " + "; ".join(lines))


def _whole(
    pieces: Sequence[Piece], specs: dict[str, TensorSpec], assembly: dict[str, list[Any]]
) -> Iterator[tuple[str, torch.Tensor]]:
    for name, row, tensor in pieces:
        shape = specs[name].shape if name in specs else tensor.shape
        if tuple(tensor.shape) == tuple(shape):
            yield name, tensor.clone() if specs else tensor
            continue
        whole, rows = assembly.setdefault(name, [tensor.new_empty(shape), 0])
        whole[row : row + tensor.shape[0]] = tensor
        assembly[name][1] = rows + tensor.shape[0]
        if assembly[name][1] == shape[0]:
            del assembly[name]
            yield name, whole
