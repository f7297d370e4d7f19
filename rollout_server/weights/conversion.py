"""What a checkpoint has of the policy's tensors, by transformers' own conversion.

Where transformers computes with other tensors than a checkpoint has (all experts in one, other
names), it converts them when it loads and converts them back when it saves. vLLM's loader wants a
checkpoint. The way back is walked once, on tensors without memory, and each tensor that comes out
is a view of one that went in: what vLLM's loader does with it is done with the live tensor then.
"""

import weakref
from collections.abc import Mapping
from typing import Any

import torch

from rollout_server.errors import UnsupportedModelError
from rollout_server.weights.storages import Watching, identity
from rollout_server.weights.wire import TensorSpec, View


def views_of(model: Any, specs: Mapping[str, TensorSpec]) -> dict[str, list[View]]:
    """What each of the policy's tensors is in a checkpoint, where that is something else.

    model: the bare module, of transformers or not. `UnsupportedModelError` names tensors that a
    checkpoint doesn't have as a part of one of the policy's.
    """
    try:
        from transformers.core_model_loading import revert_weight_conversion
        from transformers.modeling_utils import PreTrainedModel
    except ImportError:  # before 5.0 live tensors are a checkpoint's
        return {}
    if not isinstance(model, PreTrainedModel):
        return {}
    twins = {
        name: torch.empty(spec.shape, dtype=spec.dtype, device="meta")
        for name, spec in specs.items()
    }
    with _AsACheckpointOfItsKind(model), _ViewsStayViews():
        converted = revert_weight_conversion(model, dict(twins))
    owners = {identity(twin): name for name, twin in twins.items()}
    views: dict[str, list[View]] = {}
    computed = []
    for name, tensor in converted.items():
        if (own := owners.get(identity(tensor))) is None:
            computed.append(f"{name} {tuple(tensor.shape)}")
            continue
        view = View(name, tensor.storage_offset(), tuple(tensor.shape), tuple(tensor.stride()))
        views.setdefault(own, []).append(view)
    if computed:
        raise UnsupportedModelError(
            f"a checkpoint of {type(model).__name__}, as which vLLM loads it, has tensors that "
            f"aren't parts of the policy's but computed from them: {_some(computed)}; this version "
            "can't bring them to the engine"
        )
    return {own: found for own, found in views.items() if not _same(own, found, twins[own])}


def _same(own: str, views: list[View], twin: torch.Tensor) -> bool:
    return views == [View(own, 0, tuple(twin.shape), tuple(twin.stride()))]


def _some(names: list[str]) -> str:
    more = f" and {len(names) - 5} more" if len(names) > 5 else ""
    return ", ".join(names[:5]) + more


class _AsACheckpointOfItsKind:
    """A model that was loaded without a conversion, as from a file of live tensors, is converted
    back like one that was made in memory: vLLM knows the published layout only."""

    def __init__(self, model: Any):
        self._model: Any = weakref.proxy(model)
        self._kept: Any = None

    def __enter__(self) -> None:
        self._kept = self._model.__dict__.get("_weight_conversions")
        if self._kept == []:
            del self._model._weight_conversions

    def __exit__(self, *_: Any) -> None:
        if self._kept == []:
            self._model._weight_conversions = self._kept


class _ViewsStayViews(Watching):
    """`contiguous()` of a view is the view: only where its elements are is asked."""

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        aten, kwargs = torch.ops.aten, kwargs or {}
        if func is aten.clone.default:
            return args[0].view_as(args[0])
        if func is aten._unsafe_view.default:  # the end of a `reshape` that has to copy
            try:
                return aten.view.default(*args)
            except RuntimeError:
                return func(
                    torch.empty_like(args[0], memory_format=torch.contiguous_format), args[1]
                )
        if any(a.alias_info is not None and a.alias_info.is_write for a in func._schema.arguments):
            raise UnsupportedModelError(f"transformers' conversion writes with {func}")
        return func(*args, **kwargs)
