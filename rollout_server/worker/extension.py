"""The engine's end of a weight sync: a worker extension, loaded by vLLM into its worker.

It reaches the model through the worker that it becomes a part of, and vLLM only to fall back on its
layerwise reload.
"""

import functools
import gc
import traceback
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any, Concatenate, ParamSpec

import torch

import rollout_server.worker.loader  # noqa: F401 - vLLM imports this module before it loads a model
from rollout_server.weights.storages import flat, identity, storages
from rollout_server.weights.transport import Importer, Opened, place
from rollout_server.weights.wire import (
    Compared,
    Failed,
    Forgotten,
    Message,
    Report,
    WorkerDescription,
    Written,
    pack,
)
from rollout_server.worker.copier import Copier
from rollout_server.worker.keeping import keep_over_sleep
from rollout_server.worker.lora import AdapterSlot
from rollout_server.worker.plan import Plan
from rollout_server.worker.refit import install as take_refits
from rollout_server.worker.sleeping import unmap_woken

if TYPE_CHECKING:

    class _Worker:
        """What the extension needs of the worker of vLLM's that it becomes a part of."""

        rank: int
        model_runner: Any
        vllm_config: Any

        def get_model(self) -> Any: ...

else:
    _Worker = object

_P = ParamSpec("_P")


def _packed(
    method: Callable[Concatenate["WeightReceiver", _P], Report],
) -> Callable[Concatenate["WeightReceiver", _P], bytes]:
    """Its report, packed. A failure is one too: vLLM would end the engine on an exception."""

    @functools.wraps(method)
    def guarded(self: "WeightReceiver", /, *args: _P.args, **options: _P.kwargs) -> bytes:
        report: Report
        try:
            with torch.no_grad():
                report = method(self, *args, **options)
        except Exception:
            report = Failed(traceback.format_exc())
        return pack(report)

    return guarded


