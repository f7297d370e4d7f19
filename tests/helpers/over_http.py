"""Plain requests over HTTP to a running server."""

import httpx

MESSAGES = [{"role": "user", "content": "What is two plus two?"}]
COMPLETION = {"model": "policy", "prompt": [5, 6], "max_tokens": 4, "ignore_eos": True}


def root(server):
    """Its URL, or a session's, without the version."""
    return server.base_url.removesuffix("/v1")


def key(server):
    """The header with its key, or a session's."""
    return {"authorization": f"Bearer {server.api_key}"}


def post(server, path, key=None, **request):
    """`key`: another than the server's."""
    headers = {"authorization": f"Bearer {key or server.api_key}"} | request.pop("headers", {})
    return httpx.post(root(server) + path, headers=headers, **{"timeout": 60} | request)


def get(server, path, **headers):
    return httpx.get(root(server) + path, headers=key(server) | headers)
