"""`RolloutServer`: the handle that the trainer holds."""

import asyncio
import atexit
import contextlib
import html
import secrets
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch

from rollout_server import vllm_compat as compat
from rollout_server.completion import Completion, Prompt, prompt_list
from rollout_server.concurrency.garbage import leave_out, take_in
from rollout_server.concurrency.interrupts import GRACE, held, interrupts
from rollout_server.concurrency.loop import LoopThread
from rollout_server.config import RolloutConfig
from rollout_server.engine.arguments import device_name, temporary_folder, tool_parser
from rollout_server.engine.engine import Engine, kill_trees
from rollout_server.engine.group import GroupEngine
from rollout_server.engine.janitor import Janitor
from rollout_server.engine.sampling import sampling_params
from rollout_server.engine.spawn import quiet_front_end
from rollout_server.engine.start import join_group, start_engine
from rollout_server.errors import (
    EngineDeadError,
    EngineStartError,
    NotAvailableError,
    PromptTooLongError,
    RolloutServerError,
    StateError,
)
from rollout_server.http.endpoint import Endpoint
from rollout_server.lifecycle.gate import GateTimeout
from rollout_server.lifecycle.lifecycle import Lifecycle
from rollout_server.lifecycle.state import State, StateBox
from rollout_server.lifecycle.steps import Steps
from rollout_server.lifecycle.watchdog import watch
from rollout_server.observability import machine
from rollout_server.observability.events import Journal
from rollout_server.observability.redact import remember
from rollout_server.observability.report import Report, now, of_journal, of_model, report
from rollout_server.offload import OptimizerOffload
from rollout_server.progress import Progress
from rollout_server.ranks import Ranks
from rollout_server.sync.sender import Sender
from rollout_server.sync.weight_sync import SyncReport, WeightSync
from rollout_server.trajectories.session import Session
from rollout_server.weights.policy import Policy
from rollout_server.weights.shared import SharedWeights, require_shareable
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
        self._pids: list[int] = []
        self._engine: Engine | GroupEngine | None = None
        self._base_url: str | None = None
        self._offload: OptimizerOffload | None = None
        self._request = 0
        self._endpoint = Endpoint(config, self._api_key, self._journal)
        self._log_tail = ""  # of an engine that has been closed
        self._on_close: list[Callable[[], None]] = []
        with held(), self._ranks.together("attach()", config.start_timeout):
            self._group = self._ranks.group(config.tensor_parallel)
            with self._group.together("attach()", config.start_timeout):
                self._start(Progress(config.progress and self._ranks.rank == 0))

    def _start(self, progress: Progress) -> None:
        policy, config = self._policy, self._config
        source = policy.source(config.peft)  # first, since it is where a policy is refused
        if config.colocate == "share":
            require_shareable(source)
        with progress.step("importing vLLM"), quiet_front_end():
            version = compat.require_vllm()
            sampling_params(self._sampling)
        self._folder = temporary_folder()
        self._janitor = Janitor(self._folder)
        self._shared = SharedWeights() if config.colocate == "share" else None
        self._loop = LoopThread()
        atexit.register(self.close)
        try:
            url = self._open_port() if self._group.rank == 0 else None
            here = [url, device_name(policy.gpu)]
            told = self._group.gather("attach(): group", here, config.start_timeout)
            self._base_url, devices = told[0][0], [device for _, device in told]
            with progress.step(f"starting the engine (vLLM {version})"), self._sharing(source):
                start = self._start_engine(source, devices)
                self._loop.call(start, config.start_timeout, "starting the engine")
            with progress.step("taking the policy's weights"):
                sender = Sender(config, self._loop, self._engine, self._shared)
                self._sync = WeightSync(
                    policy, config, sender, self._lifecycle, source.specs, self._shared,
                    self._ranks, self._group,
                )  # fmt: skip
                self._journal.sync(self._sync.push)
                self._rest_while_stepping()
            with progress.step("sampling a first token"):
                self._try_out()
            if self._endpoint.is_open:
                with progress.step("opening the endpoint"):
                    opening = self._endpoint.start(
                        self._engine.client, policy.tokenizer, self._names(), self._sampling,
                        tool_parser(config, policy.chat_template), lambda: self._lifecycle.version,
                    )  # fmt: skip
                    self._loop.call(opening, config.start_timeout, "starting the endpoint")
            self._look_after_the_engine()
            urls = self._ranks.gather("attach(): urls", self._base_url, config.start_timeout)
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
        told = self._engine.description
        parked = {} if self._offload is None else {"optimizer": self._offload.parked_bytes}
        return parked | {
            "weights": 0 if given_back else told["weight_bytes"],
            "kv_cache": 0 if given_back else told["kv_cache_bytes"],
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
        with held(GRACE), self._open():
            if self.state not in (State.ASLEEP, State.DOWN):
                return self._journal.sync(self._sync.push)
            self._make_room()
            try:
                return self._journal.sync(self._sync.push)
            finally:
                if self.state is State.ASLEEP and self._offload is not None:  # it didn't wake
                    self._offload.restore()

    def verify_weights(self) -> None:
        """Compare the engine's weights with the policy's; `WeightSyncError` names differences."""
        with self._open():
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
            with self._open():
                self._loop.call(self._lifecycle.sleep(), self._config.transition_time, "sleep()")
            if self._offload is not None:
                self._offload.restore()

    @contextlib.contextmanager
    def _open(self) -> Iterator[None]:
        """`StateError` if the server is closed or broken, or is closed meanwhile."""
        self._box.require_open()
        try:
            yield
        except RolloutServerError as error:
            if self.state is State.CLOSED:
                raise StateError("the server was closed meanwhile") from error
            raise

    def _make_room(self) -> None:
        """What the trainer doesn't need now is the engine's."""
        if self._offload is not None:
            self._offload.park()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

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
        ids = prompt_list(prompts, self._policy.tokenizer)
        fields = self._sampling | {"logprobs": 0} | dict(sampling or {})
        sampling_params(fields)
        longest = max((len(p) for p in ids), default=0)
        if longest >= self.max_model_len:
            raise PromptTooLongError(
                f"a prompt has {longest} tokens, the engine's maximum context length is "
                f"{self.max_model_len}; shorten it or raise max_model_len"
            )
        fields.setdefault("max_tokens", self.max_model_len - longest)
        with self._open():
            return self._loop.call(
                self._generate(ids, fields),
                timeout or self._config.generate_timeout,
                "generate()",
            )

    async def _generate(
        self, prompts: list[list[int]], fields: Mapping[str, Any]
    ) -> list[Completion]:
        if self.state is State.ASLEEP:
            raise StateError("the server is asleep; wake() it before generate()")
        if self._lifecycle.unfinished and not self._sync.readable:
            raise StateError("the last sync was interrupted; call sync_weights() again")
        try:
            await self._endpoint.gate.passage()
        except GateTimeout as late:
            raise StateError(str(late)) from None
        first, self._request = self._request, self._request + len(prompts)
        tasks = [
            asyncio.ensure_future(self._engine.generate(ids, fields, f"generate-{first + i}"))
            for i, ids in enumerate(prompts)
        ]
        try:
            results = await asyncio.gather(*tasks)
        finally:
            for task in tasks:  # where one failed, or the caller went away
                task.cancel()
        return [
            self._completion(ids, output)
            for ids, outputs in zip(prompts, results, strict=True)
            for output in outputs
        ]

    def _completion(self, prompt: list[int], output: Any) -> Completion:
        ids = list(output.token_ids)
        newest = self.policy_version
        versions = compat.weight_spans(output) or [(newest, 0, len(ids))]
        return Completion(
            prompt_ids=prompt,
            ids=ids,
            text=output.text,
            logprobs=[at[i].logprob for i, at in zip(ids, output.logprobs or [], strict=True)],
            finish_reason=output.finish_reason,
            policy_version=versions[-1][0],
            versions=versions,
        )

    def openai(self, **options: Any) -> Any:
        """A ready `openai.OpenAI` client; options are its own."""
        import openai

        return openai.OpenAI(**(self._client_options() | options))

    def async_openai(self, **options: Any) -> Any:
        """A ready `openai.AsyncOpenAI` client; options are its own."""
        import openai

        return openai.AsyncOpenAI(**(self._client_options() | options))

    def _client_options(self) -> dict[str, Any]:
        self._box.require_open()
        patience = self._config.hold_timeout + self._config.generate_timeout
        return {"base_url": self.base_url, "api_key": self.api_key, "timeout": patience}

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
        if not self._endpoint.is_open:
            raise NotAvailableError(
                "this rank's engine is served by its group's first rank; call session() there"
            )
        clients = self.openai, self.async_openai
        session = Session(
            self.base_url, clients, self._endpoint.sessions.remove, metadata,
            self._journal.call_recorded,
        )  # fmt: skip
        session.on_sync, session.unmasked_logprobs = on_sync, unmasked_logprobs
        self._endpoint.sessions.add(session)
        return session

    # -- what it does -------------------------------------------------------------------------

    def metrics(self) -> dict[str, float]:
        """The server's own metrics, by the names that `/metrics` gives them; in any state."""
        return self._journal.metrics.values()

    def report(self) -> Report:
        """What to send with a bug report: `print(server.report())`.

        It holds no secrets, can be made in any state, and never raises.
        """
        server = {
            "time": now(),
            "state": self.state,
            "why": self._box.why,
            "rank": f"{self._ranks.rank} of {self._ranks.size}",
        }
        sections = {
            "versions": machine.versions,
            "machine": machine.hardware,
            "server": lambda: server,
            "engine": lambda: {
                "policy_version": self.policy_version,
                "base_urls": self.base_urls,
                "pid": self.engine_pid,
                "max_model_len": self.max_model_len,
            },
            "config": lambda: vars(self._config) | {"sampling": self._sampling},
            "model": lambda: of_model(self._policy),
            "memory": self.memory,
            "engine log": lambda: self._engine_log().splitlines(),
        }
        return report(sections | of_journal(self._journal))

    def note_logprob_difference(self, nats: float, *, grammar: bool = False) -> None:
        """Put into the metrics how far the trainer's log-probabilities are from the engine's.

        Args:
            nats: mean absolute difference per token.
            grammar: of tokens sampled under one, whose log-probabilities are of another
                distribution than the trainer's.
        """
        sampled = "grammar" if grammar else "free"
        name = "logprob_mean_absolute_difference_nats"
        self._journal.metrics.set(name, nats, sampled=sampled)

    def _show(self) -> None:
        """What metrics are read from."""
        read = self._journal.metrics.read
        read("running_generations", lambda: self._engine.running)
        read("state", lambda: {state: state is self.state for state in State})
        read("policy_version", lambda: self.policy_version)

    def _engine_log(self) -> str:
        """The end of it."""
        if self._log_tail or self._engine is None:
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
        self._janitor.dismiss()
        shutil.rmtree(self._folder, ignore_errors=True)
        self._journal.happened("closed")
        if interrupt is not None:
            raise interrupt

    async def _end(self, patience: float) -> None:
        await self._endpoint.close(min(patience, 2.0))
        if self._engine is not None:
            self._engine.close(patience)

    def __enter__(self) -> "RolloutServer":
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()

    # -- how it shows itself --------------------------------------------------------------------

    def __repr__(self) -> str:
        fields = ", ".join(f"{name}={value}" for name, value in self._shown().items())
        return f"<RolloutServer {fields}>"

    def _repr_html_(self) -> str:
        rows = "".join(
            f"<tr><th>{name}</th><td>{html.escape(str(value))}</td></tr>"
            for name, value in self._shown().items()
        )
        return f"<table><caption>RolloutServer</caption>{rows}</table>"

    def _shown(self) -> dict[str, Any]:
        shown: dict[str, Any] = {"state": self.state, "url": self.base_url}
        if self._engine is not None and self.state is not State.CLOSED:
            shown["policy_version"] = self.policy_version
            shown |= {name: f"{n / 2**20:.0f} MiB" for name, n in self.memory().items()}
        return shown

    # -- the beginning --------------------------------------------------------------------------

    def _open_port(self) -> str:
        number = self._ranks.local_rank // self._group.size
        return self._endpoint.open(number, self._ranks.several_machines)

    def _sharing(self, source: Source | None = None) -> contextlib.AbstractContextManager:
        """While an engine starts; without `source` for one that takes another's place."""
        if self._shared is None:
            return contextlib.nullcontext()
        return self._shared.answering(self._folder, {} if source is None else source.tensors)

    def _rest_while_stepping(self) -> None:
        """With common memory, or an optimizer whose state is parked, a step finds the engine
        asleep."""

        def rest():
            if self.state not in (State.ASLEEP, State.BROKEN, State.CLOSED):
                self.sleep()

        if self._shared is not None:
            self.call_on_close(self._shared.before_each_step(rest))
        if self._config.offload_optimizer:
            self._offload = OptimizerOffload(self._policy.optimizer, rest)
            self.call_on_close(self._offload.close)

    async def _start_engine(self, source: Source, devices: list[str | None]) -> None:
        config = self._config
        engine = None
        if self._group.rank == 0:
            engine = await start_engine(
                self._policy, config, source, self._folder, self._names(), self._sampling,
                devices, self._pids,
            )  # fmt: skip
        if self._group.size > 1:
            engine = await join_group(engine, self._policy, config, self._group)
        self._engine = engine
        self._lifecycle = Lifecycle(
            Steps(
                config, self._engine, self._box, self._endpoint.gate, self._journal, self._sharing
            )
        )
        self._show()

    def _look_after_the_engine(self) -> None:
        if self._config.restarts:
            self._engine.let_requests_wait(self._config.restarts)
        watching = watch(self._config, self._engine, self._lifecycle, self._box, self._sync.restore)
        self._loop.submit(watching, "watching the engine")

    def _try_out(self) -> None:
        """Sample one token: some models load well and fail at the first forward pass."""
        work = self._generate([[0]], {"max_tokens": 1, "logprobs": 0})
        try:
            self._loop.call(work, self._config.start_timeout, "sampling a first token")
        except EngineDeadError as error:
            raise EngineStartError(f"the engine can't run this model: {error}") from error

    def _names(self) -> list[str]:
        names = [self._config.served_model_name, self._policy.base_name]
        return list(dict.fromkeys(name for name in names if name))
