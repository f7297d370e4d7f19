"""What the rest of the package asks of an engine, whichever kind it is.

There are two: `Engine`, a rank's own, and `GroupEngine`, one for several ranks. The type checker
holds both to this protocol, and tests/test_engines.py compares their signatures with it.
"""

from collections.abc import Callable, Coroutine, Mapping, Sequence
from typing import Any, Protocol

from rollout_server.weights.wire import Compared, EngineDescription, WorkerDescription, Written


class EngineProtocol(Protocol):
    """A running vLLM engine. Coroutines run on the server's loop.

    Every call to the engine raises `EngineDeadError` if it has ended, and waits for it otherwise:
    the deadlines are the callers'. In a group of ranks all make the same calls in the same order.
    """

    @property
    def client(self) -> Any:
        """vLLM's `AsyncLLM`; on the rank that serves, `StateError` on others."""

    @property
    def description(self) -> EngineDescription:
        """What its workers say of themselves."""

    @property
    def worker(self) -> WorkerDescription:
        """The worker on this rank's device."""

    @property
    def pid(self) -> int:
        """Process id of the engine core."""

    @property
    def max_model_len(self) -> int:
        """Context length in tokens, prompt and completion."""

    @property
    def dead(self) -> bool:
        """Whether it has ended; false on a rank that doesn't serve, which is told at its next
        call."""

    @property
    def condition(self) -> str:
        """What its process does, for errors: "running", "stopped", "ended", ..."""

    @property
    def running(self) -> int:
        """How many generations there are, frozen ones included; 0 on a rank that doesn't serve."""

    @property
    def resident_bytes(self) -> int:
        """Resident host memory of its processes; 0 on a rank that doesn't serve."""

    def take_kv_cache_peak(self) -> float:
        """The highest share (0 to 1) of the KV cache in use since this was last called; 0 on a rank
        that doesn't serve."""

    def log_tail(self, lines: int = 40) -> str:
        """The end of its log; empty on a rank that doesn't serve."""

    def require_alive(self) -> None:
        """`EngineDeadError` with the end of the log if it is `dead`."""

    # -- generation ---------------------------------------------------------------------------

    async def generate(
        self,
        prompt: list[int],
        fields: Mapping[str, Any],
        request_id: str,
        images: Sequence[Any] = (),
    ) -> list[Any]:
        """Generate from the token ids `prompt`, in which `images` stand with all their tokens;
        vLLM's `CompletionOutput`s, one per sample. Each rank's own call."""

    async def drain(self) -> None:
        """Return when no request runs. Nothing new must be let in meanwhile."""

    async def pause(self) -> None:
        """Freeze running requests and forget all caches; what was computed for them as well."""

    async def resume(self) -> None:
        """Let requests run again after `pause`."""

    # -- memory -------------------------------------------------------------------------------

    async def sleep(self) -> None:
        """Release weights and KV cache (vLLM's level 2), freezing what runs."""

    async def wake_weights(self) -> None:
        """Bring the weights' memory back; it holds nothing yet."""

    async def wake_kv_cache(self) -> None:
        """Bring the KV cache back; scheduling resumes with it."""

    # -- weights ------------------------------------------------------------------------------

    async def write_weights(self, message: bytes) -> Written:
        """Copy a part of the trainer's tensors by the plan; `WeightSyncError` if a worker can't.

        message: of `transport.Exporter`, as in the calls below.
        """

    async def refit(self, message: bytes | None, version: int) -> Written:
        """`pause`, `write_weights`, `set_weight_version` and `resume` in one message, where the
        description says so; message: None if there is nothing to write. If it fails in the
        engine, that stays paused, at its old version."""

    async def reload_weights(
        self, message: bytes, first: bool, last: bool, layerwise: bool
    ) -> Written:
        """Give a part of the trainer's tensors to vLLM's loader, between the `first` and the `last`
        of a sync; layerwise: layers are repacked as they get complete."""

    async def compare_weights(self, message: bytes) -> Compared:
        """What of a part differs from what the engine holds."""

    async def write_adapter(
        self, message: bytes, scaling: Mapping[str, float], fresh: bool
    ) -> Written:
        """Copy a LoRA adapter into vLLM's buffers; fresh: which have nothing of it."""

    async def compare_adapter(self, message: bytes) -> Compared:
        """What of the adapter differs from what the engine holds."""

    async def forget_weights(self, first: int) -> None:
        """Let go of the trainer's memory behind the parts from number `first` on."""

    async def set_weight_version(self, version: int) -> None:
        """Tell the engine the policy version, by which it counts tokens."""

    # -- ranks --------------------------------------------------------------------------------

    async def any_rank(self, flag: bool) -> bool:
        """Whether `flag` holds for any rank that has this engine."""

    async def run_on_leader(self, what: str, work: Callable[[], Coroutine[Any, Any, None]]) -> None:
        """Have the rank that serves do `work`, for which the others of its group wait."""

    # -- the end, and another beginning ----------------------------------------------------------

    async def ping(self) -> None:
        """Return when the engine answers."""

    def let_requests_wait(self, restarts: int) -> None:
        """Requests outlive the engine that runs them from now on: when it dies, `restart` or
        `give_up` follows. A request that may be the cause is given half of the `restarts`."""

    def kill(self) -> None:
        """End whatever is left of the engine's processes, at once."""

    async def restart(self) -> None:
        """Start another engine in the place of the one that died, `kill`ed first. It has no weights
        yet, and no requests until `readmit`. Raises `EngineStartError`; `NotAvailableError` for an
        engine that ranks share."""

    async def readmit(self) -> None:
        """Let requests run on the engine that was restarted."""

    def give_up(self, why: str) -> None:
        """There won't be another engine: requests that wait for one fail."""

    def close(self, timeout: float) -> None:
        """End the engine's processes, with SIGKILL past `timeout` seconds."""
