"""Text Generation Inference's own routes, as huggingface_hub's `text_generation` calls them.

Text in, text out; `/generate` is SGLang's too, whose bodies have no `inputs`. Sampling fields that
a request leaves out are the trainer's, as on every route; a request without a length and a trainer
without one gets TGI's 100 tokens. What isn't done here is refused by name.
"""

import contextlib
import json
import uuid
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass
from typing import Any

from starlette.types import ASGIApp, Receive, Scope, Send

from rollout_server.engine.sampling import sampling_params, set_outputs, token_prompt
from rollout_server.errors import SamplingError
from rollout_server.http.body import Gone, unless_gone
from rollout_server.http.refusals import TEXT
from rollout_server.http.responses import BadRequest, send_json, shown
from rollout_server.http.routes import TGI
from rollout_server.http.scope import REQUEST
from rollout_server.http.tokens.calls import is_request
from rollout_server.http.tokens.texts import Texts

_LENGTH = 100
_NUMBER, _WHOLE, _FLAG = (int, float), (int,), (bool,)
_TYPES = {
    "temperature": _NUMBER,
    "top_p": _NUMBER,
    "top_k": _WHOLE,
    "frequency_penalty": _NUMBER,
    "repetition_penalty": _NUMBER,
    "max_new_tokens": _WHOLE,
    "seed": _WHOLE,
    "stop": (list,),
    "do_sample": _FLAG,
    "details": _FLAG,
    "return_full_text": _FLAG,
    "truncate": _WHOLE,
    "top_n_tokens": _WHOLE,
}
# Those that are vLLM's too, by its names.
_SAMPLING = {
    "temperature": "temperature",
    "top_p": "top_p",
    "top_k": "top_k",
    "seed": "seed",
    "frequency_penalty": "frequency_penalty",
    "repetition_penalty": "repetition_penalty",
    "max_new_tokens": "max_tokens",
    "stop": "stop",
}
_WARPS = ("temperature", "top_p", "top_k")  # with any of them TGI samples
# What isn't done, where it asks for something, and what to do instead.
_NOT_HERE = {
    "best_of": ((1,), "send several requests"),
    "decoder_input_details": ((False,), "leave it out"),
    "watermark": ((False,), "leave it out"),
    "typical_p": ((1, 1.0), "leave it out"),
    "grammar": ((), "use /v1/chat/completions with response_format or structured_outputs"),
    "adapter_id": ((), "the policy alone is served; leave it out"),
}


@dataclass
class _Asked:
    """A request, read."""

    prompt: str
    ids: list[int]
    params: Any
    seed: int | None
    details: bool
    full_text: bool
    top: int
    streams: bool


