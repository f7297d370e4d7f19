"""vLLM's endpoints, called without what FastAPI does around them.

FastAPI asks all routes whether they are meant, twice, and reads the body's JSON again: as much work
as vLLM's own for a short answer. An endpoint of vLLM takes a request model and Starlette's request
and gives a response, so a plain request needs nothing else. What isn't plain (not JSON by its
content type, large, or refused by the model) goes the whole way, and is answered there. So is
everything where this vLLM's app is built otherwise than is known here.
"""

import inspect
import marshal
import time
import typing
from collections.abc import Awaitable, Callable
from typing import Any

from fastapi.routing import APIRoute
from pydantic import BaseModel
from starlette.middleware.cors import CORSMiddleware
from starlette.middleware.errors import ServerErrorMiddleware
from starlette.middleware.exceptions import ExceptionMiddleware
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from rollout_server.http.body import LARGE
from rollout_server.http.routes import GENERATES
from rollout_server.http.scope import REQUEST, SIZE

# Of vLLM's app. The first adds a header, the last counts; the others leave a plain request alone.
_MIDDLEWARE = frozenset(
    (
        "CORSMiddleware",
        "ScalingMiddleware",
        "WebSocketMetricsMiddleware",
        "PrometheusInstrumentatorMiddleware",
    )
)
_COUNTING = "PrometheusInstrumentatorMiddleware"
_DEPENDENCIES = frozenset(("validate_json_request",))  # it looks at the content type
Endpoint = Callable[[Any, Request], Awaitable[Response | None]]
_FAILED = "rollout_failed"  # in the ASGI scope of what failed: a `_Failed`


class DirectEndpoints:
    """Has plain requests answered by vLLM's endpoints; others pass to `app`."""

    def __init__(self, app: ASGIApp, vllm: Any):
        """vllm: its FastAPI app, which is behind `app`."""
        self._app = app
        self._vllm = vllm
        known = all(m.cls.__name__ in _MIDDLEWARE for m in vllm.user_middleware)
        self._endpoints = _endpoints(vllm) if known else {}
        self._count = _counter(vllm) if self._endpoints else None
        self._cors = _cors(vllm, None)
        self._fail = _failing(vllm)

    @property
    def paths(self) -> set[str]:
        """Those of the endpoints that are called so."""
        return set(self._endpoints)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        endpoint = self._endpoints.get(scope["path"])
        if endpoint is not None and _is_plain(scope):
            call, model = endpoint
            try:
                # A copy, for validators change what they are given.
                given = model.model_validate(marshal.loads(marshal.dumps(scope[REQUEST], 2)))
            except Exception:
                pass  # FastAPI says what is wrong
            else:
                await self._answer(call, given, scope, receive, send)
                return
        await self._app(scope, receive, send)

    async def _answer(
        self, call: Endpoint, given: BaseModel, scope: Scope, receive: Receive, send: Send
    ) -> None:
        started, begun = time.perf_counter(), None
        scope = {"state": {}, **scope, "app": self._vllm}
        request, response = Request(scope, receive, send), None
        try:
            try:
                response = await call(given, request)
            except Exception as error:
                scope[_FAILED] = failed = _Failed(error)
                response = failed
                await self._fail(scope, receive, send)
                return
            if response is not None:  # else the client has gone away
                begun = time.perf_counter()
                if self._cors is not None:
                    # Its headers, at once: in the way of each event there is nothing then.
                    start: Message = {
                        "type": "http.response.start",
                        "headers": response.raw_headers,
                    }
                    await self._cors.send(start, _nowhere, request.headers)
                    response.raw_headers = start["headers"]
                await response(scope, receive, send)
        finally:
            if self._count is not None:
                self._count(request, response, started, begun)


class _Failed(Response):
    """The answer for an error, as far as it is counted."""

    def __init__(self, error: Exception):
        super().__init__(status_code=500)
        self.error = error


async def _nowhere(message: Any) -> None:
    pass


def _is_plain(scope: Scope) -> bool:
    if scope["method"] != "POST" or scope[SIZE] >= LARGE:
        return False
    kinds = [value for name, value in scope["headers"] if name == b"content-type"]
    return len(kinds) == 1 and kinds[0].partition(b";")[0].lower() == b"application/json"


def _endpoints(vllm: Any) -> dict[str, tuple[Endpoint, type[BaseModel]]]:
    """(endpoint, request model) by path, of routes that need nothing but them."""
    found: dict[str, tuple[Endpoint, type[BaseModel]]] = {}
    for route in vllm.routes:
        if not isinstance(route, APIRoute) or ("POST", route.path) not in GENERATES:
            continue
        try:
            hints = typing.get_type_hints(inspect.unwrap(route.endpoint))
        except NameError:  # of a type that is there for type checkers alone
            continue
        names = list(inspect.signature(route.endpoint).parameters)
        dependencies = {getattr(d.dependency, "__name__", "?") for d in route.dependencies}
        if (
            len(names) == 2
            and route.methods == {"POST"}
            and inspect.isclass(model := hints.get(names[0]))
            and issubclass(model, BaseModel)
            and hints.get(names[1]) is Request
            and dependencies <= _DEPENDENCIES
            and route.response_model is None
            and route.status_code is None
        ):
            found.setdefault(route.path, (route.endpoint, model))
    return found


def _failing(vllm: Any) -> Any:
    """An ASGI app that answers for a `_Failed` as vLLM's does for what its endpoints raise."""
    handlers = dict(vllm.exception_handlers)
    last = [handlers.pop(kind) for kind in (500, Exception) if kind in handlers]

    async def fail(scope: Scope, receive: Receive, send: Send) -> None:
        raise scope[_FAILED].error

    handled: Any = ExceptionMiddleware(fail, handlers=handlers)
    handled = _cors(vllm, handled) or handled

    async def seen(scope: Scope, receive: Receive, send: Send) -> None:
        async def out(message: Message) -> None:
            if message["type"] == "http.response.start":
                scope[_FAILED].status_code = message["status"]
                scope[_FAILED].raw_headers = list(message["headers"])
            await send(message)

        await handled(scope, receive, out)

    return ServerErrorMiddleware(seen, handler=last[-1] if last else None)


def _cors(vllm: Any, app: Any) -> CORSMiddleware | None:
    """As vLLM's app has it."""
    found = [m for m in vllm.user_middleware if m.cls is CORSMiddleware]
    return CORSMiddleware(app, *found[0].args, **found[0].kwargs) if found else None


def _counter(vllm: Any) -> Callable[..., None] | None:
    """Counts a request as the app's middleware does that is behind `http_requests_total` and its
    like on `/metrics`; None where the app has none."""
    if not any(m.cls.__name__ == _COUNTING for m in vllm.user_middleware):
        return None
    from prometheus_fastapi_instrumentator.metrics import Info

    if vllm.middleware_stack is None:
        vllm.middleware_stack = vllm.build_middleware_stack()
    layer = vllm.middleware_stack
    while type(layer).__name__ != _COUNTING:
        layer = layer.app
    instrumentations = layer.instrumentations

    def count(
        request: Request, response: Response | None, started: float, begun: float | None
    ) -> None:
        now = time.perf_counter()
        status = 499 if response is None else response.status_code  # it went away
        first = 0.0 if begun is None else begun - started
        info = Info(
            request,
            response,
            "POST",
            request.scope["path"],
            f"{status // 100}xx",
            now - started,
            first,
        )
        for instrumentation in instrumentations:
            instrumentation(info)

    return count
