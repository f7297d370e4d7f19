"""What a request passes on its way to vLLM's app, and its answer on the way back: one list."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from starlette.middleware import Middleware
from starlette.types import ASGIApp

from rollout_server.http.dialects.metrics import MetricsMiddleware
from rollout_server.http.dialects.sglang import SGLangGenerate
from rollout_server.http.dialects.tgi import TextGeneration
from rollout_server.http.middleware.access_log import AccessLogMiddleware
from rollout_server.http.middleware.admission import AdmissionMiddleware
from rollout_server.http.middleware.auth import AuthMiddleware
from rollout_server.http.middleware.body_limit import BodyLimitMiddleware, ReplayBody
from rollout_server.http.middleware.direct import DirectEndpoints
from rollout_server.http.middleware.errors import ErrorMiddleware
from rollout_server.http.middleware.incremental_messages import IncrementalMessagesMiddleware
from rollout_server.http.middleware.model_names import ModelNameMiddleware
from rollout_server.http.middleware.recording import RecordingMiddleware
from rollout_server.http.middleware.rewards import RewardMiddleware
from rollout_server.http.middleware.routing import RoutingMiddleware
from rollout_server.http.server.limits import Limits
from rollout_server.http.sessions import Sessions
from rollout_server.http.tokens.texts import Texts
from rollout_server.lifecycle.gate import Gate
from rollout_server.observability.events import Journal


@dataclass(frozen=True)
class Engine:
    """What there is behind an app: vLLM's client, and the texts of the policy's tokenizer."""

    client: Any
    texts: Texts


def layered(
    app: ASGIApp,
    key: str,
    gate: Gate,
    version: Callable[[], int],
    sessions: Sessions,
    names: list[str],
    vocabulary: int,
    sampling: Mapping[str, Any],
    limits: Limits | None = None,
    journal: Journal | None = None,
    engine: Engine | None = None,
) -> ASGIApp:
    """What uvicorn serves: `app` behind all middleware.

    names: of the model; vocabulary: number of token ids that it has; sampling: defaults of the
    fields that a request leaves out; engine: where `app` is vLLM's.
    """
    limits, journal = limits or Limits(), journal or Journal()
    middleware = [
        # Numbers, counts and logs a request.
        Middleware(AccessLogMiddleware, journal, version),
        # Finds out whose it is: 401, 403.
        Middleware(AuthMiddleware, key, sessions),
        # Knows what there is: 404, 405.
        Middleware(RoutingMiddleware),
        # Takes its body in: 400, 408, 413.
        Middleware(BodyLimitMiddleware, limits),
        # Has it wait for the engine, and for its turn: 503.
        Middleware(AdmissionMiddleware, gate, limits),
        # Answers POST /v1/reward.
        Middleware(RewardMiddleware),
        # Makes a call of it, marks the answer with versions, records it in a session.
        Middleware(RecordingMiddleware, gate, version, vocabulary, sampling, sessions.retries),
        # Knows the model by its names: 404.
        Middleware(ModelNameMiddleware, names),
        # Leaves out the messages that vLLM has read before.
        Middleware(IncrementalMessagesMiddleware),
        # Tells the errors of requests from vLLM's own.
        Middleware(ErrorMiddleware),
    ]
    if engine is not None:
        client, texts = engine.client, engine.texts
        middleware += [
            # Spares plain requests FastAPI's routing.
            Middleware(DirectEndpoints, app),
            # Answer the routes of TGI, of SGLang, and GET /metrics.
            Middleware(TextGeneration, client, texts, sampling),
            Middleware(SGLangGenerate, client, sampling, version, texts),
            Middleware(MetricsMiddleware, journal.metrics),
        ]
    # Hands the body on as a server does.
    middleware.append(Middleware(ReplayBody))
    for layer in reversed(middleware):
        app = layer.cls(app, *layer.args, **layer.kwargs)
    return app
