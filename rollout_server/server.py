"""`RolloutServer`: the handle that the trainer holds."""

import atexit
import contextlib
import functools
import secrets
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from rollout_server import vllm_compat as compat
from rollout_server.clients import Clients
from rollout_server.colocation import Colocation
from rollout_server.completion import Completion, Prompt
from rollout_server.concurrency.garbage import leave_out, take_in
from rollout_server.concurrency.interrupts import GRACE, held, interrupts
from rollout_server.concurrency.loop import LoopThread
from rollout_server.config import RolloutConfig
from rollout_server.display import as_table, as_text, mebibytes
from rollout_server.engine.arguments import device_name, tool_parser
from rollout_server.engine.processes import kill_trees
from rollout_server.engine.protocol import EngineProtocol
from rollout_server.engine.sampling import sampling_params
from rollout_server.engine.spawn import quiet_front_end
from rollout_server.engine.start import start_engine
from rollout_server.engine.temporary import TemporaryFolder
from rollout_server.errors import StateError
from rollout_server.generation import Generation
from rollout_server.http.endpoint import Endpoint
from rollout_server.lifecycle.lifecycle import Lifecycle
from rollout_server.lifecycle.state import State, StateBox
from rollout_server.lifecycle.steps import Steps
from rollout_server.lifecycle.watchdog import watch
from rollout_server.observability.events import Journal
from rollout_server.observability.redact import remember
from rollout_server.observability.report import Report, server_report
from rollout_server.progress import Progress
from rollout_server.ranks import Ranks
from rollout_server.sync.weight_sync import WeightSync
from rollout_server.trajectories.session import Session
from rollout_server.weights.policy import Policy
from rollout_server.weights.report import SyncReport
from rollout_server.weights.sources.base import Source


