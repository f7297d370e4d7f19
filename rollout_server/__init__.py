"""A vLLM engine inside the training process, with the policy's newest weights and an OpenAI API.

from rollout_server import attach

server = attach(trainer)            # or attach(model, tokenizer)
"""

from typing import TYPE_CHECKING

try:
    from rollout_server.attach import attach
    from rollout_server.completion import Completion
    from rollout_server.config import RolloutConfig
    from rollout_server.errors import RolloutServerError
    from rollout_server.lifecycle.state import State
    from rollout_server.server import RolloutServer
    from rollout_server.weights.report import SyncReport
except Exception as _error:  # a broken installation; rollout_server.doctor must still run in it
    _broken = _error

    if not TYPE_CHECKING:  # to which every name would be one of the module's

        def __getattr__(name):
            if name in __all__:
                raise ImportError(
                    f"rollout_server can't be imported: {type(_broken).__name__}: {_broken}; "
                    "`python -m rollout_server.doctor` says what to do"
                ) from _broken
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


__version__ = "0.1.0"
__all__ = [
    "Completion",
    "RolloutConfig",
    "RolloutServer",
    "RolloutServerError",
    "State",
    "SyncReport",
    "attach",
]
