"""`GET /metrics`: vLLM's own metrics, and the server's beside them."""

from collections.abc import Iterator
from typing import Any

from starlette.types import ASGIApp, Receive, Scope, Send

from rollout_server import vllm_compat as compat
from rollout_server.observability.metrics import Metrics

_PATH = "/metrics"


class MetricsMiddleware:
    """Answers `/metrics`; other requests pass. Formats and compression are prometheus_client's."""

    def __init__(self, app: ASGIApp, metrics: Metrics):
        from prometheus_client import CollectorRegistry, make_asgi_app

        self._app = app
        # Of this server alone: nothing is registered where another one could find it.
        registry = CollectorRegistry(support_collectors_without_names=True)
        registry.register(compat.metrics_registry())
        registry.register(_Collector(metrics))
        self._page = make_asgi_app(registry)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        app = self._page if scope["type"] == "http" and scope["path"] == _PATH else self._app
        await app(scope, receive, send)


class _Collector:
    def __init__(self, metrics: Metrics):
        self._metrics = metrics

    def collect(self) -> Iterator[Any]:
        # Not prometheus_client's own counters: in its multiprocess mode those are files, which
        # would be served a second time among vLLM's, and after their server is closed.
        from prometheus_client import Metric

        for family in self._metrics.families():
            metric = Metric(family.name, family.help, family.kind)
            for ending, labels, value in family.samples:
                metric.add_sample(family.name + ending, labels, value)
            yield metric
