"""Errors that vLLM's app reports as its own, though the request caused them.

vLLM answers 500 to some requests that it should refuse: a field of a wrong type, a schema that
refers to itself. An error of the kinds that Python raises for a wrong value, before anything was
sampled for the request, is the request's: it is told so, with 400. A request that an engine's death
ended gets 503. All else stays what it is.

What vLLM logs of a request's errors goes to our logger, never to the terminal by itself: as an
error where the answer is a failure of the server's own, else at debug level, for its sender knows.
"""

import logging
from collections import deque
from collections.abc import Awaitable
from contextvars import ContextVar

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from rollout_server.errors import first_line
from rollout_server.http.responses import nothing, send_error
from rollout_server.http.tokens.calls import current, is_request

log = logging.getLogger(__name__)
# What vLLM logged of the request that is being answered; the last of it.
_logged: ContextVar["deque[logging.LogRecord] | None"] = ContextVar("rollout_logged", default=None)
_MOST = 8
_TAKEN = "rollout_taken"
# Where vLLM reads requests and writes answers, in threads too, which don't know the request.
_OF_REQUESTS = tuple(
    f"vllm.{name}."
    for name in ("entrypoints", "renderers", "parser", "reasoning", "tool_parsers", "tokenizers")
)


class ErrorMiddleware:
    """Around vLLM's app. An error doesn't pass it: the connection would be closed."""

    def __init__(self, app: ASGIApp):
        self._app = app
        keep_off_terminal()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        records: deque[logging.LogRecord] = deque(maxlen=_MOST)
        token = _logged.set(records)
        failed = True
        try:
            failed = await self._answered(scope, receive, send)
        finally:
            _logged.reset(token)
            for record in records:
                _tell(record, logging.ERROR if failed else logging.DEBUG)

    async def _answered(self, scope: Scope, receive: Receive, send: Send) -> bool:
        """Whether the answer is a failure of the server's own."""
        held: list[Message] = []
        started = False

        # No coroutine of its own: there are many messages.
        def out(message: Message) -> Awaitable[None]:
            nonlocal started
            if not started:
                if held or (message["type"] == "http.response.start" and message["status"] == 500):
                    held.append(message)
                    return nothing()
                started = True
            return send(message)

        error = None
        try:
            await self._app(scope, receive, out)
        except Exception as raised:
            error = raised
            level = logging.DEBUG if not started and is_request(error) else logging.ERROR
            log.log(level, "%s %s failed", scope["method"], scope["path"], exc_info=True)
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
            for one in held:
                await send(one)
            return True
        elif error is not None:
            await send_error(send, 500, "internal error; see the server's log", "server_error")
            return True
        return False


def keep_off_terminal() -> None:
    """Have vLLM's handlers leave out the errors of requests; a user's own, of files, have them."""
    for handler in logging.getLogger("vllm").handlers:
        if type(handler) is logging.StreamHandler and _not_of_a_request not in handler.filters:
            handler.addFilter(_not_of_a_request)


def _not_of_a_request(record: logging.LogRecord) -> bool:
    if record.levelno < logging.ERROR and not record.exc_info:
        return True
    records = _logged.get()
    if records is None and not (record.exc_info and record.name.startswith(_OF_REQUESTS)):
        return True
    if not hasattr(record, _TAKEN):  # by another handler's filter
        setattr(record, _TAKEN, True)
        if records is None:
            _tell(record, logging.DEBUG)
        else:
            records.append(record)
    return False


def _tell(record: logging.LogRecord, level: int) -> None:
    log.log(level, "%s: %s", record.name, record.getMessage(), exc_info=record.exc_info)


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
