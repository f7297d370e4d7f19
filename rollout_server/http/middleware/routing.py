"""Which requests go on: those for routes that there are."""

from starlette.types import ASGIApp, Receive, Scope, Send

from rollout_server.http import routes
from rollout_server.http.responses import send_error


class RoutingMiddleware:
    """404 for what isn't offered, 405 for a wrong method. Only HTTP passes."""

    def __init__(self, app: ASGIApp):
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
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
