"""What vLLM's sleep level 2 loses and no sync brings back. Runs in the engine's process.

It gives back all that was allocated while the model was loaded, and saves buffers alone. Tensors
that are plain attributes (slopes of ALiBi, scales of a quantised KV cache, token ids that the
sampler looks for) come back as whatever the memory holds. So they are copied to host memory before,
and back afterwards. What was allocated with the KV cache (0.26: what attention is planned with) can
be written again when that is awake.
"""

from collections.abc import Iterable, Iterator
from typing import Any

import torch

from rollout_server.weights.storages import flat, identity

# Of a model runner: what is made while the model is loaded, and with the KV cache.
_WITH_MODEL = (
    "sampler",
    "rejection_sampler",
    "prompt_logprobs_worker",
    "structured_outputs_worker",
)
_WITH_CACHE = ("attn_groups",)
# Names of the KV cache itself, which is forgotten before each sleep.
_CACHES = ("kv_cache", "kv_caches")


def keep_over_sleep(worker: Any) -> None:
    """Have a worker of vLLM's save such tensors before each sleep of level 2, and write them back
    as it wakes, before it runs anything."""
    kept = KeptTensors(worker.model_runner, worker.get_model())
    sleep, wake_up = worker.sleep, worker.wake_up

    def saving(level: int = 1) -> None:
        if level == 2:
            kept.save()
        sleep(level)

    def restoring(tags: list[str] | None = None) -> None:
        wake_up(tags)
        kept.restore(("weights", "kv_cache") if tags is None else tags)

    # vLLM looks them up at each call.
    worker.sleep, worker.wake_up = saving, restoring


class KeptTensors:
    """The tensors of one worker that it would lose; what there are is looked up at each `save`."""

    def __init__(self, model_runner: Any, model: torch.nn.Module):
        self._runner = model_runner
        self._model = model
        self._saved: dict[str, list[tuple[torch.UntypedStorage, torch.Tensor]]] = {}

    def save(self) -> None:
        """Copy them to host memory, by the tag of what they wake up with."""
        modules, runner = list(self._model.modules()), self._runner
        with_model = [*map(vars, modules), *(getattr(runner, name, None) for name in _WITH_MODEL)]
        with_cache = [getattr(runner, name, None) for name in _WITH_CACHE]
        first = self._storages(with_model, modules)
        then = self._storages(with_cache, modules)
        self._saved = {
            "weights": _copies(first.values()),
            "kv_cache": _copies(storage for key, storage in then.items() if key not in first),
        }

    def restore(self, tags: Iterable[str]) -> None:
        """Write back those of `tags`, whose memory is there again."""
        for tag in tags:
            for storage, host in self._saved.pop(tag, ()):
                _bytes(storage).copy_(host)

    def _storages(
        self, holders: Iterable[Any], modules: Iterable[torch.nn.Module]
    ) -> dict[int, torch.UntypedStorage]:
        device = next(self._model.parameters()).device.type
        caches = flat(getattr(self._runner, "kv_caches", []))
        left = {identity(t) for t in [*self._model.parameters(), *self._model.buffers(), *caches]}
        found = {}
        for tensor in _tensors(holders, modules):
            if tensor.device.type == device and identity(tensor) not in left and tensor.numel():
                found[identity(tensor)] = tensor.untyped_storage()
        return found


def _copies(
    storages: Iterable[torch.UntypedStorage],
) -> list[tuple[torch.UntypedStorage, torch.Tensor]]:
    return [(storage, _bytes(storage).to("cpu", copy=True)) for storage in storages]


def _tensors(holders: Iterable[Any], but: Iterable[Any]) -> Iterator[torch.Tensor]:
    """Those in containers, modules and vLLM's plain objects, however deep."""
    seen, left = {id(one) for one in but}, list(holders)
    while left:
        value = left.pop()
        if id(value) in seen:
            continue
        seen.add(id(value))
        if isinstance(value, torch.Tensor):
            yield value
        elif isinstance(value, dict):
            left += [inner for name, inner in value.items() if name not in _CACHES]
        elif isinstance(value, (list, tuple, set)):
            left += value
        elif isinstance(value, torch.nn.Module) or _of_vllm(value):
            left.append(getattr(value, "__dict__", {}))


def _of_vllm(value: Any) -> bool:
    return type(value).__module__.split(".")[0] == "vllm"


def _bytes(storage: torch.UntypedStorage) -> torch.Tensor:
    return torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage)
