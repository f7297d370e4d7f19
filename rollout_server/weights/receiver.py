"""The engine's end of a weight sync: a worker extension, loaded by vLLM into its worker.

Imports nothing of vLLM: it reaches the model through the worker that it becomes a part of.
"""

import os
import traceback
from collections.abc import Iterable, Iterator

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from rollout_server.engine.storages import flat, storages
from rollout_server.weights.transport import Importer


class WeightReceiver:
    """Methods that `collective_rpc` calls on every worker. Failures come back as text."""

    def rollout_describe(self) -> dict:
        """Process id, device, and bytes of the weights and of the KV cache."""
        model = self.get_model()
        return {
            "pid": os.getpid(),
            "device": str(next(model.parameters()).device),
            "weight_bytes": _bytes(model.parameters()),
            "kv_cache_bytes": _bytes(flat(getattr(self.model_runner, "kv_caches", []))),
        }

    def rollout_load(self, message: bytes, verify: bool) -> dict:
        """Take the trainer's tensors as the model's weights.

        Returns {"bytes", "tensors"} of what was read, {"mismatched": names} if `verify` finds
        a parameter that differs from what was sent, or {"error": traceback}.
        """
        try:
            _require_plain_layers(self.get_model())
            tensors = self._rollout_importer().open(message)
            with torch.no_grad():
                loaded = self.get_model().load_weights(iter(tensors.items()))
            self._rollout_require_all(loaded)
            _finish_device_work()
            report = {
                "bytes": sum(t.numel() * t.element_size() for t in tensors.values()),
                "tensors": len(tensors),
            }
            if verify:
                report["mismatched"] = self._rollout_compare(tensors)
            return report
        except Exception:
            return {"error": traceback.format_exc()}

    def rollout_verify(self, message: bytes) -> dict:
        """Compare the model's weights with the trainer's tensors; writes nothing."""
        try:
            return {"mismatched": self._rollout_compare(self._rollout_importer().open(message))}
        except Exception:
            return {"error": traceback.format_exc()}

    def _rollout_importer(self) -> Importer:
        if not hasattr(self, "_rollout_imported"):
            self._rollout_imported = Importer()
        return self._rollout_imported

    def _rollout_require_all(self, loaded) -> None:
        """A parameter that nobody sent would keep the random values the engine started with."""
        if loaded is None:  # some models don't say
            return
        missing = [n for n, _ in self.get_model().named_parameters() if n not in loaded]
        if missing:
            raise ValueError(f"the trainer sent nothing for the engine's parameters {missing}")

    def _rollout_compare(self, tensors: dict[str, torch.Tensor]) -> list[str]:
        comparison = _Comparison(self.get_model())
        with torch.no_grad(), comparison:
            self.get_model().load_weights(comparison.named(tensors))
        return comparison.mismatched


class _Comparison(TorchDispatchMode):
    """Runs vLLM's own weight loader with each write into a parameter replaced by a comparison.

    The loader knows where a tensor lands (fused, sliced, tied, cast), so nothing here has to.
    """

    def __init__(self, model: torch.nn.Module):
        super().__init__()
        self._storages = storages(model.parameters())
        self._name = ""
        self.mismatched: list[str] = []

    def named(self, tensors: dict[str, torch.Tensor]) -> Iterator[tuple[str, torch.Tensor]]:
        for self._name, tensor in tensors.items():
            yield self._name, tensor

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.aten.copy_.default:
            to, source = args[:2]
            if to.untyped_storage().data_ptr() in self._storages:
                same = torch.equal(to, source.to(to.device, to.dtype).expand_as(to))
                if not same and self._name not in self.mismatched:
                    self.mismatched.append(self._name)
                return to
        return func(*args, **(kwargs or {}))


def _require_plain_layers(model: torch.nn.Module) -> None:
    """Layers that vLLM repacks after loading can't be written in place; comparing what was written
    wouldn't show it."""
    for name, layer in model.named_modules():
        method = type(getattr(layer, "quant_method", None)).__name__
        plain = method.startswith("Unquantized") and "MoE" not in method
        if method != "NoneType" and not plain and any(True for _ in layer.parameters(False)):
            raise NotImplementedError(
                f"{name} is a {type(layer).__name__} with {method}, whose weights vLLM repacks; "
                "this version serves dense models that aren't quantised"
            )


def _finish_device_work() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def _bytes(tensors: Iterable[torch.Tensor]) -> int:
    return sum(storage.nbytes() for storage in storages(tensors).values())
