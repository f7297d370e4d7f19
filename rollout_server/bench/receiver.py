"""The engine's end of a sync, where vLLM's own "ipc" transfer is tried beside it.

vLLM 0.26 imports ray there, and asks it for nothing as long as no actor of ray's sends weights.
vLLM imports this module in the engine's process before it makes its transfer engine.
"""

import importlib
import importlib.util
import sys
from types import ModuleType

from rollout_server.worker.extension import WeightReceiver

_TRANSFER = "vllm.distributed.weight_transfer.ipc_engine"


def import_without_ray(name: str = _TRANSFER) -> None:
    """Import the module `name`; where ray isn't installed, with an empty one in its place."""
    if importlib.util.find_spec("ray") is not None:
        importlib.import_module(name)
        return
    sys.modules["ray"] = ModuleType("ray")
    try:
        importlib.import_module(name)
    finally:
        del sys.modules["ray"]  # what asks whether there is one must be told the truth


class Receiver(WeightReceiver):
    """Takes weights from the policy, as every engine's."""


import_without_ray()
