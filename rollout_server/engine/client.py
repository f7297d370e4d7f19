"""vLLM's `AsyncLLM`, whose engine core can be replaced when it has died.

The front end holds all that was sampled of a running request: ids, text, log-probabilities,
versions. Those who wait for an answer wait on, and a new core is asked to go on from the tokens
that there are. Used on the server's loop, but for `start_core`.
"""

import copy
import logging
from typing import Any

from vllm.sampling_params import RequestOutputKind
from vllm.v1.engine.async_llm import AsyncLLM
from vllm.v1.engine.core_client import EngineCoreClient
from vllm.v1.engine.exceptions import EngineDeadError
from vllm.v1.engine.output_processor import RequestState
from vllm.v1.executor import Executor

from rollout_server import vllm_compat as compat
from rollout_server.engine.images import hook_processor

_COUNTING = (
    "structured_outputs",
    "presence_penalty",
    "frequency_penalty",
    "bad_words",
    "thinking_token_budget",
)


class ResumableAsyncLLM(AsyncLLM):
    """vLLM's client with a core that can be replaced.

    resume_requests: whether requests wait for another core when this one has died, or fail.
    max_crashes: a request that was there at so many, and sampled nothing in between, may be their
        cause.
    """

    resume_requests = False
    max_crashes = 3
    _holding = False  # of requests, until the new core may run them

    def __init__(self, *args: Any, **options: Any):
        super().__init__(*args, **options)
        processor: Any = self.output_processor
        processor.propagate_error = self._on_error
        self._keep_requests()
        hook_processor(self.renderer)
        compat.keep_media(self.renderer)

    @property
    def core_dead(self) -> bool:
        handler = self.output_handler
        return self.engine_core.resources.engine_dead or (handler is not None and handler.done())

    @property
    def errored(self) -> bool:
        return self.core_dead and not self.resume_requests

    def start_core(self) -> EngineCoreClient:
        """A core like the one that died. Blocks until it is there."""
        core: EngineCoreClient = EngineCoreClient.make_async_mp_client(
            vllm_config=self.vllm_config,
            executor_class=Executor.get_class(self.vllm_config),
            log_stats=self.log_stats,
        )
        return core

    def use_core(self, core: EngineCoreClient) -> None:
        """Talk to `core` from now on. Requests are held until `readmit`."""
        self.engine_core, self.output_handler = core, None
        self._holding = True
        self._keep_requests()
        self._run_output_handler()  # type: ignore[no-untyped-call]

    async def readmit(self) -> None:
        """Give the core what is there of requests, those that ran on the one before included."""
        self._holding = False
        states: dict[str, Any] = self.output_processor.request_states
        for state in list(states.values()):
            request = getattr(state, "core_request", None)
            if request is None or state.request_id not in states:
                continue
            if (refusal := _refusal(state, request, self.max_crashes)) is not None:
                self._fail(state, refusal)
                continue
            request = self._going_on(state, request)
            states[state.request_id].had_by_core = True
            await self._send(request)

    def give_up(self, why: str) -> None:
        """No other core will come: whoever waits gets `EngineDeadError`."""
        self.resume_requests = False
        self._on_error(_dead(why))

    def _on_error(self, error: Exception) -> None:
        if not self.resume_requests:
            type(self.output_processor).propagate_error(self.output_processor, error)

    def _keep_requests(self) -> None:
        core: Any = self.engine_core
        states: dict[str, Any] = self.output_processor.request_states
        self._send = core.add_request_async

        async def add(request: Any) -> None:
            state = states.get(request.request_id)
            if state is not None:
                state.core_request = request
                if self._holding:
                    return
                state.had_by_core = True
            try:
                await self._send(request)
            except Exception:
                if state is None or not (self.resume_requests and self.core_dead):
                    raise

        core.add_request_async = add

    def _going_on(self, state: Any, request: Any) -> Any:
        """The request with what was sampled as a part of its prompt."""
        ids = list(state.detokenizer.output_token_ids)
        if not ids:
            return request
        if _anew(state, request):  # nothing was passed on yet
            processor = self.output_processor
            fresh: Any = RequestState.from_new_request(
                tokenizer=processor.tokenizer,
                request=request,
                prompt=state.prompt,
                parent_req=state.parent_req,
                request_index=state.request_index,
                queue=state.queue,
                log_stats=processor.log_stats,
                stream_interval=processor.stream_interval,
            )
            fresh.core_request, fresh.crashes = request, state.crashes
            processor.request_states[state.request_id] = fresh
            return request
        params = request.sampling_params.clone()
        if params.max_tokens is not None:
            params.max_tokens = max(1, params.max_tokens - len(ids))
        params.min_tokens = max(0, params.min_tokens - len(ids))
        params.prompt_logprobs = None  # told already
        if params.seed is not None:  # else the same random numbers would come once more
            params.seed += len(ids)
        rest = copy.copy(request)
        rest.prompt_token_ids = list(request.prompt_token_ids) + ids
        rest.sampling_params = params
        return rest

    def _fail(self, state: Any, why: str) -> None:
        queue, state.queue = state.queue, None  # which would be told "abort"
        self.output_processor.abort_requests([state.request_id], internal=True)
        queue.put(_dead(why))


def _refusal(state: Any, request: Any, most: int) -> str | None:
    """Why a request can't go on with a new core."""
    if state.detokenizer is None:
        return "the engine died meanwhile"
    sampled = len(state.detokenizer.output_token_ids)
    before, crashes = getattr(state, "crashes", (0, 0))
    if getattr(state, "had_by_core", False):
        state.crashes = sampled, crashes = sampled, crashes + 1 if sampled == before else 1
    state.had_by_core = False
    if crashes >= most:
        return f"the engine died {most} times while it had this request, and may do so again"
    if sampled and _streamed(state) and (field := _counting(request.sampling_params)):
        return (
            f"the engine died in the middle of this stream, which can't go on with {field}; send "
            "the request again"
        )
    return None


def _anew(state: Any, request: Any) -> bool:
    """Whether it must be sampled again from its beginning."""
    params = request.sampling_params
    again = _counting(params) is not None or params.prompt_logprobs is not None
    return again and not _streamed(state)


def _counting(params: Any) -> str | None:
    """The field, if any, for which it matters what was sampled and what was prompt."""
    return next((name for name in _COUNTING if getattr(params, name, None)), None)


def _streamed(state: Any) -> bool:
    return state.output_kind is not RequestOutputKind.FINAL_ONLY


def _not_a_death(record: logging.LogRecord) -> bool:
    return record.exc_info is None or not isinstance(record.exc_info[1], EngineDeadError)


# The lifecycle tells of it, in a line.
logging.getLogger(AsyncLLM.__module__).addFilter(_not_a_death)


def _dead(why: str) -> EngineDeadError:
    error = EngineDeadError()
    error.args = (why,)
    return error
