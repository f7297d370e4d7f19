"""A request's body, whole, and the JSON in it."""

import json
import re
from collections.abc import Callable, Coroutine
from typing import Any

from rollout_server.http.tokens import BadRequest
from rollout_server.race import Overtaken, unless

DEPTH = 64  # of objects and arrays in each other
_LARGE = 1 << 63  # what vLLM's messages have no room for
_DIGITS = bytes(48 if 48 <= byte <= 57 else 32 for byte in range(256))  # each digit to 0
_MANY = b"0" * 19
_SURROGATE = re.compile(rb"\\u[dD][89a-fA-F]")


class Gone(Exception):
    """The client went away."""


async def read_body(receive, grow: Callable[[int], None] = lambda size: None) -> bytes:
    """All of it; `Gone`. `grow` is told the size of each part, and may raise."""
    parts = []
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise Gone
        part = message.get("body", b"")
        grow(len(part))
        parts.append(part)
        if not message.get("more_body", False):
            return b"".join(parts)


async def unless_gone(receive, work: Coroutine) -> Any:
    """What `work` gives; `Gone`, and it is cancelled, if the client goes away before. The body must
    have been read."""

    async def leaving() -> None:
        while (await receive())["type"] != "http.disconnect":
            pass

    try:
        return await unless(leaving, work)
    except Overtaken:
        raise Gone from None


def again(body: bytes, receive):
    """A `receive` that tells `body` first, and then what comes."""
    told = False

    async def first():
        nonlocal told
        if told:
            return await receive()
        told = True
        return {"type": "http.request", "body": body, "more_body": False}

    return first


def parse(body: bytes) -> Any:
    """The JSON value in a body; `BadRequest` for what two readers could read in two ways (other
    encodings, NaN, a name twice), and for what is nested too deep to be handled safely."""
    try:
        text = body.decode()
    except UnicodeDecodeError as error:
        raise BadRequest(f"the body isn't UTF-8: {error.reason} at byte {error.start}") from None
    integers = _integer if _MANY in body.translate(_DIGITS) else None
    try:
        value = json.loads(
            text, parse_constant=_refuse_constant, object_pairs_hook=_object, parse_int=integers
        )
    except RecursionError:
        raise BadRequest(f"the body is nested more than {DEPTH} deep; send less") from None
    except BadRequest:
        raise
    except ValueError as error:  # a number with too many digits too
        raise BadRequest(f"the body isn't valid JSON: {error}") from None
    _require_shallow(value)
    if _SURROGATE.search(body):
        try:
            json.dumps(value, ensure_ascii=False).encode()
        except UnicodeEncodeError:
            raise BadRequest(
                "the body has half of a surrogate pair (\\ud800 to \\udfff); send whole characters"
            ) from None
    return value


def _refuse_constant(name: str) -> Any:
    raise BadRequest(f"the body isn't valid JSON: {name}; send a finite number, or null")


def _integer(digits: str) -> int:
    value = int(digits)
    if not -_LARGE <= value < _LARGE:
        raise BadRequest(f"the body has the number {digits[:20]}...; give one of at most 64 bits")
    return value


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise BadRequest(f"{twice[:60]!r} is given twice in one object; give it once")
    return value


def _require_shallow(value: Any) -> None:
    level, depth = [value], 0
    while level:
        if depth > DEPTH:
            raise BadRequest(f"the body is nested more than {DEPTH} deep; send less")
        inner = []
        for one in level:
            if type(one) is dict:
                one = one.values()
            elif type(one) is not list:
                continue
            inner += [x for x in one if type(x) is dict or type(x) is list]
        level, depth = inner, depth + 1
