"""`POST /v1/reward`: an agent tells how its rollout went."""

from starlette.types import ASGIApp, Receive, Scope, Send

from rollout_server.errors import ConfigError
from rollout_server.http.responses import send_error, send_json
from rollout_server.http.routes import REWARD
from rollout_server.http.scope import REQUEST, SESSION


class RewardMiddleware:
    """`POST /v1/reward` with {"reward": number, "components": {name: number}}, for a session."""

    def __init__(self, app: ASGIApp):
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or (scope["method"], scope["path"]) != ("POST", REWARD):
            await self._app(scope, receive, send)
            return
        live = scope.get(SESSION)
        if live is None:
            message = "a reward is a session's: use its URL or its api_key"
            await send_error(send, 400, message, "invalid_request_error")
            return
        try:
            given = scope[REQUEST]
            if not isinstance(given, dict) or not {"reward", "components"} >= given.keys():
                raise ConfigError('give {"reward": number, "components": {name: number}}')
            components = given.get("components") or {}
            if not isinstance(components, dict):
                raise ConfigError(f"components={components!r}: give numbers by name")
            live.session.set_reward(given.get("reward"), components)
        except ValueError as error:
            await send_error(send, 400, str(error), "invalid_request_error")
            return
        session = live.session
        await send_json(send, {"reward": session.reward, "components": session.components})
