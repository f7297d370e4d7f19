"""Answers of the layers in front of vLLM's app, in the form of an OpenAI error."""

import json


async def send_error(send, status: int, message: str, kind: str, headers: dict | None = None):
    """Send a whole ASGI answer `{"error": {...}}`."""
    body = json.dumps(
        {"error": {"message": message, "type": kind, "param": None, "code": status}}
    ).encode()
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
