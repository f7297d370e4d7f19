"""The engine's end of a weight sync: a worker extension, loaded by vLLM into its worker.

It reaches the model through the worker that it becomes a part of, and vLLM only to fall back on its
layerwise reload.
"""

import functools
import os
import traceback
from collections.abc import Callable, Iterable

import torch

import rollout_server.worker.loader  # noqa: F401 - vLLM imports this module before it loads a model
from rollout_server.weights.storages import flat, identity, storages
from rollout_server.weights.transport import Importer, Opened, place
from rollout_server.weights.wire import Message
from rollout_server.worker.copier import Copier
from rollout_server.worker.lora import AdapterSlot
from rollout_server.worker.plan import Plan


def _failing_as_text(method: Callable[..., dict]) -> Callable[..., dict]:
    """Failures come back as {"error": traceback}: vLLM would end the engine on an exception."""

    @functools.wraps(method)
    def guarded(*args) -> dict:
        try:
            with torch.no_grad():
                return method(*args)
        except Exception:
            return {"error": traceback.format_exc()}

    return guarded


class WeightReceiver:
    """Methods that `collective_rpc` calls on every worker."""

    def rollout_describe(self) -> dict:
        """Process id, device, bytes of weights and KV cache, and how weights will come in.

        "obstacles": why there is no plan, empty where there is one; "repacked": those of them that
        are layers which vLLM has rearranged; "refused", "unshareable": see
        `PolicyLoader`; "splittable", "dtypes": see `Plan`. Weights that are the trainer's memory
        count 0 bytes.
        """
        model = self.get_model()
        plan = getattr(model, "rollout_plan", None)
        repacked = [] if plan is None else _repacked(model, plan)
        usable = plan is not None and plan.usable
        shared = getattr(model, "rollout_shared", False)
        return {
            "pid": os.getpid(),
            "device": str(next(model.parameters()).device),
            "weight_bytes": 0 if shared else _bytes(model.parameters()),
            "kv_cache_bytes": _bytes(flat(getattr(self.model_runner, "kv_caches", []))),
            "refused": getattr(model, "rollout_refusal", ""),
            "unshareable": getattr(model, "rollout_unshareable", ""),
            "repacked": repacked,
            "obstacles": plan.obstacles if plan else [],
            "splittable": sorted(plan.splittable()) if usable else [],
            "dtypes": plan.dtypes() if usable else {},
        }

    def rollout_ping(self) -> None:
        """Answered between two steps of the engine."""

    @_failing_as_text
    def rollout_write(self, message: Message) -> dict:
        """Copy one part of the trainer's tensors to where the plan has them.

        Returns {"bytes", "tensors"} of what was read.
        """
        opened = self._rollout_open(message)
        self._rollout_copier(opened).run()
        if opened.number == 0:
            self.get_model().rollout_plan.fill()
        _finish_device_work()
        return {"bytes": opened.bytes, "tensors": len(opened.pieces)}

    @_failing_as_text
    def rollout_compare(self, message: Message) -> dict:
        """{"mismatched": names} of the tensors in one part that differ from the model's; of those
        that it holds as they are."""
        model = self.get_model()
        plan, pieces = model.rollout_plan, self._rollout_open(message).pieces
        if not plan.usable:
            pieces = plan.comparable(pieces, model)
        return {"mismatched": plan.mismatched(pieces)}

    @_failing_as_text
    def rollout_write_adapter(
        self, message: Message, scaling: dict[str, float], fresh: bool
    ) -> dict:
        """Copy a LoRA adapter to where vLLM has its places; `fresh`: look for them anew."""
        opened = self._rollout_open(message)
        if fresh or self._rollout_adapter.scaling != scaling:
            self._rollout_adapter = AdapterSlot(self.get_model(), opened.pieces, scaling)
        self._rollout_adapter.write(opened.pieces)
        _finish_device_work()
        return {"bytes": opened.bytes, "tensors": len(opened.pieces)}

    @_failing_as_text
    def rollout_compare_adapter(self, message: Message) -> dict:
        """{"mismatched": names} of the adapter's tensors that differ from the engine's."""
        return {"mismatched": self._rollout_adapter.mismatched(self._rollout_open(message).pieces)}

    @_failing_as_text
    def rollout_forget(self, first: int) -> dict:
        """Let go of the trainer's memory behind the parts from number `first` on."""
        self._rollout_importer().forget(first)
        copiers = getattr(self, "_rollout_copiers", {})
        for number in [n for n in copiers if n >= first]:
            del copiers[number]
        return {}

    @_failing_as_text
    def rollout_reload(self, message: Message, first: bool, last: bool, layerwise: bool) -> dict:
        """Give one part to vLLM's loader, between the `first` and the `last` of a sync; with
        `layerwise`, layers are repacked as they get complete."""
        from rollout_server.worker import reload

        opened = self._rollout_open(message)
        reload.part(self, opened.pieces, first, last, layerwise)
        _finish_device_work()
        return {"bytes": opened.bytes, "tensors": len(opened.pieces)}

    def _rollout_open(self, message: Message) -> Opened:
        if isinstance(message, dict):
            own = place(next(self.get_model().parameters()).device, self.rank)
            if own not in message:
                raise RuntimeError(
                    f"the worker is on {own}, the trainer's ranks on {sorted(message)}; launch one "
                    "rank per device, each on its own"
                )
            message = message[own]
        return self._rollout_importer().open(message)

    def _rollout_importer(self) -> Importer:
        if not hasattr(self, "_rollout_imported"):
            self._rollout_imported = Importer()
        return self._rollout_imported

    def _rollout_copier(self, opened: Opened) -> Copier:
        """What copies this part; made anew when the trainer's memory has moved."""
        if not hasattr(self, "_rollout_copiers"):
            self._rollout_copiers = {}
        epoch, copier = self._rollout_copiers.get(opened.number, (None, None))
        if epoch != opened.epoch:
            copier = Copier(*self.get_model().rollout_plan.pairs(opened.pieces))
            self._rollout_copiers[opened.number] = opened.epoch, copier
        return copier


def _repacked(model: torch.nn.Module, plan: Plan) -> list[str]:
    """Obstacles that came after loading: vLLM has replaced or rearranged what was loaded. They are
    noted in the plan."""
    obstacles = [f"vLLM replaced {name} after loading it" for name in plan.stale(model)]
    for name, layer in model.named_modules():
        method = type(getattr(layer, "quant_method", None)).__name__
        plain = method.startswith("Unquantized") and ("MoE" not in method or _plain_experts(layer))
        if method != "NoneType" and not plain and any(True for _ in layer.parameters(False)):
            obstacles.append(f"vLLM may rearrange {name} after loading ({method})")
            plan.rearranged |= {identity(p) for p in layer.parameters(recurse=False)}
        elif "MLA" in type(layer).__name__ and hasattr(layer, "process_weights_after_loading"):
            obstacles.append(
                f"{name} ({type(layer).__name__}) computes weights from what is loaded"
            )
    plan.obstacles += obstacles
    return obstacles


def _plain_experts(layer: torch.nn.Module) -> bool:
    kernel = getattr(layer.quant_method, "moe_kernel", None)
    return getattr(getattr(kernel, "fused_experts", None), "rollout_plain", False)


def _finish_device_work() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def _bytes(tensors: Iterable[torch.Tensor]) -> int:
    return sum(storage.nbytes() for storage in storages(tensors).values())
