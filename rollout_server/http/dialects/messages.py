"""What an answer says, as the assistant's message that a client sends back in its next request."""

import json
from collections.abc import Mapping
from typing import Any

import msgspec

from rollout_server.http.routes import ANTHROPIC, CHAT, RESPONSES
from rollout_server.http.tokens.splice import Message


def message_of(path: str, answer: dict[str, Any], choice: int = 0) -> Message | None:
    """The message in a whole answer of the route `path`; None if the route has none.

    choice: number of the choice, where a route has several.
    """
    if path == CHAT:
        message: Message = answer["choices"][choice]["message"]
        return message
    if path == RESPONSES:
        return _of_response(answer)
    if path == ANTHROPIC:
        return _of_blocks(answer["content"])
    return None


class _Function(msgspec.Struct):
    name: str | None = None
    arguments: str | None = None


class _ToolCall(msgspec.Struct):
    index: int = 0
    function: _Function | None = None


class _Delta(msgspec.Struct):
    content: str | None = None
    reasoning: str | None = None
    reasoning_content: str | None = None
    tool_calls: list[_ToolCall] | None = None


class _Choice(msgspec.Struct):
    index: int = 0
    delta: _Delta | None = None
    finish_reason: str | None = None


class _Chunk(msgspec.Struct):
    """What there is to know of a chat completion's event, or a completion's: reading this alone
    takes a third of the time of reading all."""

    choices: list[_Choice] = []
    error: Any = None


_read_chunk = msgspec.json.Decoder(_Chunk).decode


class Stream:
    """Puts the message together from a stream's events.

    ended: whether the event was there with which the first choice ends; the message is whole then.
    """

    def __init__(self, path: str):
        self.ended = False
        self._path = path
        self._content: list[str] = []
        self._reasoning: list[str] = []
        self._calls: dict[int, dict[str, str]] = {}
        self._whole: Message | None = None

    def add_chunk(self, event: bytes) -> bool:
        """An event of a route whose events have choices; whether it tells an error."""
        try:
            chunk = _read_chunk(event)
        except msgspec.MsgspecError:  # NaN, for one
            chunk = msgspec.convert(json.loads(event), _Chunk)
        self._choices(chunk)
        return bool(chunk.error)

    def _choices(self, chunk: _Chunk) -> None:
        for choice in chunk.choices:
            if choice.index == 0:
                self.ended = self.ended or bool(choice.finish_reason)
                if self._path == CHAT and choice.delta is not None:
                    self._delta(choice.delta)

    def _delta(self, delta: _Delta) -> None:
        if delta.content:
            self._content.append(delta.content)
        if reasoning := delta.reasoning or delta.reasoning_content:
            self._reasoning.append(reasoning)
        for call in delta.tool_calls or ():
            function = call.function or _Function()
            self._call(call.index, {"name": function.name, "arguments": function.arguments})

    def add(self, event: dict[str, Any]) -> None:
        if "choices" in event:
            self._choices(msgspec.convert(event, _Chunk))
        for name in ("meta_info", "details"):  # of SGLang's /generate, of TGI's
            if end := event.get(name):
                self.ended = self.ended or bool(end.get("finish_reason"))
        if self._path == RESPONSES:
            if event.get("type") in ("response.completed", "response.incomplete"):
                self._whole = _of_response(event["response"])
                self.ended = True
        elif self._path == ANTHROPIC:
            self._block(event)

    def _block(self, event: dict[str, Any]) -> None:
        at = event.get("index", 0)
        if event.get("type") == "content_block_start":
            block = event["content_block"]
            self._content.append(block.get("text") or "")
            self._reasoning.append(block.get("thinking") or "")
            if block.get("type") == "tool_use":
                self._call(at, {"name": block["name"]})
        elif event.get("type") == "content_block_delta":
            delta = event["delta"]
            self._content.append(delta.get("text") or "")
            self._reasoning.append(delta.get("thinking") or "")
            if "partial_json" in delta:
                self._call(at, {"arguments": delta["partial_json"]})
        elif event.get("type") == "message_stop":
            self.ended = True

    def _call(self, at: int, part: Mapping[str, Any]) -> None:
        call = self._calls.setdefault(at, {"name": "", "arguments": ""})
        for name in call:
            call[name] += part.get(name) or ""

    @property
    def message(self) -> Message | None:
        if self._whole is not None or self._path not in (CHAT, ANTHROPIC):
            return self._whole
        calls = [self._calls[at] for at in sorted(self._calls)]
        return _message("".join(self._reasoning), "".join(self._content), calls)


def _message(reasoning: str, content: str, calls: list[dict[str, str]]) -> Message:
    message: Message = {"role": "assistant", "content": content}
    if reasoning:
        message["reasoning"] = reasoning
    if calls:
        message["tool_calls"] = [{"type": "function", "function": call} for call in calls]
    return message


def _of_response(answer: dict[str, Any]) -> Message:
    thoughts, texts, calls = [], [], []
    for item in answer.get("output", ()):
        if item.get("type") == "reasoning":
            thoughts += [part.get("text") or "" for part in item.get("content") or ()]
        elif item.get("type") == "message":
            texts += [part.get("text") or "" for part in item.get("content", ())]
        elif item.get("type") == "function_call":
            calls.append({"name": item["name"], "arguments": item["arguments"]})
    return _message("".join(thoughts), "".join(texts), calls)


def _of_blocks(blocks: list[dict[str, Any]]) -> Message:
    thoughts = [block.get("thinking") or "" for block in blocks if block.get("type") == "thinking"]
    texts = [block.get("text") or "" for block in blocks if block.get("type") == "text"]
    calls = [
        {"name": block["name"], "arguments": json.dumps(block["input"])}
        for block in blocks
        if block.get("type") == "tool_use"
    ]
    return _message("".join(thoughts), "".join(texts), calls)
