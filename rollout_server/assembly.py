"""How a server begins and how it ends."""

import atexit
import contextlib
import dataclasses
import functools
import secrets
from collections.abc import Callable

from rollout_server import vllm_compat as compat
from rollout_server.clients import Clients
from rollout_server.colocation import Colocation
from rollout_server.concurrency.garbage import leave_out, take_in
from rollout_server.concurrency.interrupts import held, interrupts
from rollout_server.concurrency.loop import LoopThread
from rollout_server.config import RolloutConfig
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
from rollout_server.memory.attached import gradient_bytes, planned, require_room
from rollout_server.observability.events import Journal
from rollout_server.observability.redact import remember
from rollout_server.progress import Progress
from rollout_server.ranks import Ranks
from rollout_server.sync.weight_sync import WeightSync
from rollout_server.weights.exports import Exports
from rollout_server.weights.policy import Policy
from rollout_server.weights.sources.base import Source


class Assembly:
    """The parts of a `RolloutServer`, put together in their order and ended in the reverse."""

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
        self._exports = Exports()
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
        self._colocation = Colocation(policy, config, source, self._exports)
        with progress.step("importing vLLM"), quiet_front_end():
            version = compat.require_vllm()
            sampling_params(self._sampling)
        engine_config = self._planned(source, progress)
        self._temporary = TemporaryFolder()
        self._folder = self._temporary.path
        self._exports.note_in(self._folder)
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
                start = self._start_engine(source, devices, engine_config)
                self._loop.call(start, limit, "starting the engine")
            with progress.step("taking the policy's weights"):
                self._sync = WeightSync(
                    policy, config, self._loop, self._engine, self._lifecycle, self._journal,
                    source.specs, self._colocation.shared, self._ranks, self._group,
                    self._exports,
                    self._require_room,
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
        progress.say(f"serving {config.served_model_name!r} at {self._base_url}")

    def _planned(self, source: Source, progress: Progress) -> RolloutConfig:
        """The options with which the engine starts: its KV cache has the size that fits on each of
        its devices."""
        config = planned(self._policy, self._config, source, progress)
        sizes = self._group.gather(
            "attach(): KV cache", config.kv_cache_memory_bytes, config.start_timeout, int | None
        )
        least = min((size for size in sizes if size is not None), default=None)
        return dataclasses.replace(config, kv_cache_memory_bytes=least)

    def _require_room(self) -> None:
        """Before an engine that sleeps is woken."""
        worker, asleep = self._engine.worker, self._box.state is State.ASLEEP
        if asleep and not self._engine.dead:  # another one is started in its place
            held = gradient_bytes(self._policy.model())
            require_room(worker.weight_bytes + worker.kv_cache_bytes, self._policy.gpu, held)

    async def _start_engine(
        self, source: Source, devices: list[str | None], engine_config: RolloutConfig
    ) -> None:
        config = self._config
        self._started = await start_engine(
            self._policy, engine_config, source, self._temporary, self._names, self._sampling,
            devices, self._pids, self._group, self._exports.engine_ended,
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

    def _read_metrics(self) -> None:
        read = self._journal.metrics.read
        read("running_generations", lambda: self._engine.running)
        read("state", lambda: {state: state is self._box.state for state in State})
        read("policy_version", lambda: self._lifecycle.version)

    def _engine_log(self) -> str:
        """The end of it."""
        if self._log_tail or self._started is None:
            return self._log_tail
        return self._engine.log_tail()

    def _rest(self) -> None:
        """Before an optimizer's step that the engine mustn't be awake for."""
        if self._box.state not in (State.ASLEEP, State.BROKEN, State.CLOSED):
            self.sleep()

    def sleep(self) -> None:
        """Have the engine sleep."""
        raise NotImplementedError

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
        self._exports.engine_ended()
        self._endpoint.free()
        self._temporary.remove()
        self._journal.happened("closed")
        if interrupt is not None:
            raise interrupt

    async def _end(self, patience: float) -> None:
        await self._endpoint.close(min(patience, 2.0))
        if self._started is not None:
            self._started.close(patience)
