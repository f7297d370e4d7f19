"""vLLM's `AsyncLLM` and its processes, behind the few calls that the rest of the package makes.

Every coroutine here runs on the server's loop, where the client was made.
"""

import asyncio
import contextlib
import functools
from collections.abc import Callable, Coroutine, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any, TypeVar

from rollout_server import vllm_compat as compat
from rollout_server.concurrency.loop import SpawnerThread
from rollout_server.engine import log
from rollout_server.engine.arguments import vllm_config
from rollout_server.engine.images import image_prompt
from rollout_server.engine.line import Line
from rollout_server.engine.processes import EngineProcesses, kill, kill_trees
from rollout_server.engine.sampling import sampling_params, set_outputs, token_prompt
from rollout_server.engine.spawn import engine_children, engine_environment
from rollout_server.engine.stats import PeakUsage, stat_logger
from rollout_server.errors import (
    ConfigError,
    EngineDeadError,
    UnsupportedModelError,
    WeightSyncError,
)
from rollout_server.weights.exports import give_back
from rollout_server.weights.wire import (
    Compared,
    EngineDescription,
    Failed,
    Forgotten,
    Message,
    WorkerDescription,
    Written,
    united,
    unpack,
    unpack_report,
)

_LIVENESS_PERIOD = 0.5  # seconds
T = TypeVar("T")


