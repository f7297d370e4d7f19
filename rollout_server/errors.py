"""The errors that `rollout_server` raises. Each message names the field, the value and the remedy.

All derive from `RolloutServerError`, so that one `except` catches them. Errors over HTTP have
the body of an OpenAI error instead and come from vLLM or from `rollout_server.http`.
"""


class RolloutServerError(RuntimeError):
    """Base of every error raised by this package."""


class ConfigError(RolloutServerError, ValueError):
    """An option has a value that can't be used, or an unknown name."""


class NotAvailableError(RolloutServerError, NotImplementedError):
    """The contract names it, this version doesn't have it yet."""


class EngineMissingError(RolloutServerError, ImportError):
    """vLLM isn't installed, or its version isn't supported."""


class UnsupportedModelError(RolloutServerError):
    """vLLM doesn't know the model's architecture, or its weights can't be read."""


class PortInUseError(RolloutServerError):
    """The requested host and port can't be bound."""


class AlreadyAttachedError(RolloutServerError):
    """The trainer or model already has a server."""


class TrainerError(RolloutServerError):
    """The trainer's own settings contradict an attached server."""


class OutOfMemoryError(RolloutServerError, MemoryError):
    """More memory was asked for than there is."""


class EngineStartError(RolloutServerError):
    """The engine didn't start. The message holds the cause and the end of the engine's log."""


class EngineDeadError(RolloutServerError):
    """The engine process has ended or failed, and wasn't restarted (see `max_restarts`)."""


class StateError(RolloutServerError):
    """The call doesn't fit the server's present state (closed, asleep, broken, ...)."""


class DeadlineError(RolloutServerError, TimeoutError):
    """The call ran past its deadline. The message tells the state of both sides."""


class EngineTimeoutError(DeadlineError):
    """The engine hasn't done what it was asked within its deadline. In a transition it is ended for
    it, since its condition would be unknown."""


class WeightSyncError(RolloutServerError):
    """Weights couldn't be moved, or what the engine holds differs from what was sent."""


class RankError(RolloutServerError):
    """Another rank failed, with the reason that it gives, or made another call meanwhile.

    kind: name of the other rank's error; empty if it made another call.
    """

    def __init__(self, text: str, kind: str = ""):
        super().__init__(text)
        self.kind = kind


class SamplingError(RolloutServerError, ValueError):
    """A sampling field is unknown, or has a value that vLLM rejects."""


class PromptTooLongError(RolloutServerError, ValueError):
    """A prompt is longer than the engine's context."""


def first_line(error: BaseException) -> str:
    """What a line of a message has room for."""
    return (str(error).splitlines() or [type(error).__name__])[0]