class WeightReceiver(_Worker):
    """Methods that `collective_rpc` calls on every worker. What they return is packed, see wire."""

    _rollout_adapter: AdapterSlot
    _rollout_copiers: dict[int, tuple[int, Copier]]
    _rollout_imported: Importer

    def rollout_finish_loading(self) -> None:
        """Note in the plan what vLLM has done to the weights since they were loaded, and prepare
        for sleep. Once, when the engine is up, and before it is described."""
        model = self.get_model()
        if (plan := _plan_of(model)) is not None:
            _note_repacked(model, plan)
        if next(model.parameters()).device.type != "cpu":  # vLLM's own sleep
            keep_over_sleep(self)

    def rollout_describe(self) -> bytes:
        """A `WorkerDescription`."""
        model = self.get_model()
        plan = _plan_of(model)
        shared = getattr(model, "rollout_shared", False)
        description = WorkerDescription(
            device=str(next(model.parameters()).device),
            weight_bytes=0 if shared else _bytes(model.parameters()),
            kv_cache_bytes=_bytes(flat(getattr(self.model_runner, "kv_caches", []))),
            refused=getattr(model, "rollout_refusal", ""),
            unshareable=getattr(model, "rollout_unshareable", ""),
            unsupported_reasons=[] if plan is None else plan.unsupported_reasons,
            repacked=[] if plan is None else plan.repacked,
            splittable=sorted(plan.splittable()) if plan is not None and plan.usable else [],
            dtypes=plan.dtypes() if plan is not None and plan.usable else {},
            refits=self._rollout_beside_core() and take_refits(),
        )
        return pack(description)

    def rollout_free(self, tag: str) -> None:
        """After a wake of `tag` that ran out of memory: give back what it has mapped so far, since
        vLLM before 0.28 maps that again, and what torch keeps unused."""
        if torch.cuda.is_available():
            unmap_woken(tag)
            gc.collect()
            torch.cuda.empty_cache()

    def rollout_ping(self) -> None:
        """Answered between two steps of the engine."""

    @_packed
    def rollout_write(self, message: Message) -> Written:
        """Copy one part of the trainer's tensors to where the plan has them."""
        opened = self._rollout_open(message)
        self._rollout_copier(opened).run()
        if opened.number == 0:
            self.get_model().rollout_plan.fill()
        _finish_device_work()
        return _written(opened)

    @_packed
    def rollout_compare(self, message: Message) -> Compared:
        """What of one part differs from the model's; of what that holds as it is."""
        model = self.get_model()
        plan, pieces = model.rollout_plan, self._rollout_open(message).pieces
        if not plan.usable:
            pieces = plan.comparable(pieces, model)
        mismatched = plan.mismatched(pieces)
        _give_back()
        return Compared(mismatched)

    @_packed
    def rollout_write_adapter(
        self, message: Message, scaling: dict[str, float], fresh: bool
    ) -> Written:
        """Copy a LoRA adapter to where vLLM has its places; `fresh`: look for them anew."""
        opened = self._rollout_open(message)
        if fresh or self._rollout_adapter.scaling != scaling:
            self._rollout_adapter = AdapterSlot(self.get_model(), opened.pieces, scaling)
        self._rollout_adapter.write(opened.pieces)
        _finish_device_work()
        return _written(opened)

    @_packed
    def rollout_compare_adapter(self, message: Message) -> Compared:
        """What of the adapter differs from the engine's."""
        return Compared(self._rollout_adapter.mismatched(self._rollout_open(message).pieces))

    @_packed
    def rollout_forget(self, first: int) -> Forgotten:
        """Let go of the trainer's memory behind the parts from number `first` on."""
        self._rollout_importer().forget(first)
        copiers = getattr(self, "_rollout_copiers", {})
        for number in [n for n in copiers if n >= first]:
            del copiers[number]
        return Forgotten()

    @_packed
    def rollout_reload(self, message: Message, first: bool, last: bool, layerwise: bool) -> Written:
        """Give one part to vLLM's loader, between the `first` and the `last` of a sync; with
        `layerwise`, layers are repacked as they get complete."""
        from rollout_server.worker import reload

        opened = self._rollout_open(message)
        reload.part(self, opened.pieces, first, last, layerwise)
        _finish_device_work()
        if last:
            _give_back()
        return _written(opened)

    def _rollout_beside_core(self) -> bool:
        """Whether this worker is in the engine core's process, and the only one."""
        parallel = self.vllm_config.parallel_config
        backend: str = parallel.distributed_executor_backend
        return backend == "uni" and parallel.world_size == 1

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
        known = self._rollout_copiers.get(opened.number)
        if known is None or known[0] != opened.epoch:
            copier = Copier(*self.get_model().rollout_plan.pairs(opened.pieces))
            known = self._rollout_copiers[opened.number] = opened.epoch, copier
        return known[1]


def _plan_of(model: Any) -> Plan | None:
    """None where the model and the trainer's tensors don't fit."""
    plan: Plan | None = getattr(model, "rollout_plan", None)
    return plan


def _note_repacked(model: torch.nn.Module, plan: Plan) -> None:
    """Obstacles that came after loading: vLLM has replaced or rearranged what was loaded."""
    repacked = [f"vLLM replaced {name} after loading it" for name in plan.stale(model)]
    for name, layer in model.named_modules():
        method = type(getattr(layer, "quant_method", None)).__name__
        plain = method.startswith("Unquantized") and ("MoE" not in method or _plain_experts(layer))
        if method != "NoneType" and not plain and any(True for _ in layer.parameters(False)):
            repacked.append(f"vLLM may rearrange {name} after loading ({method})")
            plan.rearranged |= {identity(p) for p in layer.parameters(recurse=False)}
        elif "MLA" in type(layer).__name__ and hasattr(layer, "process_weights_after_loading"):
            repacked.append(f"{name} ({type(layer).__name__}) computes weights from what is loaded")
    plan.repacked = repacked
    plan.unsupported_reasons += repacked


def _written(opened: Opened) -> Written:
    return Written(opened.bytes, len(opened.pieces))


def _plain_experts(layer: torch.nn.Module) -> bool:
    kernel = getattr(layer.quant_method, "moe_kernel", None)
    return getattr(getattr(kernel, "fused_experts", None), "rollout_plain", False)


def _finish_device_work() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def _give_back() -> None:
    """Temporary tensors' memory, which the KV cache may need next."""
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _bytes(tensors: Iterable[torch.Tensor]) -> int:
    return sum(storage.nbytes() for storage in storages(tensors).values())
