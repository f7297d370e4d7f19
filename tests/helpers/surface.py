"""Requests that schemathesis makes from the app's own description of itself."""

import re
from collections import Counter

import httpx
import schemathesis
from fuzzing import PATIENCE, drawn
from hypothesis import given

from rollout_server.http import routes

_JSON = {"content": {"application/json": {"schema": {}}}}
# Those that vLLM's app doesn't know of.
_OURS = {
    "/generate": {
        "type": "object",
        "properties": {
            "input_ids": {"type": "array", "items": {"type": "integer"}},
            "text": {"type": "string"},
            "stream": {"type": "boolean"},
            "sampling_params": {
                "type": "object",
                "properties": {
                    "temperature": {"type": "number"},
                    "max_new_tokens": {"type": "integer", "maximum": 4},
                    "stop": {"type": "array", "items": {"type": "string"}},
                },
            },
        },
    },
    "/": {
        "type": "object",
        "properties": {
            "inputs": {"type": "string"},
            "stream": {"type": "boolean"},
            "parameters": {
                "type": "object",
                "properties": {
                    "temperature": {"type": "number"},
                    "details": {"type": "boolean"},
                    "max_new_tokens": {"type": "integer", "maximum": 4},
                    "truncate": {"type": "integer"},
                    "do_sample": {"type": "boolean"},
                },
            },
        },
    },
    "/v1/reward": {
        "type": "object",
        "properties": {
            "reward": {"type": "number"},
            "components": {"type": "object", "additionalProperties": {"type": "number"}},
        },
    },
}
_LENGTH_OF = {"/chat/completions": "max_tokens", "/responses": "max_output_tokens"}
_LENGTHS = ("max_tokens", "max_completion_tokens", "max_output_tokens", "min_tokens")


def served(description, prefix=""):
    """What of an OpenAPI description is served, and our own routes; below `prefix`."""
    paths = {}
    for path, operations in description["paths"].items():
        plain = re.sub(r"\{[^}]*\}", "x", path)
        kept = {m: o for m, o in operations.items() if routes.known(m.upper(), plain)}
        if kept:
            paths[prefix + path] = kept
    for path, schema in _OURS.items():
        body = {"content": {"application/json": {"schema": schema}}, "required": True}
        paths[prefix + path] = {"post": {"requestBody": body, "responses": {"200": _JSON}}}
    return {**description, "paths": paths}


def explore(server, cases, number=0):
    """Send about `cases` requests to all operations together; how many were answered, by status."""
    root = server.base_url.removesuffix("/v1")
    key = {"authorization": f"Bearer {server.api_key}"}
    description = httpx.get(root + "/openapi.json", headers=key).json()
    counts = Counter()
    with server.session() as session, httpx.Client(timeout=PATIENCE, headers=key) as client:
        own = served(description, f"/sessions/{session.id}")
        both = {**description, "paths": served(description)["paths"] | own["paths"]}
        schema = schemathesis.openapi.from_dict(both)
        operations = [found.ok() for found in schema.get_all_operations()]
        varied = sum(map(_varies, operations))
        for operation in operations:
            share = -(-cases // varied) if _varies(operation) else 1
            _send(client, root, operation, share, number, counts)
    return counts


def _varies(operation):
    """Whether there is more than one request for it."""
    raw = operation.definition.raw
    return bool(raw.get("requestBody") or raw.get("parameters"))


def _shorten(path, request):
    """As in fuzzing.py: lengths that only take time are left out."""
    for name in _LENGTHS:
        if isinstance(request.get(name), (int, float)):
            request[name] = min(request[name], 4)
    for end, name in _LENGTH_OF.items():
        if path.endswith(end) and not request.get(name):
            request[name] = 4


def _send(client, root, operation, cases, number, counts):
    inside = operation.path.startswith("/sessions/")

    @drawn(cases, number)
    @given(operation.as_strategy())
    def send(case):
        options = case.as_transport_kwargs(base_url=root)
        request = options.get("json")
        if isinstance(request, dict):
            _shorten(operation.path, request)
        answer = client.request(
            options["method"],
            options["url"],
            params=options.get("params"),
            json=request,
            headers={"authorization": ""} if inside else None,
        )
        counts[answer.status_code] += 1
        told = f"{operation.method} {operation.path} {request!r}: {answer.text[:500]}"
        assert answer.status_code < 500 or answer.status_code == 503, told
        assert "Traceback" not in answer.text, told

    send()
