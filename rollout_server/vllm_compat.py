"""Every difference between the supported vLLM versions, 0.26 to 0.33, in one file.

Importing this module doesn't import vLLM; its functions do.
"""

import argparse
import functools
import importlib
import importlib.util
from collections.abc import Callable
from typing import Any, NamedTuple

from rollout_server.errors import EngineMissingError

OLDEST, NEWEST = (0, 26), (0, 33)
_RANGE = f"{OLDEST[0]}.{OLDEST[1]} to {NEWEST[0]}.{NEWEST[1]}"


def require_vllm() -> str:
    """vLLM's version; `EngineMissingError` if there is none or it isn't a supported one."""
    if importlib.util.find_spec("vllm") is None:
        raise EngineMissingError(
            f"vLLM isn't installed; install rollout_server[cuda], or rollout_server[cpu] on a "
            f"machine without a GPU (vLLM {_RANGE})"
        )
    import vllm

    version: str = vllm.__version__  # the CPU build's metadata has another name, so not from there
    numbers = tuple(int(n) for n in version.split("+")[0].split(".")[:2] if n.isdigit())
    if len(numbers) == 2 and not OLDEST <= numbers <= NEWEST:
        raise EngineMissingError(f"vllm {version} isn't supported; install a version from {_RANGE}")
    return version


_ENTRY = "vllm.entrypoints."
_BEFORE_029 = _ENTRY + "openai.api_server"


def _first(name: str, *modules: str) -> Any:
    """The attribute `name` of the first of `modules` that this vLLM has and that has it."""
    for module in modules:
        try:
            found = importlib.import_module(module)
        except ModuleNotFoundError as error:
            if error.name and (module == error.name or module.startswith(error.name + ".")):
                continue  # this vLLM has no such module
            raise
        if hasattr(found, name):
            return getattr(found, name)
    raise ImportError(f"this vLLM has no {name}")


def frontend_arguments() -> argparse.Namespace:
    """vLLM's command-line defaults, which its HTTP app is built from."""
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    make_arg_parser = _first(
        "make_arg_parser",
        _ENTRY + "common.cli_args",  # 0.33
        _ENTRY + "launchers.cli_args",  # 0.29
        _ENTRY + "openai.cli_args",
    )
    defaults: argparse.Namespace = make_arg_parser(FlexibleArgumentParser()).parse_args([])
    return defaults


def app_builders() -> tuple[Any, Any]:
    """vLLM's `build_app` and `init_app_state`."""
    return (
        _first("build_app", _ENTRY + "launchers.app", _BEFORE_029),
        _first("init_app_state", _ENTRY + "launchers.api_server.app_state", _BEFORE_029),
    )


def request_errors() -> tuple[type[Exception], ...]:
    """What vLLM raises for a request that it can't accept; since 0.29 not all are ValueErrors."""
    import vllm.exceptions

    client_error = getattr(vllm.exceptions, "VLLMClientError", ValueError)
    return (ValueError, TypeError, vllm.exceptions.VLLMValidationError, client_error)


def engine_death() -> type[Exception]:
    """What vLLM raises for requests of an engine that died."""
    from vllm.v1.engine.exceptions import EngineDeadError

    kind: type[Exception] = EngineDeadError
    return kind


async def pause(client: Any) -> None:
    """Freeze running requests and clear all caches.

    `AsyncLLM.pause_generation(mode="keep")` without the 20 ms that it sleeps at its end for the
    order of events that its caller sees; requests that are frozen have no last outputs to wait for.
    """
    await client.renderer.clear_mm_cache_async()
    core = client.engine_core
    paused = getattr(core, "pause_generation_async", None) or core.pause_scheduler_async  # 0.33
    await paused(mode="keep", clear_cache=True)


REFIT = "rollout_refit"  # what the engine core calls the method of worker/refit.py


def core_that_refits() -> Any:
    """The engine core's class, if it has what a sync in one message needs, versions of tokens
    included (0.32): else a token could be counted to the version before."""
    from vllm.outputs import CompletionOutput
    from vllm.v1.engine.core import EngineCore

    needed = "pause_scheduler", "resume_scheduler", "set_weight_version", "collective_rpc"
    told = "weight_versions" in CompletionOutput.__dataclass_fields__
    return EngineCore if told and all(hasattr(EngineCore, name) for name in needed) else None


def wake_core(core: Any) -> None:
    """What ends before a pause is waited for in the core's loop right before that waits for a
    message: without one, requests that may run again wouldn't."""
    from vllm.v1.engine import EngineCoreRequestType

    core.input_queue.put_nowait((EngineCoreRequestType.WAKEUP, None))


