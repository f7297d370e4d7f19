"""Names, shapes and places of the trainer's tensors, as the engine's process reads them.

Files in the engine's folder, written by the trainer before the process is there.
"""

import json
import os
from collections.abc import Mapping
from typing import Any

import torch

from rollout_server.weights.wire import TensorSpec, View, Views

_SPECS = "tensors.json"
_VIEWS = "views.json"


def write_specs(folder: str, specs: Mapping[str, TensorSpec]) -> None:
    """Write what `read_specs` reads: the trainer's tensors, without their values."""
    rows = [
        [name, list(s.shape), str(s.dtype).removeprefix("torch."), s.is_buffer]
        for name, s in specs.items()
    ]
    _write(folder, _SPECS, rows)


def read_specs(folder: str) -> dict[str, TensorSpec]:
    """Name to shape and dtype of each of the trainer's tensors, in the trainer's order."""
    with open(os.path.join(folder, _SPECS), encoding="utf-8") as f:
        return {
            name: TensorSpec(tuple(shape), getattr(torch, dtype), is_buffer)
            for name, shape, dtype, is_buffer in json.load(f)
        }


def write_views(folder: str, views: Views) -> None:
    """Write what `read_views` reads: what of a checkpoint the trainer's tensors are."""
    _write(folder, _VIEWS, views)


def read_views(folder: str) -> dict[str, list[View]]:
    """Name of a tensor of the trainer to what it is in a checkpoint."""
    with open(os.path.join(folder, _VIEWS), encoding="utf-8") as f:
        return {
            own: [View(n, offset, tuple(shape), tuple(stride)) for n, offset, shape, stride in rows]
            for own, rows in json.load(f).items()
        }


def _write(folder: str, name: str, rows: Any) -> None:
    with open(os.path.join(folder, name), "w", encoding="utf-8") as f:
        json.dump(rows, f)
