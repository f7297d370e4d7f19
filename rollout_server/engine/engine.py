"""vLLM's `AsyncLLM` and its processes, behind the few calls that the rest of the package makes.

Every coroutine here runs on the server's loop, where the client was made.
"""

import asyncio
import contextlib
import functools
import os
import re
import time
from collections.abc import Callable, Coroutine, Mapping
from typing import Any

import psutil

from rollout_server import vllm_compat as compat
from rollout_server.concurrency.loop import Keeper
from rollout_server.engine.sampling import sampling_params
from rollout_server.engine.spawn import engine_children, engine_environment
from rollout_server.engine.stats import PeakUsage, stat_logger
from rollout_server.errors import (
    ConfigError,
    EngineDeadError,
    EngineStartError,
    OutOfMemoryError,
    UnsupportedModelError,
    WeightSyncError,
)
from rollout_server.weights.wire import Message

_ANSI = re.compile(r"\x1b\[[0-9;]*m")
_OUT_OF_MEMORY = re.compile(
    r"out of memory|MemoryError|less than (requested|desired)|No available memory|"
    r"larger than the (maximum|available)|needed, which is larger"
)
LOG_LINES = 40
_LIVENESS_PERIOD = 0.5


class Engine:
    """A running engine. Made by `Engine.start`, ended by `close`; `restart` brings up another in
    the place of one that died.

    workers: what each says of itself, see `WeightReceiver`; description: the same of all of them.
    """

    def __init__(
        self, client: Any, peak: PeakUsage, children: Callable, log: str, pids: list[int]
    ):  # fmt: skip
        self.client = client
        self._peak = peak
        self._heard = 0
        self.workers: list[dict[str, Any]] = []
        self.description: dict[str, Any] = {}
        self._children = children
        self._log = log
        self._pids = pids
        self._keeper: Keeper | None = None
        self._processes = _processes(client)

    @classmethod
    async def start(
        cls,
        arguments: Mapping[str, Any],
        variables: Mapping[str, str],
        log: str,
        pids: list[int],
    ) -> "Engine":
        """Start vLLM with `AsyncEngineArgs` fields `arguments` and environment `variables`.

        `log` is the file that the engine's processes write to; their ids go into `pids` as they
        start. Blocks the loop, on which nothing else runs yet. Raises `UnsupportedModelError`,
        `ConfigError`, `OutOfMemoryError` or `EngineStartError`; no process is left behind then.
        """
        peak = PeakUsage()
        children = functools.partial(engine_children, log, variables, pids)
        with engine_environment(variables), children():
            try:
                config = _vllm_config(arguments)
                from vllm.usage.usage_lib import UsageContext

                from rollout_server.engine.client import Client

                client = Client.from_vllm_config(
                    config,
                    usage_context=UsageContext.OPENAI_API_SERVER,
                    stat_loggers=[stat_logger(peak)],
                    disable_log_stats=bool(arguments.get("disable_log_stats", False)),
                )
            except (ConfigError, UnsupportedModelError):
                raise
            except Exception as error:
                kill_trees(pids)
                raise _start_error(error, log) from error
        engine = cls(client, peak, children, log, pids)
        try:
            await engine._describe()
            if refused := engine.description["refused"]:
                raise UnsupportedModelError(
                    "vLLM's model and the policy don't have the same tensors; attach a model whose "
                    f"architecture vLLM implements as it is:\n{refused}"
                )
            if why := engine.description["unshareable"]:
                raise ConfigError(
                    f"colocate='share' isn't possible: {why}. Load the policy in the dtype that "
                    "the engine computes in, or use colocate='sleep'"
                )
        except BaseException:
            engine.close(timeout=5)
            raise
        return engine

    async def restart(self) -> None:
        """Start another engine in the place of the one that died, `kill`ed first. It has no weights
        yet, and no requests until `readmit`. Raises `EngineStartError`."""
        self.kill()
        keeper = Keeper()
        try:
            core = await keeper.call(self._start_core)
        except BaseException as error:
            self.kill()
            keeper.stop()
            if not isinstance(error, Exception):
                raise
            raise _start_error(error, self._log) from error
        self._keeper = keeper
        self.client.use_core(core)
        self._processes = _processes(self.client)
        await self._describe()

    def _start_core(self) -> Any:
        with self._children():
            return self.client.start_core()

    async def _describe(self) -> None:
        self.workers = await self._on_workers("rollout_describe")
        self.description = _merged(self.workers)

    def kill(self) -> None:
        """End whatever is left of the engine's processes, at once."""
        _kill(self._tree())
        kill_trees(self._pids)
        self._pids.clear()  # their numbers may be given to other processes
        with contextlib.suppress(Exception):
            self.client.engine_core.shutdown(timeout=0)
        if self._keeper is not None:
            self._keeper.stop()

    async def readmit(self) -> None:
        """Let requests run on the engine that was restarted."""
        await self._alive(self.client.readmit())

    def give_up(self, why: str) -> None:
        """There won't be another engine: requests that wait for one fail."""
        self.client.give_up(why)

    def let_requests_wait(self, restarts: int) -> None:
        """Requests outlive the engine that runs them from now on: when it dies, `restart` or
        `give_up` follows. A request that may be the cause is given half of the `restarts`."""
        self.client.durable = True
        self.client.deaths = max(2, (restarts + 1) // 2)

    async def ping(self) -> None:
        """Return when the engine answers; one that has reported since the last call isn't asked."""
        heard, self._heard = self._heard, self._peak.reports
        if heard == self._heard:
            await self._on_workers("rollout_ping")
        else:
            self.require_alive()

    @property
    def pid(self) -> int:
        """Process id of the engine core."""
        return self._processes[0].pid

    @property
    def max_model_len(self) -> int:
        return self.client.model_config.max_model_len

    @property
    def dead(self) -> bool:
        return self.client.core_dead or not all(_runs(p) for p in self._processes)

    @property
    def condition(self) -> str:
        """What its process does, for errors: "running", "stopped", "ended", ..."""
        try:
            return f"process {self.pid} is {self._processes[0].status()}"
        except psutil.Error:
            return f"process {self.pid} has ended"

    @property
    def running(self) -> int:
        """How many generations there are, frozen ones included."""
        return self.client.output_processor.get_num_unfinished_requests()

    @property
    def resident_bytes(self) -> int:
        """Resident memory of the engine's processes on the host."""
        total = 0
        for process in self._tree():
            with contextlib.suppress(psutil.Error):
                total += process.memory_info().rss
        return total

    def take_kv_cache_peak(self) -> float:
        """The highest share (0 to 1) of the KV cache in use since this was last called."""
        return self._peak.take()

    def log_tail(self, lines: int = LOG_LINES) -> str:
        return _tail(self._log, lines)

    def require_alive(self) -> None:
        if self.dead:
            log = self.log_tail()
            raise EngineDeadError(
                f"the engine has ended ({_cause(log) or 'its log names no cause'}). "
                f"The end of its log:\n{log}"
            )

    async def generate(
        self, prompt: list[int], fields: Mapping[str, Any], request_id: str
    ) -> list[Any]:
        """Generate from the token ids `prompt`; vLLM's `CompletionOutput`s, one per sample."""
        from vllm.inputs import tokens_input
        from vllm.sampling_params import RequestOutputKind

        if not self.client.durable:
            self.require_alive()
        params = sampling_params(fields)
        params.output_kind = RequestOutputKind.FINAL_ONLY
        try:
            outputs = []
            async for step in self.client.generate(tokens_input(prompt), params, request_id):
                outputs = step.outputs
        except Exception:
            self.require_alive()
            raise
        return outputs

    async def drain(self) -> None:
        """Return when no request runs. Nothing new must be let in meanwhile."""
        while self.client.output_processor.has_unfinished_requests():
            self.require_alive()
            await asyncio.sleep(0.01)

    async def pause(self) -> None:
        """Freeze running requests and forget all caches; what was computed for them as well."""
        await self._alive(compat.pause(self.client))

    async def resume(self) -> None:
        await self._alive(self.client.resume_generation())

    async def sleep(self) -> None:
        """Release weights and KV cache (vLLM's level 2), freezing what runs."""
        await self._alive(self.client.sleep(level=2, mode="keep"))

    async def wake_weights(self) -> None:
        await self._alive(self.client.wake_up(tags=["weights"]))

    async def wake_kv_cache(self) -> None:
        """Bring the KV cache back; scheduling resumes with it."""
        await self._alive(self.client.wake_up(tags=["kv_cache"]))

    async def write_weights(self, message: Message) -> dict[str, Any]:
        """Copy a part of the trainer's tensors by the plan; see `WeightReceiver`."""
        return (await self._weights("rollout_write", message))[0]

    async def reload_weights(
        self, message: Message, first: bool, last: bool, layerwise: bool
    ) -> dict[str, Any]:
        """Give a part of the trainer's tensors to vLLM's loader."""
        return (await self._weights("rollout_reload", message, first, last, layerwise))[0]

    async def compare_weights(self, message: Message) -> list[str]:
        """Names of the tensors, of a part, that differ from what the engine holds."""
        return _united(await self._weights("rollout_compare", message), "mismatched")

    async def write_adapter(
        self, message: Message, scaling: Mapping[str, float], fresh: bool
    ) -> dict[str, Any]:
        """Copy a LoRA adapter into vLLM's buffers; `fresh`: which have nothing of it."""
        return (await self._weights("rollout_write_adapter", message, scaling, fresh))[0]

    async def compare_adapter(self, message: Message) -> list[str]:
        """Names of the adapter's tensors that differ from what the engine holds."""
        return _united(await self._weights("rollout_compare_adapter", message), "mismatched")

    async def anywhere(self, flag: bool) -> bool:
        """Whether `flag` holds for any rank that has this engine: here there is one."""
        return flag

    async def forget_weights(self, first: int) -> None:
        """Let go of the trainer's memory behind the parts from number `first` on."""
        await self._weights("rollout_forget", first)

    async def _weights(self, method: str, *args: Any) -> list[dict[str, Any]]:
        """Each worker's report; `WeightSyncError` if any failed."""
        reports = await self._on_workers(method, *args)
        for report in reports:
            if "error" in report:
                raise WeightSyncError(f"the engine couldn't take the weights:\n{report['error']}")
        return reports

    async def set_weight_version(self, version: int) -> None:
        await self._alive(compat.set_weight_version(self.client, version))

    async def _on_workers(self, method: str, *args: Any) -> list[dict[str, Any]]:
        return await self._alive(self.client.collective_rpc(method, args=args))

    async def _alive(self, call: Coroutine) -> Any:
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

    def _tree(self) -> list[psutil.Process]:
        tree = []
        for process in self._processes:
            with contextlib.suppress(psutil.Error):
                tree += [process, *process.children(recursive=True)]
        return tree

    def close(self, timeout: float) -> None:
        """End the engine's processes, with SIGKILL past `timeout` seconds."""
        tree = self._tree()
        self.give_up("the server is closed")
        with contextlib.suppress(Exception):
            self.client.shutdown(timeout=timeout)
        _kill(tree)
        if self._keeper is not None:
            self._keeper.stop()


def kill_trees(pids: list[int]) -> None:
    """End processes and all that they started, at once."""
    tree = []
    for pid in pids:
        with contextlib.suppress(psutil.Error):
            process = psutil.Process(pid)
            tree += [process, *process.children(recursive=True)]
    _kill(tree)


def _merged(workers: list[dict[str, Any]]) -> dict[str, Any]:
    """What holds for all workers of an engine."""
    splittable = set.intersection(*(set(w["splittable"]) for w in workers))
    return workers[0] | {
        "refused": next((w["refused"] for w in workers if w["refused"]), ""),
        "obstacles": _united(workers, "obstacles"),
        "repacked": _united(workers, "repacked"),
        "splittable": sorted(splittable),
    }


def _united(reports: list[dict[str, Any]], name: str) -> list[str]:
    return list(dict.fromkeys(line for report in reports for line in report[name]))


def _vllm_config(arguments: Mapping[str, Any]) -> Any:
    from vllm.engine.arg_utils import AsyncEngineArgs

    try:
        return AsyncEngineArgs(**arguments).create_engine_config()
    except TypeError as error:
        raise ConfigError(
            f"engine_args: vLLM's AsyncEngineArgs refuses a field: {error}"
        ) from error
    except compat.request_errors() as error:  # pydantic's ValidationError is a ValueError
        text = str(error)
        if "rchitecture" in text:
            raise UnsupportedModelError(
                f"vLLM has no such architecture: {_first_lines(text)}; serve a model whose class "
                "vLLM implements, or register yours with vllm.ModelRegistry"
            ) from error
        raise ConfigError(f"vLLM refuses the engine's options: {_first_lines(text)}") from error


def _start_error(error: Exception, log: str) -> Exception:
    tail = _tail(log, LOG_LINES)
    cause = _cause(tail) or _first_lines(str(error)) or type(error).__name__
    kind = EngineStartError
    if _OUT_OF_MEMORY.search(cause):
        kind = OutOfMemoryError
        cause += "; ask for a smaller KV cache (kv_cache_memory_bytes) or context (max_model_len)"
    return kind(f"the engine didn't start: {cause}\nThe end of its log:\n{tail}")


def _cause(log: str) -> str | None:
    """The last line of a log that names an exception."""
    named = re.findall(r"((?:\w+\.)*\w*(?:Error|Exception)\b: .+)", log)
    return named[-1].strip() if named else None


def _tail(path: str, lines: int) -> str:
    try:
        with open(path, "rb") as f:
            f.seek(0, os.SEEK_END)
            f.seek(max(0, f.tell() - 65536))
            text = f.read().decode(errors="replace")
    except OSError:
        return ""
    return "\n".join(_ANSI.sub("", text).splitlines()[-lines:])


def _first_lines(text: str, count: int = 4) -> str:
    return " ".join(line.strip() for line in text.strip().splitlines()[:count])


def _processes(client: Any) -> list[psutil.Process]:
    manager = client.engine_core.resources.engine_manager
    return [psutil.Process(p.pid) for p in manager.processes]


def _runs(process: psutil.Process) -> bool:
    with contextlib.suppress(psutil.Error):
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    return False


def _kill(processes: list[psutil.Process]) -> None:
    for process in processes:
        with contextlib.suppress(psutil.Error):
            process.kill()
    deadline = time.monotonic() + 5
    for process in processes:
        with contextlib.suppress(psutil.Error):
            process.wait(max(0.0, deadline - time.monotonic()))
