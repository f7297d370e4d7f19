"""Which routes there are. vLLM's app registers more, among them control routes; those are 404.

Weights, sleep and pause are calls in the training process, never HTTP.
"""

import re

# Need an awake engine: they wait at the gate.
GENERATES = frozenset(
    {
        ("POST", "/v1/chat/completions"),
        ("POST", "/v1/completions"),
        ("POST", "/v1/responses"),
        ("POST", "/v1/messages"),
        ("POST", "/generate"),
    }
)
# Answered by the front end alone, whatever the engine does.
ANSWERS = frozenset(
    {
        ("GET", "/v1/models"),
        ("POST", "/v1/messages/count_tokens"),
        ("POST", "/tokenize"),
        ("POST", "/detokenize"),
        ("POST", "/v1/reward"),
        ("GET", "/metrics"),
        ("GET", "/version"),
        ("GET", "/openapi.json"),
        ("GET", "/docs"),
    }
)
PUBLIC = frozenset({("GET", "/health")})
_PATTERNS = (
    ("GET", re.compile(r"/v1/models/[^?]+")),
    ("GET", re.compile(r"/v1/responses/[^/]+")),
    ("POST", re.compile(r"/v1/responses/[^/]+/cancel")),
)


def known(method: str, path: str) -> bool:
    """Whether a request for `method` and `path` may reach vLLM's app."""
    method = "GET" if method == "HEAD" else method
    if (method, path) in GENERATES | ANSWERS | PUBLIC:
        return True
    return any(method == m and pattern.fullmatch(path) for m, pattern in _PATTERNS)


def methods(path: str) -> list[str]:
    """The methods that a path takes; empty if there is no such route."""
    return [m for m in ("GET", "POST") if known(m, path)]
