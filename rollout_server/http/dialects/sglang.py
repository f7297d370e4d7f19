"""SGLang's native `/generate`, as slime's rollout functions call it: token ids in, token ids out.

Sampling fields that a request leaves out are the trainer's, as on every route; a request without a
length and a trainer without one gets SGLang's 128 tokens.
"""

import asyncio
import contextlib
import json
import time
import uuid
from collections.abc import AsyncIterator, Callable, Mapping
from typing import Any

from starlette.types import ASGIApp, Receive, Scope, Send

from rollout_server.engine.sampling import sampling_params, set_outputs, token_prompt
from rollout_server.errors import EngineDeadError, SamplingError
from rollout_server.http.body import Gone, unless_gone
from rollout_server.http.responses import BadRequest, send_error, send_json, shown
from rollout_server.http.scope import REQUEST
from rollout_server.http.tokens.calls import is_request
from rollout_server.http.tokens.fields import require_ids
from rollout_server.http.tokens.texts import Texts

GENERATE = "/generate"
_LENGTH = 128
# SGLang's names that vLLM has others for; None: nothing of vLLM's.
_NAMES = {
    "max_new_tokens": "max_tokens",
    "min_new_tokens": "min_tokens",
    "no_stop_trim": "include_stop_str_in_output",
    "sampling_seed": "seed",
    "custom_params": None,
    "stream_interval": None,
}
# What is sampled for one prompt: its token ids, vLLM's parameters, an id, the whole request.
_Work = tuple[list[int], Any, str, dict[str, Any]]
_Types = tuple[type, ...] | list[type]  # a list: one, or a list of them
_NUMBERS, _WHOLE, _FLAGS = (int, float), (int,), (bool,)
_WORDS: _Types = [str]
_IDS: _Types = [int]
# vLLM's fields that a request may give, and of which types: wrong ones would reach the engine.
_SAMPLING: dict[str, _Types] = {
    "temperature": _NUMBERS,
    "top_p": _NUMBERS,
    "min_p": _NUMBERS,
    "top_k": _WHOLE,
    "frequency_penalty": _NUMBERS,
    "presence_penalty": _NUMBERS,
    "repetition_penalty": _NUMBERS,
    "max_tokens": _WHOLE,
    "min_tokens": _WHOLE,
    "seed": _WHOLE,
    "n": _WHOLE,
    "ignore_eos": _FLAGS,
    "skip_special_tokens": _FLAGS,
    "spaces_between_special_tokens": _FLAGS,
    "include_stop_str_in_output": _FLAGS,
    "stop": _WORDS,
    "bad_words": _WORDS,
    "stop_token_ids": _IDS,
    "allowed_token_ids": _IDS,
}
_FIELDS = frozenset(
    (
        "text",
        "input_ids",
        "sampling_params",
        "return_logprob",
        "logprob_start_len",
        "stream",
        "top_logprobs_num",
        "rid",
        "return_text_in_logprobs",
        "token_ids_logprob",
        "image_data",
        "model",
    )
)


