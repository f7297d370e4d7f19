"""Which routes there are. vLLM's app registers more, among them control routes; those are 404.

Weights, sleep and pause are calls in the training process, never HTTP.
"""

import re

CHAT, RESPONSES, ANTHROPIC = "/v1/chat/completions", "/v1/responses", "/v1/messages"
COMPLETIONS = "/v1/completions"
CONVERSATIONS = frozenset({CHAT, RESPONSES, ANTHROPIC})  # whose prompts are messages
# Text Generation Inference's. Its clients post to the URL that they were given, which may be the
# base URL of OpenAI's clients; SGLang has a /generate too.
TGI = frozenset({"/", "/v1", "/v1/", "/generate", "/generate_stream"})
# Need an awake engine: they wait at the gate.
GENERATES = frozenset(
    {
        *(("POST", path) for path in (CHAT, COMPLETIONS, RESPONSES, ANTHROPIC)),
        *(("POST", path) for path in TGI),
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
# What a session's key opens: an agent's calls. Not what tells of the server, nor responses that are
# stored: their ids can be made up by clients, so they may be another session's.
_OF_SESSIONS = (
    GENERATES
    | PUBLIC
    | {
        ("GET", "/v1/models"),
        ("POST", "/v1/messages/count_tokens"),
        ("POST", "/tokenize"),
        ("POST", "/detokenize"),
        ("POST", "/v1/reward"),
    }
)
_PATTERNS = (
    ("GET", re.compile(r"/v1/models/[^?]+"), "/v1/models/{model}"),
    ("GET", re.compile(r"/v1/responses/[^/]+"), "/v1/responses/{id}"),
    ("POST", re.compile(r"/v1/responses/[^/]+/cancel"), "/v1/responses/{id}/cancel"),
)
NAMELESS = TGI  # where the model has no name
REWARD = "/v1/reward"  # answered in front of these
GEMINI = "/v1beta/openai"  # where clients of Gemini's OpenAI surface look for /v1
_KNOWN = GENERATES | ANSWERS | PUBLIC
_PATHS = {path for _, path in _KNOWN} | {REWARD}
_SESSION = re.compile(r"^/sessions/[^/]+")


def known(method: str, path: str) -> bool:
    """Whether a request for `method` and `path` may reach vLLM's app."""
    method = "GET" if method == "HEAD" else method
    if (method, path) in _KNOWN:
        return True
    return any(method == m and pattern.fullmatch(path) for m, pattern, _ in _PATTERNS)


def of_session(method: str, path: str) -> bool:
    """Whether a session's key opens it."""
    method = "GET" if method == "HEAD" else method
    return (method, path) in _OF_SESSIONS or (method == "GET" and path.startswith("/v1/models/"))


def label(path: str) -> str:
    """What stands for a path in metrics and logs: one of a few, whatever a client asks for."""
    path = _SESSION.sub("", path)
    if path.startswith(GEMINI):
        path = "/v1" + path.removeprefix(GEMINI)
    if path in _PATHS:
        return path
    return next((name for _, pattern, name in _PATTERNS if pattern.fullmatch(path)), "other")


def methods(path: str) -> list[str]:
    """The methods that a path takes; empty if there is no such route."""
    return [m for m in ("GET", "POST") if known(m, path)]
