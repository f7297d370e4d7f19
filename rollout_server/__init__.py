"""A vLLM engine inside the training process, with the policy's newest weights and an OpenAI API.

from rollout_server import attach

server = attach(trainer)            # or attach(model, tokenizer)
"""

from rollout_server.attach import attach
from rollout_server.completion import Completion
from rollout_server.config import RolloutConfig
from rollout_server.errors import RolloutServerError
from rollout_server.server import RolloutServer
from rollout_server.state import State
from rollout_server.sync import SyncReport

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