class RolloutServer:
    """A vLLM engine and its OpenAI endpoint, inside the training process. Made by `attach`.

    Methods may be called from any thread; each has a deadline (see `RolloutConfig`) and raises
    subclasses of `RolloutServerError`.
    """

    def __init__(self, policy: Policy, config: RolloutConfig):
        self._policy = policy
        self._config = config
        self._box = StateBox()
        self._journal = Journal()
        self._ranks = Ranks.join()
        key = config.api_key or secrets.token_urlsafe(32)
        self._api_key = self._ranks.gather("attach()", key, config.start_timeout)[0]
        remember(self._api_key)
        self._sampling = dict(policy.sampling if config.sampling is None else config.sampling)
        names = (config.served_model_name, policy.base_name)
        self._names = list(dict.fromkeys(name for name in names if name))
        self._pids: list[int] = []
        self._started: EngineProtocol | None = None
        self._base_url = ""
        self._endpoint = Endpoint(config, self._api_key, self._journal)
        self._log_tail = ""  # of an engine that has been closed
        self._on_close: list[Callable[[], None]] = []
        with held(), self._ranks.together("attach()", config.start_timeout):
            self._group = self._ranks.group(config.tensor_parallel)
            with self._group.together("attach()", config.start_timeout):
                self._start(Progress(config.progress and self._ranks.rank == 0))

    def _start(self, progress: Progress) -> None:
        policy, config, limit = self._policy, self._config, self._config.start_timeout
        source = policy.source(config.peft)  # first, since it is where a policy is refused
        self._colocation = Colocation(policy, config, source)
        with progress.step("importing vLLM"), quiet_front_end():
            version = compat.require_vllm()
            sampling_params(self._sampling)
        self._temporary = TemporaryFolder()
        self._folder = self._temporary.path
        self._loop = LoopThread()
        atexit.register(self.close)
        try:
            url = "" if self._group.rank > 0 else self._endpoint.open(
                self._ranks.local_rank // self._group.size, self._ranks.several_machines
            )  # fmt: skip
            here = (url, device_name(policy.gpu))
            told = self._group.gather("attach(): group", here, limit, tuple[str, str | None])
            self._base_url, devices = told[0][0], [device for _, device in told]
            self._clients = Clients(
                self._base_url, self._api_key, config.hold_timeout + config.generate_timeout,
                self._endpoint, self._journal,
            )  # fmt: skip
            beside = self._colocation.beside_start(self._folder, source)
            with progress.step(f"starting the engine (vLLM {version})"), beside:
                start = self._start_engine(source, devices)
                self._loop.call(start, limit, "starting the engine")
            with progress.step("taking the policy's weights"):
                self._sync = WeightSync(
                    policy, config, self._loop, self._engine, self._lifecycle, self._journal,
                    source.specs, self._colocation.shared, self._ranks, self._group,
                )  # fmt: skip
                self._generation = Generation(
                    self._engine, self._loop, self._endpoint.gate, self._box, self._lifecycle,
                    self._sync,
                )  # fmt: skip
                self._sync.push()
                self._on_close += self._colocation.before_each_step(self._rest)
            with progress.step("sampling a first token"):
                self._generation.try_out(limit)
            if self._endpoint.is_open:
                with progress.step("opening the endpoint"):
                    opening = self._endpoint.start(
                        self._engine.client, policy.tokenizer, self._names, self._sampling,
                        tool_parser(config, policy.chat_template), lambda: self._lifecycle.version,
                    )  # fmt: skip
                    self._loop.call(opening, limit, "starting the endpoint")
            self._look_after_the_engine()
            urls = self._ranks.gather("attach(): urls", self._base_url, limit)
            self._base_urls = list(dict.fromkeys(urls))
            leave_out()
            self.call_on_close(take_in)
        except BaseException:
            kill_trees(self._pids)  # also wakes a start that still waits for them
            self.close()
            raise
        progress.say(f"serving {config.served_model_name!r} at {self.base_url}")

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

    def _rest(self) -> None:
        """Before an optimizer's step that the engine mustn't be awake for."""
        if self.state not in (State.ASLEEP, State.BROKEN, State.CLOSED):
            self.sleep()

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
    ) -> list[Completion]:
        """Sample completions, without HTTP.

        Args:
            prompts: one prompt or several; each a string, token ids, or messages.
            sampling: fields of vLLM's `SamplingParams` over the server's defaults.
            timeout: seconds, instead of `generate_timeout`.

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
            return self._generation.completions(prompts, self._policy.tokenizer, fields, timeout)

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

    def _read_metrics(self) -> None:
        read = self._journal.metrics.read
        read("running_generations", lambda: self._engine.running)
        read("state", lambda: {state: state is self.state for state in State})
        read("policy_version", lambda: self.policy_version)

    def _engine_log(self) -> str:
        """The end of it."""
        if self._log_tail or self._started is None:
            return self._log_tail
        return self._engine.log_tail()

    # -- the end ------------------------------------------------------------------------------

    def call_on_close(self, work: Callable[[], None]) -> None:
        """Have `close` call `work`, first of all; what it raises is ignored."""
        self._on_close.append(work)

    def close(self) -> None:
        """End the endpoint, the engine and the thread; free the port and the temporary folder.

        From any state and any thread, any number of times.
        """
        with held():  # a signal cuts the waits short; what is left is killed
            if self._box.close():
                self._close()

    def _close(self) -> None:
        atexit.unregister(self.close)
        interrupt = None
        for work in self._on_close:
            with contextlib.suppress(Exception):
                work()
        patience = self._config.close_timeout
        try:
            self._loop.call(self._end(patience), patience * 3, "close()")
        except BaseException as error:  # what doesn't end is killed
            interrupt = error if interrupts(error) else None
        self._log_tail = self._engine_log()
        kill_trees(self._pids)
        self._loop.stop(patience)
        kill_trees(self._pids)  # one that was started meanwhile
        self._endpoint.free()
        self._temporary.remove()
        self._journal.happened("closed")
        if interrupt is not None:
            raise interrupt

    async def _end(self, patience: float) -> None:
        await self._endpoint.close(min(patience, 2.0))
        if self._started is not None:
            self._started.close(patience)

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

    # -- the beginning --------------------------------------------------------------------------

    async def _start_engine(self, source: Source, devices: list[str | None]) -> None:
        config = self._config
        self._started = await start_engine(
            self._policy, config, source, self._folder, self._names, self._sampling, devices,
            self._pids, self._group,
        )  # fmt: skip
        beside_start = functools.partial(self._colocation.beside_start, self._folder)
        steps = Steps(
            config, self._engine, self._box, self._endpoint.gate, self._journal, beside_start
        )
        self._lifecycle = Lifecycle(steps)
        self._read_metrics()

    @property
    def _engine(self) -> EngineProtocol:
        if self._started is None:
            raise StateError("the engine hasn't started")
        return self._started

    def _look_after_the_engine(self) -> None:
        if self._config.restarts:
            self._engine.let_requests_wait(self._config.restarts)
        watching = watch(self._config, self._engine, self._lifecycle, self._box, self._sync.restore)
        self._loop.submit(watching, "watching the engine")