LISTEN = "rollout_listen"  # and that of worker/line.py
_CALL = "rollout_call"


def take_calls() -> None:
    """Have a core's loop make calls that `put_call` puts among its clients' requests."""
    from vllm.v1.engine.core import EngineCoreProc

    def handle(self: Any, kind: Any, request: Any) -> None:
        request() if kind is _CALL else handled(self, kind, request)

    process: Any = EngineCoreProc
    handled = process._handle_client_request
    process._handle_client_request = handle


def put_call(core: Any, call: Callable[[], None]) -> None:
    """Have the core's thread make the call, between two of its steps."""
    core.input_queue.put_nowait((_CALL, call))


async def listen(client: Any, pid: int, calls: int, answers: int) -> None:
    """Have the engine core listen at pipes of process `pid`."""
    await client.engine_core.call_utility_async(LISTEN, pid, calls, answers)


async def clear_media(client: Any) -> None:
    """Empty the front end's cache of processed images, which is another thread's work."""
    if client.renderer.mm_processor_cache is not None:
        await client.renderer.clear_mm_cache_async()


async def refit(client: Any, message: Any, version: int) -> list[bytes]:
    """Have the engine core rest, write weights, and go on with the new version; the reports."""
    reports: list[bytes] = await client.engine_core.call_utility_async(REFIT, message, str(version))
    return reports


def keep_media(renderer: Any) -> None:
    """Have each request carry the media that it needs.

    By default vLLM hands the engine core the data of an image once, and later requests only name
    it; one that runs when the core dies then couldn't go on with the next core. What an image was
    processed to is kept as before.
    """
    from vllm.multimodal import cache

    if type(renderer.mm_processor_cache).__name__ in _NAMING:
        renderer._mm_processor_cache = cache.MultiModalProcessorOnlyCache(renderer.model_config)


# What vLLM calls the cache that names: before some version the first, and then the second.
_NAMING = ("MultiModalProcessorSenderCache", "LruKeyReplicatedSenderCache")


def lora_name_mapper(model: Any) -> Any:
    """How a model's modules are renamed from a checkpoint's names to vLLM's; None: not at all."""
    mapper = getattr(model, "hf_to_vllm_mapper", None)
    if mapper is None:
        return None
    if hasattr(mapper, "get_rename_mapper"):
        return mapper.get_rename_mapper()
    return mapper.get_unstacked_mapper()  # 0.26


def metrics_registry() -> Any:
    """What vLLM's `/metrics` shows; in prometheus_client's multiprocess mode, of all processes."""
    from vllm.v1.metrics.prometheus import get_prometheus_registry

    return get_prometheus_registry()


async def set_weight_version(client: Any, version: int) -> None:
    """Tell the engine the policy version, for the spans in its outputs. While it is paused: what
    runs has its tokens so far from the version before."""
    if hasattr(client, "update_weight_version"):  # 0.29
        await client.update_weight_version(str(version))
    if not _tells_versions():
        _mark_versions(client, version)


def weight_spans(output: Any) -> list[tuple[int, int, int]] | None:
    """(version, start, end) of each run of an output's tokens; None where they are all of the
    version that the engine has now."""
    spans = getattr(output, "weight_versions", None)
    if not spans:
        return None
    return [(int(s.version), s.start, s.end) for s in spans]


@functools.cache
def _tells_versions() -> bool:
    """Whether this vLLM's last outputs tell who sampled them: since 0.32. Others are made to."""
    from vllm.outputs import CompletionOutput
    from vllm.v1.engine.output_processor import RequestState

    if "weight_versions" in CompletionOutput.__dataclass_fields__:
        return True
    state: Any = RequestState
    make = state._new_completion_output

    @functools.wraps(make)
    def made(self: Any, *args: Any, **options: Any) -> Any:
        output = make(self, *args, **options)
        marks = getattr(self, "version_marks", None)
        if marks and output.finish_reason is not None:
            ends = [start for _, start in marks[1:]] + [len(self.detokenizer.output_token_ids)]
            output.weight_versions = [
                _Span(version, start, end)
                for (version, start), end in zip(marks, ends, strict=True)
                if end > start
            ]
        return output

    state._new_completion_output = made
    return False


class _Span(NamedTuple):
    version: int
    start: int
    end: int


def _mark_versions(client: Any, version: int) -> None:
    before = getattr(client, "marked_version", 0)
    client.marked_version = version
    for state in client.output_processor.request_states.values():
        marks = state.version_marks = getattr(state, "version_marks", [(before, 0)])
        if marks[-1][0] != version:  # an engine that was started anew is told it once more
            marks.append((version, len(state.detokenizer.output_token_ids)))