class Engine:
    """A running engine of this rank alone, see `EngineProtocol`. Made by `Engine.start`, ended by
    `close`; `restart` brings up another in the place of one that died."""

    client: Any
    description: EngineDescription

    def __init__(
        self,
        client: Any,
        peak: PeakUsage,
        children: Callable[[], AbstractContextManager[None]],
        log_path: str,
        pids: list[int],
        on_end: Callable[[], None],
    ):
        self.client = client
        self._peak = peak
        self.description = EngineDescription([])
        self._heard = 0
        self._children = children
        self._log = log_path
        self._pids = pids
        self._on_end = on_end
        self._spawner: SpawnerThread | None = None
        self._processes = EngineProcesses(client)
        self._line: Line | None = None

    @classmethod
    async def start(
        cls,
        arguments: Mapping[str, Any],
        variables: Mapping[str, str],
        log_path: str,
        pids: list[int],
        on_end: Callable[[], None],
    ) -> "Engine":
        """Start vLLM with `AsyncEngineArgs` fields `arguments` and environment `variables`.

        `log_path` is the file that the engine's processes write to; their ids go into `pids` as
        they start, and `on_end` is called when they have ended. Blocks the loop, on which nothing
        else runs yet. Raises `UnsupportedModelError`, `ConfigError`, `OutOfMemoryError` or
        `EngineStartError`; no process is left behind then.
        """
        peak = PeakUsage()
        children = functools.partial(engine_children, log_path, variables, pids)
        with engine_environment(variables), children():
            try:
                config = vllm_config(arguments)
                from vllm.usage.usage_lib import UsageContext

                from rollout_server.engine.client import ResumableAsyncLLM

                client = ResumableAsyncLLM.from_vllm_config(
                    config,
                    usage_context=UsageContext.OPENAI_API_SERVER,
                    stat_loggers=[stat_logger(peak)],
                    disable_log_stats=bool(arguments.get("disable_log_stats", False)),
                )
            except (ConfigError, UnsupportedModelError):
                raise
            except Exception as error:
                kill_trees(pids)
                raise log.start_error(error, log_path) from error
        engine = cls(client, peak, children, log_path, pids, on_end)
        try:
            await engine._describe()
            if refused := engine.description.refused:
                raise UnsupportedModelError(
                    "vLLM's model and the policy don't have the same tensors; attach a model whose "
                    f"architecture vLLM implements as it is:\n{refused}"
                )
            if why := engine.description.unshareable:
                raise ConfigError(
                    f"colocate='share' isn't possible: {why}. Load the policy in the dtype that "
                    "the engine computes in, or use colocate='sleep'"
                )
        except BaseException:
            engine.close(timeout=5)
            raise
        return engine

    async def restart(self) -> None:
        self.kill()
        spawner = SpawnerThread()
        try:
            core = await spawner.call(self._start_core)
        except BaseException as error:
            self.kill()
            spawner.stop()
            if not isinstance(error, Exception):
                raise
            raise log.start_error(error, self._log) from error
        self._spawner = spawner
        self.client.use_core(core)
        self._processes = EngineProcesses(self.client)
        await self._describe()

    def _start_core(self) -> Any:
        with self._children():
            return self.client.start_core()

    async def _describe(self) -> None:
        await self._on_workers("rollout_finish_loading")
        told = await self._on_workers("rollout_describe")
        self.description = EngineDescription([unpack(one, WorkerDescription) for one in told])
        self._line = await Line.open(self.client) if self.description.refits else None

    def kill(self) -> None:
        self._hang_up()
        kill(self._processes.tree())
        kill_trees(self._pids)
        self._pids.clear()  # their numbers may be given to other processes
        with contextlib.suppress(Exception):
            self.client.engine_core.shutdown(timeout=0)
        if self._spawner is not None:
            self._spawner.stop()
        self._on_end()

    async def readmit(self) -> None:
        await self._alive(self.client.readmit())

    def give_up(self, why: str) -> None:
        self.client.give_up(why)

    def let_requests_wait(self, restarts: int) -> None:
        self.client.resume_requests = True
        self.client.max_crashes = max(2, (restarts + 1) // 2)

    async def ping(self) -> None:
        """Return when the engine answers; one that has reported since the last call isn't asked."""
        heard, self._heard = self._heard, self._peak.reports
        if heard == self._heard:
            await self._on_workers("rollout_ping")
        else:
            self.require_alive()

    @property
    def worker(self) -> WorkerDescription:
        """The worker on this rank's device: the only one."""
        return self.description.workers[0]

    @property
    def pid(self) -> int:
        return self._processes.pid

    @property
    def max_model_len(self) -> int:
        length: int = self.client.model_config.max_model_len
        return length

    @property
    def dead(self) -> bool:
        return self.client.core_dead or not self._processes.all_run

    @property
    def condition(self) -> str:
        return self._processes.condition

    @property
    def running(self) -> int:
        number: int = self.client.output_processor.get_num_unfinished_requests()
        return number

    @property
    def resident_bytes(self) -> int:
        return self._processes.resident_bytes

    def take_kv_cache_peak(self) -> float:
        return self._peak.take()

    def log_tail(self, lines: int = log.LOG_LINES) -> str:
        return log.tail(self._log, lines)

    def require_alive(self) -> None:
        if self.dead:
            end = self.log_tail()
            raise EngineDeadError(
                f"the engine has ended ({log.cause(end) or 'its log names no cause'}). "
                f"The end of its log:\n{end}"
            )

    async def generate(
        self,
        prompt: list[int],
        fields: Mapping[str, Any],
        request_id: str,
        images: Sequence[Any] = (),
    ) -> list[Any]:
        if not self.client.resume_requests:
            self.require_alive()
        params = sampling_params(fields)
        set_outputs(params, "final")
        given = token_prompt(prompt)
        if images:
            given = await image_prompt(self.client.renderer, prompt, images)
        try:
            outputs = []
            async for step in self.client.generate(given, params, request_id):
                outputs = step.outputs
        except Exception:
            self.require_alive()
            raise
        return outputs

    async def drain(self) -> None:
        while self.client.output_processor.has_unfinished_requests():
            self.require_alive()
            await asyncio.sleep(0.01)

    async def pause(self) -> None:
        await self._alive(compat.pause(self.client))

    async def resume(self) -> None:
        await self._alive(self.client.resume_generation())

    async def sleep(self) -> None:
        await self._alive(self.client.sleep(level=2, mode="keep"))

    async def wake_weights(self) -> None:
        await self._wake("weights")

    async def wake_kv_cache(self) -> None:
        await self._wake("kv_cache")

    async def _wake(self, tag: str) -> None:
        """Once more if memory ran out, with what both processes can free; `EngineDeadError` then:
        what it has mapped, another engine must have."""
        try:
            await self._alive(self.client.wake_up(tags=[tag]))
            return
        except Exception as error:
            if not log.out_of_memory(str(error)):
                raise
        await self._on_workers("rollout_free", tag)
        give_back()  # the trainer's
        try:
            await self._alive(self.client.wake_up(tags=[tag]))
        except Exception as error:
            if not log.out_of_memory(str(error)):
                raise
            raise EngineDeadError(
                f"the engine is out of memory: {log.first_lines(str(error))}; ask for a smaller KV "
                "cache (kv_cache_memory_bytes), or offload_optimizer=True"
            ) from error

    async def write_weights(self, message: Message) -> Written:
        return await self._write("rollout_write", message)

    async def refit(self, message: Message | None, version: int) -> Written:
        reports = await self._alive(self._refit(message, version))
        return next(iter(_read(reports, Written)), Written(0, 0))

    async def _refit(self, message: Message | None, version: int) -> list[bytes]:
        reports = None
        await compat.clear_media(self.client)
        if self._line is not None and not isinstance(message, dict):
            reports = await self._line.call(message, str(version))
        if reports is None:
            reports = await compat.refit(self.client, message, version)
        return reports

    async def reload_weights(
        self, message: Message, first: bool, last: bool, layerwise: bool
    ) -> Written:
        return await self._write("rollout_reload", message, first, last, layerwise)

    async def compare_weights(self, message: Message) -> Compared:
        return await self._compare("rollout_compare", message)

    async def write_adapter(
        self, message: Message, scaling: Mapping[str, float], fresh: bool
    ) -> Written:
        return await self._write("rollout_write_adapter", message, dict(scaling), fresh)

    async def compare_adapter(self, message: Message) -> Compared:
        return await self._compare("rollout_compare_adapter", message)

    async def any_rank(self, flag: bool) -> bool:
        return flag

    async def run_on_leader(self, what: str, work: Callable[[], Coroutine[Any, Any, None]]) -> None:
        await work()

    async def forget_weights(self, first: int) -> None:
        await self._reports(Forgotten, "rollout_forget", first)

    async def _write(self, method: str, *args: Any) -> Written:
        """The first worker's report: all have read the same, or their parts of it."""
        return (await self._reports(Written, method, *args))[0]

    async def _compare(self, method: str, *args: Any) -> Compared:
        """What differs on any of the workers."""
        reports = await self._reports(Compared, method, *args)
        return Compared(united(report.mismatched for report in reports))

    async def _reports(self, kind: type[T], method: str, *args: Any) -> list[T]:
        """Each worker's; `WeightSyncError` if any failed."""
        return _read(await self._on_workers(method, *args), kind)

    async def set_weight_version(self, version: int) -> None:
        await self._alive(compat.set_weight_version(self.client, version))

    async def _on_workers(self, method: str, *args: Any) -> list[Any]:
        return await self._alive(self.client.collective_rpc(method, args=args))

    async def _alive(self, call: Coroutine[Any, Any, T]) -> T:
        """Await a call to the engine; `EngineDeadError` if it dies, which vLLM doesn't notice."""
        try:
            self.require_alive()
        except EngineDeadError:
            call.close()
            raise
        task = asyncio.ensure_future(call)
        try:
            while not (await asyncio.wait({task}, timeout=_LIVENESS_PERIOD))[0]:
                self.require_alive()
            return task.result()
        finally:
            task.cancel()

    def _hang_up(self) -> None:
        if self._line is not None:
            self._line.close()
            self._line = None

    def close(self, timeout: float) -> None:
        self._hang_up()
        tree = self._processes.tree()
        self.give_up("the server is closed")
        with contextlib.suppress(Exception):
            self.client.shutdown(timeout=timeout)
        kill(tree)
        if self._spawner is not None:
            self._spawner.stop()
        self._on_end()


def _read(packed: list[bytes], kind: type[T]) -> list[T]:
    """The workers' reports; `WeightSyncError` if any failed."""
    reports = []
    for one in packed:
        report = unpack_report(one, kind)
        if isinstance(report, Failed):
            raise WeightSyncError(f"the engine couldn't take the weights:\n{report.error}")
        reports.append(report)
    return reports
