"""ASGI layers between uvicorn and vLLM's app, outermost first: routes, key, gate, tags."""

import hmac
from collections.abc import Callable

from rollout_server.errors import StateError
from rollout_server.http import routes
from rollout_server.http.errors import send_error
from rollout_server.http.gate import Gate, GateTimeout

VERSION_HEADER = b"x-policy-version"


class Routes:
    """404 for what isn't offered, 405 for a wrong method. Only HTTP passes."""

    def __init__(self, app):
        self._app = app

    async def __call__(self, scope, receive, send):
        if scope["type"] != "http":
            if scope["type"] == "websocket":
                await send({"type": "websocket.close", "code": 1008})
            return
        method, path = scope["method"], scope["path"]
        if routes.known(method, path):
            await self._app(scope, receive, send)
        elif allowed := routes.methods(path):
            message = f"{path} takes {' or '.join(allowed)}, not {method}"
            await send_error(
                send, 405, message, "method_not_allowed", {"allow": ", ".join(allowed)}
            )
        else:
            await send_error(send, 404, f"there is no route {method} {path}", "not_found_error")


class Key:
    """401 unless the request carries the key, as `Authorization: Bearer` or `x-api-key`."""

    def __init__(self, app, key: str):
        self._app = app
        self._key = key.encode()

    async def __call__(self, scope, receive, send):
        if (scope["method"], scope["path"]) in routes.PUBLIC or self._given(scope["headers"]):
            await self._app(scope, receive, send)
            return
        await send_error(
            send,
            401,
            "wrong or missing API key; send the server's api_key as 'Authorization: Bearer <key>'",
            "authentication_error",
            {"www-authenticate": "Bearer"},
        )

    def _given(self, headers) -> bool:
        given = dict(headers)
        scheme, _, token = given.get(b"authorization", b"").partition(b" ")
        if scheme.lower() != b"bearer":
            token = given.get(b"x-api-key", b"")
        return hmac.compare_digest(token.strip(), self._key)


class Hold:
    """Lets requests that generate wait at the gate; 503 with Retry-After past its time."""

    def __init__(self, app, gate: Gate):
        self._app = app
        self._gate = gate

    async def __call__(self, scope, receive, send):
        if (scope["method"], scope["path"]) in routes.GENERATES:
            try:
                await self._gate.passage()
            except GateTimeout as late:
                retry = {"retry-after": str(late.retry_after)}
                await send_error(send, 503, str(late), "service_unavailable", retry)
                return
            except StateError as shut:
                await send_error(send, 503, str(shut), "service_unavailable")
                return
        await self._app(scope, receive, send)


class Tags:
    """Marks every generated answer with the policy version.

    The header `x-policy-version` tells the version when the answer began, the field
    `policy_version` (of the JSON body, or of each event of a stream) the newest version that
    may have sampled a token of it.
    """

    def __init__(self, app, version: Callable[[], int]):
        self._app = app
        self._version = version

    async def __call__(self, scope, receive, send):
        if (scope["method"], scope["path"]) not in routes.GENERATES:
            await self._app(scope, receive, send)
            return
        held_start, streams, pending, passes = None, False, b"", False

        async def tagged(message):
            nonlocal held_start, streams, pending, passes
            if message["type"] == "http.response.start":
                headers = [*message["headers"], (VERSION_HEADER, str(self._version()).encode())]
                message = {**message, "headers": headers}
                kind = dict(headers).get(b"content-type", b"")
                streams = kind.startswith(b"text/event-stream")
                passes = message["status"] != 200 or not (streams or b"json" in kind)
                if streams or passes:
                    await send(message)
                else:
                    held_start = message  # until the body's length is known
                return
            if message["type"] != "http.response.body" or passes:
                await send(message)
                return
            body, more = pending + message.get("body", b""), message.get("more_body", False)
            if streams:
                # Events end with an empty line; half an event waits for its other half.
                at = body.rfind(b"\n\n") + 2 if more else len(body)
                body, pending = (body[:at], body[at:]) if at >= 2 else (b"", body)
                if body or not more:
                    await send({**message, "body": self._tag_events(body)})
                return
            pending = body
            if more:
                return
            body = self._tag(body)
            headers = [
                (k, str(len(body)).encode() if k == b"content-length" else v)
                for k, v in held_start["headers"]
            ]
            await send({**held_start, "headers": headers})
            await send({"type": "http.response.body", "body": body})

        await self._app(scope, receive, tagged)

    def _tag_events(self, events: bytes) -> bytes:
        lines = events.split(b"\n")
        return b"\n".join(
            b"data: " + self._tag(line[6:]) if line.startswith(b"data: {") else line
            for line in lines
        )

    def _tag(self, body: bytes) -> bytes:
        """`{...}` -> `{"policy_version": N, ...}`, without parsing what may be long."""
        if not body.startswith(b"{"):
            return body
        comma = b"" if body[1:].lstrip().startswith(b"}") else b","
        return b'{"policy_version":%d%s' % (self._version(), comma) + body[1:]
