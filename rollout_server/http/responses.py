"""Answers of the layers in front of vLLM's app; errors in the form of OpenAI's."""

import json
from typing import Any

from starlette.types import Send


class BadRequest(ValueError):
    """400; the message names the field, the value and the remedy."""


async def nothing() -> None:
    """In the place of a message that isn't sent."""


async def send_error(
    send: Send,
    status: int,
    message: str,
    kind: str,
    headers: dict[str, str] | None = None,
    param: str | None = None,
) -> None:
    """Send a whole ASGI answer `{"error": {...}}`."""
    error = {"message": message, "type": kind, "param": param, "code": status}
    await send_json(send, {"error": error}, status, headers)


async def send_json(
    send: Send, answer: Any, status: int = 200, headers: dict[str, str] | None = None
) -> None:
    """Send a whole ASGI answer."""
    body = json.dumps(answer).encode()
    pairs = {"content-type": "application/json", "content-length": str(len(body))}
    pairs |= headers or {}
    await send(
        {
            "type": "http.response.start",
            "status": status,
            "headers": [(k.encode(), v.encode()) for k, v in pairs.items()],
        }
    )
    await send({"type": "http.response.body", "body": body})


def shown(value: Any) -> str:
    """A value as a message names it, shortened."""
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