class SGLangGenerate:
    """Answers `/generate`; other requests pass."""

    def __init__(
        self,
        app: ASGIApp,
        client: Any,
        sampling: Mapping[str, Any],
        version: Callable[[], int],
        texts: Texts,
    ):
        """client: vLLM's; sampling: defaults of the sampling fields; version: the policy's; texts:
        of its tokenizer."""
        self._app = app
        self._client = client
        self._sampling = dict(sampling)
        self._version = version
        self._texts = texts

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if (scope["method"], scope["path"]) != ("POST", GENERATE):
            await self._app(scope, receive, send)
            return
        try:
            request = scope[REQUEST]
            single, work = await self._requests(request)
        except (ValueError, SamplingError) as error:  # BadRequest too
            await send_error(send, 400, str(error), "invalid_request_error")
            return
        answer = self._stream if request.get("stream") else self._whole
        with contextlib.suppress(Gone):  # its generations are freed
            await unless_gone(receive, answer(work, single, send))

    async def _requests(self, request: Any) -> tuple[bool, list[_Work]]:
        """Whether one answer is wanted, and what is to be done for each."""
        if not isinstance(request, dict):
            raise BadRequest("the body isn't a JSON object; give input_ids or text")
        for name, value in request.items():
            if value not in (None, False, [], -1, 0) and name not in _FIELDS:
                raise BadRequest(f"{name} isn't known here; leave it out")
        for name in ("image_data", "token_ids_logprob"):
            if request.get(name):
                raise BadRequest(f"{name} isn't available here; leave it out")
        given = request.get("input_ids")
        texts = request.get("text")
        if (given is None) == (texts is None):
            raise BadRequest("input_ids and text: give one of them")
        if given is None:
            single = not isinstance(texts, list)
            several = texts if isinstance(texts, list) else [texts]
            prompts = [await self._tokens(text) for text in several]
        else:
            single = not (isinstance(given, list) and given and isinstance(given[0], list))
            prompts = [given] if single else given
        fields = request.get("sampling_params") or {}
        each = fields if isinstance(fields, list) else [fields] * len(prompts)
        if len(each) != len(prompts):
            raise BadRequest(
                f"sampling_params has {len(each)} entries for {len(prompts)} prompts; give one each"
            )
        name = request.get("rid") or uuid.uuid4().hex
        _require_type("rid", name, (str,))
        work = [
            (self._prompt(prompt, i), self._params(own, prompt, request), f"{name}-{i}", request)
            for i, (prompt, own) in enumerate(zip(prompts, each, strict=True))
        ]
        return single, work

    async def _tokens(self, text: Any) -> list[int]:
        if self._texts.too_long(_text(text)):
            raise BadRequest(
                f"text has {len(text)} characters, which are more than {self._texts.longest} "
                "tokens, the model's maximum context length"
            )
        await asyncio.sleep(0)  # there may be many texts
        return await self._texts.encode(_text(text), special=True)

    def _prompt(self, prompt: Any, at: int) -> list[int]:
        name = f"input_ids[{at}]"
        require_ids(name, prompt, self._client.model_config.get_vocab_size())
        longest = self._client.model_config.max_model_len
        if not prompt:
            raise BadRequest(f"{name} is empty; give at least one token id")
        if len(prompt) >= longest:
            raise BadRequest(
                f"{name} has {len(prompt)} tokens; the model's maximum context length is {longest}"
            )
        ids: list[int] = prompt
        return ids

    def _params(self, fields: Any, prompt: list[int], request: dict[str, Any]) -> Any:
        if not isinstance(fields, dict):
            raise BadRequest(f"sampling_params is {fields!r:.60}; give an object")
        chosen = {"max_tokens": _LENGTH} | self._sampling
        for name, value in fields.items():
            own = _NAMES.get(name, name)
            if own is not None and value is not None:
                _require_type(f"sampling_params.{name}", value, _SAMPLING.get(own))
                chosen[own] = value
        if chosen.get("n", 1) != 1:
            raise BadRequest(f"sampling_params.n={chosen['n']!r}: give the prompt n times instead")
        room = self._client.model_config.max_model_len - len(prompt)
        if isinstance(chosen["max_tokens"], int):
            chosen["max_tokens"] = min(chosen["max_tokens"], room)
        if request.get("return_logprob"):
            top = request.get("top_logprobs_num") or 0
            _require_type("top_logprobs_num", top, _WHOLE)
            chosen["logprobs"] = top
        return sampling_params(chosen)

    async def _whole(self, work: list[_Work], single: bool, send: Send) -> None:
        try:
            answers = await asyncio.gather(*(self._last(*one) for one in work))
        except Exception as error:
            if is_request(error):
                await send_error(send, 400, str(error), "invalid_request_error")
                return
            await send_error(send, 503, f"{type(error).__name__}: {error}", "service_unavailable")
        else:
            await send_json(send, answers[0] if single else answers)

    async def _last(self, *one: Any) -> dict[str, Any]:
        answers = [answer async for answer in self._answers(*one)]
        if not answers:
            raise EngineDeadError("the engine gave no answer")
        return answers[-1]

    async def _stream(self, work: list[_Work], single: bool, send: Send) -> None:
        kind = [(b"content-type", b"text/event-stream; charset=utf-8")]
        await send({"type": "http.response.start", "status": 200, "headers": kind})
        turn = asyncio.Lock()

        async def tell(event: str) -> None:
            async with turn:
                body = f"data: {event}\n\n".encode()
                await send({"type": "http.response.body", "body": body, "more_body": True})

        async def one(at: int, *request: Any) -> None:
            async for answer in self._answers(*request):
                await tell(json.dumps(answer if single else answer | {"index": at}))

        try:
            async with asyncio.TaskGroup() as group:
                for at, request in enumerate(work):
                    group.create_task(one(at, *request))
        except* Exception as errors:
            await tell(json.dumps({"error": {"message": str(errors.exceptions[0])}}))
        await tell("[DONE]")
        await send({"type": "http.response.body", "body": b""})

    async def _answers(
        self, prompt: list[int], params: Any, name: str, request: dict[str, Any]
    ) -> AsyncIterator[dict[str, Any]]:
        """The answer as it grows: each has all of what came before."""
        started = time.monotonic()
        params = params.clone()
        if not request.get("stream"):
            set_outputs(params, "final")
        steps = self._client.generate(token_prompt(prompt), params, name)
        async with contextlib.aclosing(steps):
            async for step in steps:
                (output,) = step.outputs
                ids = list(output.token_ids)
                meta = {
                    "id": name,
                    "finish_reason": _finish(output, ids, params),
                    "prompt_tokens": len(prompt),
                    "completion_tokens": len(ids),
                    "cached_tokens": step.num_cached_tokens or 0,
                    "weight_version": str(self._version()),
                    "e2e_latency": time.monotonic() - started,
                }
                if output.logprobs is not None and request.get("return_logprob"):
                    meta["output_token_logprobs"] = [
                        [at[i].logprob, i, None] for i, at in zip(ids, output.logprobs, strict=True)
                    ]
                    if request.get("top_logprobs_num"):
                        meta["output_top_logprobs"] = [
                            [[one.logprob, i, None] for i, one in at.items()]
                            for at in output.logprobs
                        ]
                yield {"text": output.text, "output_ids": ids, "meta_info": meta}


def _finish(output: Any, ids: list[int], params: Any) -> dict[str, Any] | None:
    if output.finish_reason is None:
        return None
    if output.finish_reason == "length":
        return {"type": "length", "length": params.max_tokens}
    if output.finish_reason == "stop":
        matched = output.stop_reason if output.stop_reason is not None else ids[-1:]
        return {"type": "stop", "matched": matched[0] if isinstance(matched, list) else matched}
    return {"type": "abort", "message": "Aborted"}


def _require_type(name: str, value: Any, types: _Types | None) -> None:
    if types is None:
        known = ", ".join(sorted(_SAMPLING))
        raise BadRequest(f"{name} isn't known here; known are {known}")
    several = isinstance(types, list) and isinstance(value, list)
    for one in value if several else [value]:
        # A bool is an int to Python, not to a request.
        if type(one) not in types and not (float in types and type(one) is int):
            wanted = " or ".join(t.__name__ for t in types)
            raise BadRequest(f"{name} is {shown(value)}; give {wanted}{'s' * several}")


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise BadRequest(f"text holds {value!r:.60}; give strings")
    return value
