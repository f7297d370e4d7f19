"""Errors that vLLM's app reports as its own, though the request caused them.

vLLM answers 500 to some requests that it should refuse: a field of a wrong type, a schema that
refers to itself. An error of the kinds that Python raises for a wrong value, before anything was
sampled for the request, is the request's: it is told so, with 400. A request that an engine's death
ended gets 503. All else stays what it is, and everything is logged with its traceback.
"""

import logging

from rollout_server.engine import compat
from rollout_server.errors import first_line
from rollout_server.http.calls import current
from rollout_server.http.errors import send_error

log = logging.getLogger(__name__)
_WRONG_VALUE = (
    TypeError, ValueError, LookupError, AttributeError, ArithmeticError, RecursionError,
    AssertionError, NotImplementedError,
)  # fmt: skip


class Faults:
    """Around vLLM's app. An error doesn't pass it: the connection would be closed."""

    def __init__(self, app):
        self._app = app

    async def __call__(self, scope, receive, send):
        held, started = [], False

        async def out(message):
            nonlocal started
            if held or (message["type"] == "http.response.start" and message["status"] == 500):
                held.append(message)
            else:
                started = True
                await send(message)

        error = None
        try:
            await self._app(scope, receive, out)
        except Exception as raised:
            error = raised
            log.exception("%s %s failed", scope["method"], scope["path"])
            if started:
                raise
        if error is not None and is_request(error):
            message = f"the request can't be served: {type(error).__name__}: {first_line(error)}"
            await send_error(send, 400, message, "invalid_request_error")
        elif held and _unfollowable():
            message = (
                "no answer can follow the grammar (structured_outputs, response_format, or the "
                "tools' schemas); give another one"
            )
            await send_error(send, 400, message, "invalid_request_error")
        elif held and (died := _died()) is not None:
            await send_error(send, 503, died, "service_unavailable")
        elif held:
            for message in held:
                await send(message)
        elif error is not None:
            await send_error(send, 500, "internal error; see the server's log", "server_error")


def is_request(error: BaseException) -> bool:
    """Whether an error is that of the request which is being answered."""
    call = current.get()
    sampled = call is not None and any(g.samples for g in call.generations)
    return not sampled and isinstance(error, (*_WRONG_VALUE, *compat.request_errors()))


def _died() -> str | None:
    call = current.get()
    return None if call is None else call.died


def _unfollowable() -> bool:
    """Whether the engine gave up on a request because of its grammar: it couldn't be compiled, or
    lets no token follow."""
    call = current.get()
    return call is not None and any(
        generation.masked and sample.finish_reason == "error"
        for generation in call.generations
        for sample in generation.samples.values()
    )
