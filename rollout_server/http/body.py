"""A request's body, whole, and the JSON in it."""

import asyncio
import importlib
import itertools
import json
import re
from collections.abc import Callable, Coroutine, Iterator
from typing import Any, TypeVar, TypeVarTuple

from starlette.types import Message, Receive

from rollout_server.concurrency.race import Preempted, run_until
from rollout_server.http.responses import BadRequest

T = TypeVar("T")
Ts = TypeVarTuple("Ts")

# What of the standard library's JSON is written in Python, which type checkers aren't told of.
_scanner: Any = importlib.import_module("json.scanner")
_decoder: Any = importlib.import_module("json.decoder")

DEPTH = 64  # of objects and arrays in each other
_LARGE = 1 << 63  # what vLLM's messages have no room for
_DIGITS = bytes(48 if 48 <= byte <= 57 else 32 for byte in range(256))  # each digit to 0
_MANY = b"0" * 19
_SURROGATE = re.compile(rb"\\u[dD][89a-fA-F]")
# Bytes, from which a thread has the work on a body, and lets the loop's have its turn: what is done
# then is done in Python, between whose steps threads take turns, or in short pieces of C.
LARGE = 128 << 10
_STRINGS = 500_000  # strings, arrays and objects in a body that C would take long for
# Arrays and objects in a body: Python's garbage collection, which no other thread runs beside,
# takes a tenth of a second for a few times as many.
CONTAINERS = 500_000
_PIECE, _NUMBERS = 256 << 10, 4096  # characters, numbers


class Gone(Exception):
    """The client went away."""


async def read_body(receive: Receive, grow: Callable[[int], None] = lambda size: None) -> bytes:
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


async def unless_gone(receive: Receive, work: Coroutine[Any, Any, T]) -> T:
    """What `work` gives; `Gone`, and it is cancelled, if the client goes away before. The body must
    have been read."""

    async def leaving() -> None:
        while (await receive())["type"] != "http.disconnect":
            pass

    try:
        return await run_until(leaving, work)
    except Preempted:
        raise Gone from None


def again(body: bytes, receive: Receive) -> Receive:
    """A `receive` that tells `body` first, and then what comes."""
    told = False

    async def first() -> Message:
        nonlocal told
        if told:
            return await receive()
        told = True
        return {"type": "http.request", "body": body, "more_body": False}

    return first


async def apart(size: int, work: Callable[[*Ts], T], *args: *Ts) -> T:
    """What `work` gives, in a thread where it is on a body of a size that would hold the loop."""
    return work(*args) if size < LARGE else await asyncio.to_thread(work, *args)


def parse(body: bytes) -> Any:
    """The JSON value in a body; `BadRequest` for what two readers could read in two ways (other
    encodings, NaN, a name twice), and for what is nested too deep to be handled safely."""
    try:
        text = body.decode()
    except UnicodeDecodeError as error:
        raise BadRequest(f"the body isn't UTF-8: {error.reason} at byte {error.start}") from None
    many = _MANY in body.translate(_DIGITS)
    decoder = _DECODERS[many] if len(body) < LARGE else _decoder_of_large(body)
    try:
        value = decoder.decode(text)
    except RecursionError:
        raise BadRequest(f"the body is nested more than {DEPTH} deep; send less") from None
    except BadRequest:
        raise
    except ValueError as error:  # a number with too many digits too
        raise BadRequest(f"the body isn't valid JSON: {error}") from None
    _require_shallow(value)
    if _SURROGATE.search(body) and not _whole(value):
        raise BadRequest(
            "the body has half of a surrogate pair (\\ud800 to \\udfff); send whole characters"
        )
    return value


def _decoder_of_large(body: bytes) -> Any:
    """Numbers are made in Python, and where there is very much all is: threads take turns there."""
    hooks = _HOOKS | {"parse_int": _integer, "parse_float": _float}
    containers = body.count(b"[") + body.count(b"{")  # those in strings too
    if containers > CONTAINERS:
        hooks["object_pairs_hook"] = counted = _Counted()
    decoder: Any = json.JSONDecoder(**hooks)
    if body.count(b'"') / 2 + containers > _STRINGS:
        if containers > CONTAINERS:
            decoder.parse_array = counted.array
        decoder.scan_once = _scanner.py_make_scanner(decoder)
    return decoder


def written(value: Any) -> bytes:
    """A JSON value as a body; one that is large in a thread (see `LARGE`)."""
    parts, pieces = [], _pieces(value)
    while some := list(itertools.islice(pieces, _NUMBERS)):
        parts.append("".join(some).encode())
    return b"".join(parts)


def _pieces(value: Any) -> Iterator[str]:
    if isinstance(value, dict):
        for at, (name, inner) in enumerate(value.items()):
            yield f"{', ' if at else '{'}{json.dumps(name)}: "
            yield from _pieces(inner)
        yield "}" if value else "{}"
    elif isinstance(value, list):
        step = _NUMBERS if value and isinstance(value[0], (int, float)) else 1
        for at in range(0, len(value), step):
            yield ", " if at else "["
            if step == 1:
                yield from _pieces(value[at])
            else:
                yield json.dumps(value[at : at + step])[1:-1]
        yield "]" if value else "[]"
    elif isinstance(value, str) and len(value) > _PIECE:
        yield '"'
        for at in range(0, len(value), _PIECE):
            yield json.dumps(value[at : at + _PIECE])[1:-1]
        yield '"'
    else:
        yield json.dumps(value)


def _whole(value: Any) -> bool:
    """Whether its strings hold whole characters."""
    waiting = [value]
    while waiting:
        one = waiting.pop()
        if isinstance(one, dict):
            waiting += one
            waiting += one.values()
        elif isinstance(one, list):
            waiting += one
        elif isinstance(one, str) and not one.isascii():
            try:
                one.encode()
            except UnicodeEncodeError:
                return False
    return True


def _refuse_constant(name: str) -> Any:
    raise BadRequest(f"the body isn't valid JSON: {name}; send a finite number, or null")


def _integer(digits: str) -> int:
    value = int(digits)
    if not -_LARGE <= value < _LARGE:
        raise BadRequest(f"the body has the number {digits[:20]}...; give one of at most 64 bits")
    return value


def _float(digits: str) -> float:
    return float(digits)


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise BadRequest(f"{twice[:60]!r} is given twice in one object; give it once")
    return value


_HOOKS: dict[str, Any] = {"parse_constant": _refuse_constant, "object_pairs_hook": _object}
# Of bodies that aren't large: those without long numbers, and those with some.
_DECODERS = json.JSONDecoder(**_HOOKS), json.JSONDecoder(**_HOOKS, parse_int=_integer)


class _Counted:
    """Makes arrays and objects up to `CONTAINERS` of them."""

    def __init__(self) -> None:
        self._left = CONTAINERS

    def __call__(self, pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        self._count()
        return _object(pairs)

    def array(self, *at: Any) -> Any:
        self._count()
        return _decoder.JSONArray(*at)

    def _count(self) -> None:
        self._left -= 1
        if self._left < 0:
            raise BadRequest(
                f"the body has more than {CONTAINERS} arrays and objects; send fewer at a time"
            )


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
