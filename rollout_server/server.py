"""`RolloutServer`: the handle that the trainer holds."""

from collections.abc import Mapping, Sequence
from typing import Any

from rollout_server.assembly import Assembly
from rollout_server.completion import Completion, Prompt
from rollout_server.concurrency.interrupts import GRACE, held
from rollout_server.display import as_table, as_text, mebibytes
from rollout_server.lifecycle.state import State
from rollout_server.observability.report import Report, server_report
from rollout_server.trajectories.session import Session
from rollout_server.weights.report import SyncReport


class RolloutServer(Assembly):
    """A vLLM engine and its OpenAI endpoint, inside the training process. Made by `attach`.

    Methods may be called from any thread; each has a deadline (see `RolloutConfig`) and raises
    subclasses of `RolloutServerError`.
    """

    # -- what it is ---------------------------------------------------------------------------

    @property
    def base_url(self) -> str:
        """What OpenAI clients take as `base_url`: this rank's engine, or its group's."""
        return self._base_url

    @property
    def base_urls(self) -> list[str]:
        """One URL per engine, in the order of the ranks; all take the same key."""
        return list(self._base_urls)

    @property
    def api_key(self) -> str:
        """The secret that clients send as `Authorization: Bearer`."""
        return self._api_key

    @property
    def state(self) -> State:
        """Where the server is; compares equal to its name, "awake" for one."""
        return self._box.state

    @property
    def policy_version(self) -> int:
        """0 for the weights at attach, one more for each sync."""
        return self._lifecycle.version

    @property
    def max_model_len(self) -> int:
        """The engine's context length in tokens, prompt and completion."""
        return self._engine.max_model_len

    @property
    def engine_pid(self) -> int:
        """Process id of the engine."""
        return self._engine.pid

    def memory(self) -> dict[str, int]:
        """What the engine holds, in bytes, by name.

        `weights` and `kv_cache` are as the engine allocated them (0 while they are given back, and
        for weights that are the trainer's), `resident` is host memory of the engine's processes,
        and `optimizer`, with `offload_optimizer`, is the state that is parked in host memory. In
        a group of ranks, the engine's on this rank's device; `resident` is the first one's.
        """
        given_back = self.state in (State.ASLEEP, State.DOWN)
        worker = self._engine.worker
        return self._colocation.parked | {
            "weights": 0 if given_back else worker.weight_bytes,
            "kv_cache": 0 if given_back else worker.kv_cache_bytes,
            "resident": self._engine.resident_bytes,
        }

    def take_kv_cache_peak(self) -> float:
        """The highest share (0 to 1) of the KV cache in use since this was last called.

        In a group of ranks the first one's to tell, 0 on the others.
        """
        return self._engine.take_kv_cache_peak()

    # -- weights, sleep, wake -----------------------------------------------------------------

    def sync_weights(self) -> SyncReport:
        """Give the engine the policy's weights as they are now, and raise `policy_version`.

        Requests wait meanwhile; running generations are continued with the new weights. A server
        that sleeps wakes up. With several ranks all of them call this.

        Returns:
            What went, how, and how fast.

        Raises:
            WeightSyncError: the policy's tensors aren't those that the engine knows, hold NaN or
                infinity, or differ from what the engine holds afterwards.
            StateError: the server is closed or broken.
            RankError: another rank failed.
        """
        with held(GRACE), self._box.open_throughout():
            if self.state not in (State.ASLEEP, State.DOWN):
                return self._sync.push()
            self._colocation.make_room()
            try:
                return self._sync.push()
            finally:
                if self.state is State.ASLEEP:  # it didn't wake
                    self._colocation.take_back()

    def verify_weights(self) -> None:
        """Compare the engine's weights with the policy's; `WeightSyncError` names differences."""
        with self._box.open_throughout():
            self._sync.verify()

    def sleep(self) -> None:
        """Give the engine's weights and KV cache back; requests wait until `wake`.

        Nothing happens if it sleeps already, or with colocate="resident". With tensor parallel the
        ranks of a group have one engine: it sleeps when all of them have called this.
        """
        with held(GRACE):
            with self._group.together("sleep()", self._config.generate_timeout):
                self._box.require_open()
            if self._config.colocate == "resident":
                return
            with self._box.open_throughout():
                self._loop.call(self._lifecycle.sleep(), self._config.transition_time, "sleep()")
            self._colocation.take_back()

    def wake(self) -> SyncReport | None:
        """Wake the engine with the policy's weights as they are now; None if it is awake."""
        self._box.require_open()
        return self.sync_weights() if self.state is not State.AWAKE else None

    # -- generation ---------------------------------------------------------------------------

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling: Mapping[str, Any] | None = None,
        timeout: float | None = None,
        *,
        images: Sequence[Sequence[Any] | None] | None = None,
    ) -> list[Completion]:
        """Sample completions, without HTTP.

        Args:
            prompts: one prompt or several; each a string, token ids, or messages, which may hold
                PIL images: parts `{"type": "image", "image": image}`.
            sampling: fields of vLLM's `SamplingParams` over the server's defaults.
            timeout: seconds, instead of `generate_timeout`.
            images: of prompts that are token ids: for each prompt a list of the PIL images that
                stand in it, each with all its tokens, as the processor makes them; or None.

        Returns:
            `n` completions for each prompt (n is 1 unless `sampling` says otherwise), those of the
            first prompt first.

        Raises:
            SamplingError: a sampling field is unknown, or has a value that vLLM rejects.
            PromptTooLongError: a prompt is longer than the engine's context.
            StateError: the server sleeps, is closed or broken.
            DeadlineError: it took longer than `timeout`.
        """
        self._box.require_open()
        fields = self._sampling | {"logprobs": 0} | dict(sampling or {})
        timeout = timeout or self._config.generate_timeout
        with self._box.open_throughout():
            return self._generation.completions(
                prompts, self._policy.tokenizer, fields, timeout, images
            )

    def openai(self, **options: Any) -> Any:
        """A ready `openai.OpenAI` client; options are its own."""
        self._box.require_open()
        return self._clients.openai(**options)

    def async_openai(self, **options: Any) -> Any:
        """A ready `openai.AsyncOpenAI` client; options are its own."""
        self._box.require_open()
        return self._clients.async_openai(**options)

    def session(
        self, *, on_sync: str = "continue", unmasked_logprobs: bool = False, **metadata: Any
    ) -> Session:
        """A rollout session with a URL, a key and a trajectory of its own.

        Args:
            on_sync: what a sync or a sleep does to a running request that doesn't say: "continue",
                "restart" or "finish".
            unmasked_logprobs: whether to record the model's own log-probabilities too; see
                `Session`.
            **metadata: kept on the session, such as the example that the agent works on.

        Returns:
            The session, which ends with its `end`, or on the way out of a `with`.
        """
        self._box.require_open()
        return self._clients.session(on_sync, unmasked_logprobs, metadata)

    # -- what it does -------------------------------------------------------------------------

    def metrics(self) -> dict[str, float]:
        """The server's own metrics, by the names that `/metrics` gives them; in any state."""
        return self._journal.metrics.values()

    def report(self) -> Report:
        """What to send with a bug report: `print(server.report())`.

        It holds no secrets, can be made in any state, and never raises.
        """
        config = vars(self._config) | {"sampling": self._sampling}
        return server_report(
            self, self._box.why, self._ranks, config, self._policy, self._engine_log, self._journal
        )

    def note_logprob_difference(self, nats: float, *, grammar: bool = False) -> None:
        """Put into the metrics how far the trainer's log-probabilities are from the engine's.

        Args:
            nats: mean absolute difference per token.
            grammar: of tokens sampled under one, whose log-probabilities are of another
                distribution than the trainer's.
        """
        self._journal.logprob_difference(nats, grammar)

    def __enter__(self) -> "RolloutServer":
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()

    # -- how it shows itself --------------------------------------------------------------------

    def __repr__(self) -> str:
        return as_text("RolloutServer", self._shown())

    def _repr_html_(self) -> str:
        return as_table("RolloutServer", self._shown())

    def _shown(self) -> dict[str, Any]:
        shown: dict[str, Any] = {"state": self.state, "url": self.base_url}
        if self._started is not None and self.state is not State.CLOSED:
            shown |= {"policy_version": self.policy_version} | mebibytes(self.memory())
        return shown
