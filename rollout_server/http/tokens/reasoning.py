"""Which reasoning is the current answer's.

vLLM's parsers tell by the prompt whether an answer begins inside reasoning, most by the last token
in it that opens or closes any. A prompt that holds earlier answers as they were sampled has their
tokens, and what a template leaves out of a history is in it. So the parsers are shown only how the
template opens the answer: what it puts after the last message.
"""

import hashlib
import secrets
from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

from rollout_server.http.tokens.calls import current
from rollout_server.http.tokens.splice import Message, Render
from rollout_server.http.tokens.texts import Texts

_MARK = f"message{secrets.token_hex(8)}"
_KEPT = 64  # openings
_CALL = {"id": "call00000", "type": "function", "function": {"name": "f", "arguments": "{}"}}


class Openings:
    """How a template opens an answer."""

    def __init__(self, texts: Texts):
        self._texts = texts
        self._known: OrderedDict[bytes, list[int] | None] = OrderedDict()

    async def after(
        self, messages: Sequence[Message], render: Render, template: Any
    ) -> list[int] | None:
        """Token ids of what the template puts after the last of `messages`; None where the answer
        was opened before it, or that can't be told."""
        role = messages[-1].get("role") if messages else None
        kind = role if role in ("assistant", "tool") else "user"
        key = hashlib.blake2b(repr((template, kind)).encode(), digest_size=16).digest()
        if key not in self._known:
            self._known[key] = await self._found(kind, render)
            while len(self._known) > _KEPT:
                self._known.popitem(last=False)
        self._known.move_to_end(key)
        return self._known[key]

    async def _found(self, kind: str, render: Render) -> list[int] | None:
        user: Message = {"role": "user", "content": _MARK if kind == "user" else "?"}
        answer: Message = {"role": "assistant", "content": _MARK if kind == "assistant" else ""}
        messages = [user]
        if kind == "assistant":
            messages = [user, answer]
        elif kind == "tool":
            result = {"role": "tool", "tool_call_id": _CALL["id"], "name": "f", "content": _MARK}
            messages = [user, answer | {"tool_calls": [_CALL]}, result]
        opening = _after_mark(await render(messages, True))
        if opening is None:
            return None
        if kind == "tool" and opening == _after_mark(await render(messages, False)):
            return None  # the answer that called the tool goes on
        return await self._texts.encode(opening)


def _after_mark(text: str | None) -> str | None:
    return None if text is None or text.count(_MARK) != 1 else text.partition(_MARK)[2]


def of_answer(prompt_ids: Sequence[int]) -> list[int]:
    """The end of a prompt of the `current` call which opens the answer; all if it isn't known."""
    call = current.get()
    if call is None or call.opening is None:
        return list(prompt_ids)
    same = 0
    # The first of its tokens may have become one with the end of what is before.
    for ours, theirs in zip(reversed(call.opening), reversed(prompt_ids), strict=False):
        if ours != theirs:
            break
        same += 1
    return list(prompt_ids[len(prompt_ids) - same :])


def hook_parsers(state: Any) -> bool:
    """Have vLLM's parsers look at the `current` answer's part of a prompt alone; whether there are
    any that look for reasoning.

    state: of vLLM's app.
    """
    handlers = [v for v in vars(state)["_state"].values() if hasattr(v, "__dict__")]
    reasons = False
    for handler in handlers:
        for name in ("parser_cls", "parser"):
            parser = vars(handler).get(name)
            if isinstance(parser, type) and getattr(parser, "reasoning_parser_cls", None):
                setattr(handler, name, _narrowed(parser))
                reasons = True
    return reasons


def _narrowed(parser: Any) -> Any:
    if hasattr(parser, "narrowed"):
        return parser

    class Narrowed(parser):  # type: ignore[misc]
        narrowed = True

        def __init__(self, *args: Any, **options: Any) -> None:
            super().__init__(*args, **options)
            if (call := current.get()) is not None:
                call.parser = self

        def is_reasoning_end(self, input_ids: Sequence[int]) -> Any:
            return super().is_reasoning_end(of_answer(input_ids))

        def parse_delta(
            self, delta_text: str, delta_token_ids: Sequence[int], request: Any, **options: Any
        ) -> Any:
            if options.get("prompt_token_ids") is not None:
                options["prompt_token_ids"] = of_answer(options["prompt_token_ids"])
            pieces = _apart(
                delta_text, delta_token_ids, _markers(getattr(self, "reasoning_parser", None))
            )
            finished, merged = options.pop("finished", None), None
            for at, (text, ids) in enumerate(pieces, 1):
                ends = {} if finished is None else {"finished": finished and at == len(pieces)}
                parsed = super().parse_delta(text, ids, request, **options, **ends)
                merged = parsed if merged is None else _merged(merged, parsed)
            return merged

    return Narrowed


def _markers(parser: Any) -> dict[int, str]:
    """The tokens that open and close reasoning; none where a parser takes them among others."""
    if parser is None or getattr(parser, "engine_based_streaming", False):
        return {}
    names = ("reasoning_start_str", "reasoning_end_str")
    texts = [text for name in names if (text := getattr(parser, name, None))]
    return {parser.vocab[text]: text for text in texts if text in parser.vocab}


def _apart(
    text: str, ids: Sequence[int], markers: dict[int, str]
) -> list[tuple[str, Sequence[int]]]:
    """What a step of a stream holds, each marker by itself: a stream that is read late has several
    tokens a step, among which vLLM's parsers overlook them."""
    pieces, rest, start = [], text, 0
    for at, token in enumerate(ids):
        if token not in markers:
            continue
        before, marker, rest = rest.partition(markers[token])
        if not marker:
            return [(text, ids)]
        pieces += [(before, ids[start:at]), (marker, ids[at : at + 1])]
        start = at + 1
    pieces.append((rest, ids[start:]))
    return [piece for piece in pieces if piece[0] or piece[1]] or [(text, ids)]


def _merged(first: Any, second: Any) -> Any:
    """Two of vLLM's delta messages as one."""
    if second is None:
        return first
    for name in ("reasoning", "content"):
        texts = [text for one in (first, second) if (text := getattr(one, name)) is not None]
        setattr(first, name, "".join(texts) if texts else None)
    first.tool_calls = [*first.tool_calls, *second.tool_calls]
    return first
