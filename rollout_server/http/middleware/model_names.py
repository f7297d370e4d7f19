"""The layer that knows the model by the names that clients call it, and refuses others.

A client whose user named no model asks for one all the same, each dialect's for another. On its own
routes such a name is the policy's. In a session any name is: an agent that was pointed there by its
environment asks for the model that it knows.
"""

import re

from starlette.types import ASGIApp, Receive, Scope, Send

from rollout_server.http.responses import send_error
from rollout_server.http.routes import ANTHROPIC, CHAT, GEMINI, NAMELESS, RESPONSES
from rollout_server.http.scope import BODY, REQUEST, SESSION, SURFACE

# huggingface_hub's InferenceClient, TGI's own documentation, and OpenAI's Agents SDK, whose
# default changes with its version.
_OPENAI = re.compile(r"dummy|tgi|gpt-\d[\w.-]*")
_UNASKED = {
    CHAT: _OPENAI,
    RESPONSES: _OPENAI,
    ANTHROPIC: re.compile(r"claude-[\w.@-]+"),
    f"{ANTHROPIC}/count_tokens": re.compile(r"claude-[\w.@-]+"),
}
_GEMINI = re.compile(r"(models/)?gemini-[\w.-]+")


class ModelNameMiddleware:
    """404, with the list of names, for a model that isn't served."""

    def __init__(self, app: ASGIApp, names: list[str]):
        self._app = app
        self._names = names

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        given = scope.get(REQUEST)
        request = given if isinstance(given, dict) else {}
        name = request.get("model")
        if not isinstance(name, str) or name in ("", *self._names) or scope["path"] in NAMELESS:
            pass  # vLLM says what is wrong with another type
        elif scope.get(SESSION) is not None or self._unasked(scope, name):
            scope = {**scope, BODY: None, REQUEST: {**request, "model": self._names[0]}}
        else:
            await send_error(send, 404, self._unknown(name), "not_found_error", param="model")
            return
        await self._app(scope, receive, send)

    def _unasked(self, scope: Scope, name: str) -> bool:
        surface = _GEMINI if scope.get(SURFACE) == GEMINI else _UNASKED.get(scope["path"])
        return surface is not None and surface.fullmatch(name) is not None

    def _unknown(self, name: str) -> str:
        served = " or ".join(map(repr, self._names))
        return f"model={name!r:.100} isn't served here; send {served}"