class TextGeneration:
    """Answers the routes of `routes.TGI`; other requests pass."""

    def __init__(self, app: ASGIApp, client: Any, texts: Texts, sampling: Mapping[str, Any]):
        """client: vLLM's; texts: of the policy's tokenizer; sampling: defaults of the sampling
        fields."""
        self._app = app
        self._client = client
        self._texts = texts
        self._special = set(texts.tokenizer.all_special_ids)
        self._sampling = dict(sampling)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        path, request = scope["path"], scope.get(REQUEST)
        told = isinstance(request, dict) and "inputs" in request
        if scope["method"] != "POST" or path not in TGI or (path == "/generate" and not told):
            await self._app(scope, receive, send)
            return
        try:
            asked = await self._asked(path, request)
        except (ValueError, SamplingError) as error:  # BadRequest too
            await _refuse(send, 422, str(error), "validation")
            return
        answer = self._stream(asked, send) if asked.streams else self._whole(asked, path, send)
        with contextlib.suppress(Gone):  # its generation is freed
            await unless_gone(receive, answer)

    async def _asked(self, path: str, request: Any) -> _Asked:
        if not isinstance(request, dict) or not isinstance(request.get("inputs"), str):
            given = request.get("inputs") if isinstance(request, dict) else request
            raise BadRequest(f"inputs is {shown(given)}; give a string")
        for name in request:
            if name not in ("inputs", "parameters", "stream", "model"):
                raise BadRequest(f"{name} isn't known here; known are inputs, parameters, stream")
        fields = request.get("parameters")
        fields = {} if fields is None else fields
        if not isinstance(fields, dict):
            raise BadRequest(f"parameters is {shown(fields)}; give an object")
        streams = request.get("stream")
        if streams not in (None, True, False):
            raise BadRequest(f"stream is {shown(streams)}; give true or false")
        fields = {name: value for name, value in fields.items() if value is not None}
        _require_known(fields)
        prompt = request["inputs"]
        ids = await self._ids(prompt, fields.get("truncate"))
        top = fields.get("top_n_tokens", 0)
        streams = path == "/generate_stream" or (bool(streams) and path != "/generate")
        return _Asked(
            prompt,
            ids,
            self._params(fields, len(ids), top, streams),
            fields.get("seed"),
            fields.get("details", False),
            fields.get("return_full_text", False),
            top,
            streams,
        )

    async def _ids(self, prompt: str, truncate: int | None) -> list[int]:
        if len(prompt) > TEXT:
            raise BadRequest(f"inputs has {len(prompt)} characters; give at most {TEXT}")
        ids = await self._texts.encode(prompt, special=True)
        if truncate is not None:
            ids = ids[-truncate:]
        longest = self._client.model_config.max_model_len
        if not ids:
            raise BadRequest("inputs is empty; give a string")
        if len(ids) >= longest:
            raise BadRequest(
                f"inputs has {len(ids)} tokens; the model's maximum context length is {longest}: "
                "shorten it, or give truncate"
            )
        return ids

    def _params(self, fields: dict[str, Any], prompt: int, top: int, streams: bool) -> Any:
        chosen = {"max_tokens": _LENGTH} | self._sampling
        if fields.get("do_sample") is False and not any(name in fields for name in _WARPS):
            chosen["temperature"] = 0
        chosen |= {own: fields[name] for name, own in _SAMPLING.items() if name in fields}
        chosen["max_tokens"] = min(
            chosen["max_tokens"], self._client.model_config.max_model_len - prompt
        )
        params = sampling_params(chosen | {"logprobs": top, "include_stop_str_in_output": True})
        set_outputs(params, "delta" if streams else "final")
        return params

    async def _whole(self, asked: _Asked, path: str, send: Send) -> None:
        tokens, tops, text, details = [], [], "", None
        try:
            async for event in self._events(asked):
                tokens.append(event["token"])
                tops.append(event.get("top_tokens", []))
                text, details = event["generated_text"], event["details"]
        except Exception as error:
            await _refuse(send, *_status(error))
            return
        if details is None:
            await _refuse(send, 503, "the engine gave no answer", "generation")
            return
        answer: dict[str, Any] = {"generated_text": text}
        if asked.details:
            details = {
                name: details[name] for name in ("finish_reason", "generated_tokens", "seed")
            }
            answer["details"] = details | {"prefill": [], "tokens": tokens}
            if asked.top:
                answer["details"]["top_tokens"] = tops
        # Where TGI has no other name for a route, it answers as HF's pipelines do.
        await send_json(send, answer if path == "/generate" else [answer])

    async def _stream(self, asked: _Asked, send: Send) -> None:
        kind = [(b"content-type", b"text/event-stream; charset=utf-8")]
        await send({"type": "http.response.start", "status": 200, "headers": kind})
        try:
            async for event in self._events(asked):
                await _tell(send, event)
        except Exception as error:
            _, message, what = _status(error)
            await _tell(send, {"error": message, "error_type": what})
        await send({"type": "http.response.body", "body": b""})

    async def _events(self, asked: _Asked) -> AsyncIterator[dict[str, Any]]:
        """One a token, as TGI streams them. A stream's texts make the whole text, so that of
        several tokens that come at once is the last's."""
        name = f"tgi-{uuid.uuid4().hex}"
        steps = self._client.generate(token_prompt(asked.ids), asked.params, name)
        text, count = asked.prompt if asked.full_text else "", 0
        async with contextlib.aclosing(steps):
            async for step in steps:
                (output,) = step.outputs
                text += output.text
                ids = list(output.token_ids)
                for at, (i, likely) in enumerate(zip(ids, output.logprobs or (), strict=True)):
                    count += 1
                    last = at + 1 == len(ids)
                    ends = output.finish_reason is not None and last
                    if asked.streams:
                        own = output.text if last else ""
                    else:
                        own = likely[i].decoded_token or ""
                    event = {
                        "index": count,
                        "token": self._token(i, likely[i].logprob, own),
                        "generated_text": text if ends else None,
                        "details": _details(output, count, asked) if ends else None,
                    }
                    if asked.top:
                        event["top_tokens"] = [
                            self._token(other, one.logprob, one.decoded_token or "")
                            for other, one in sorted(likely.items(), key=lambda x: x[1].rank)
                        ][: asked.top]
                    yield event

    def _token(self, i: int, logprob: float, text: str) -> dict[str, Any]:
        return {"id": i, "text": text, "logprob": logprob, "special": i in self._special}


def _require_known(fields: dict[str, Any]) -> None:
    for name, value in fields.items():
        if name in _NOT_HERE:
            harmless, remedy = _NOT_HERE[name]
            if value not in harmless:
                raise BadRequest(f"parameters.{name} is {shown(value)}; {remedy}")
            continue
        types = _TYPES.get(name)
        if types is None:
            known = ", ".join(sorted(_TYPES))
            raise BadRequest(f"parameters.{name} isn't known here; known are {known}")
        if type(value) not in types:  # a bool is an int to Python, not to a request
            wanted = " or ".join(t.__name__ for t in types)
            raise BadRequest(f"parameters.{name} is {shown(value)}; give {wanted}")
    for word in fields.get("stop", ()):
        if not isinstance(word, str):
            raise BadRequest(f"parameters.stop holds {shown(word)}; give strings")
    for name in ("truncate", "max_new_tokens"):
        if fields.get(name, 1) < 1:
            raise BadRequest(f"parameters.{name} is {fields[name]}; give at least 1")
    if fields.get("top_n_tokens", 0) < 0:
        raise BadRequest(f"parameters.top_n_tokens is {fields['top_n_tokens']}; give 0 or more")


def _details(output: Any, count: int, asked: _Asked) -> dict[str, Any]:
    ended = output.finish_reason
    if ended == "stop":
        ended = "stop_sequence" if isinstance(output.stop_reason, str) else "eos_token"
    return {
        "finish_reason": ended,
        "generated_tokens": count,
        "seed": asked.seed,
        "input_length": len(asked.ids),
    }


def _status(error: Exception) -> tuple[int, str, str]:
    if is_request(error):
        return 422, str(error), "validation"
    return 503, f"{type(error).__name__}: {error}", "generation"


async def _refuse(send: Send, status: int, message: str, kind: str) -> None:
    """An error in TGI's form, which its client reads."""
    await send_json(send, {"error": message, "error_type": kind}, status)


async def _tell(send: Send, event: dict[str, Any]) -> None:
    body = f"data: {json.dumps(event)}\n\n".encode()
    await send({"type": "http.response.body", "body": body, "more_body": True})
