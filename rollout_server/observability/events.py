"""What happens to one server: counted, logged, and the last of it kept for `server.report()`."""

import contextlib
import logging
import time
from collections import deque
from collections.abc import Callable, Iterator
from typing import Any

from rollout_server.errors import first_line
from rollout_server.observability import logs
from rollout_server.observability.metrics import Metrics
from rollout_server.weights.report import SyncReport

_EVENTS, _FAILURES = 50, 20


class Journal:
    """Written to from any thread.

    metrics: the server's; last_sync: report of the last sync that went well, None before; events,
    failures: the last of the lifecycle, and the last requests answered with 500 or above, as dicts.
    """

    def __init__(self) -> None:
        self.metrics = Metrics()
        self.last_sync: SyncReport | None = None
        self.events: deque[dict[str, Any]] = deque(maxlen=_EVENTS)
        # Apart: a flood of refused requests mustn't wash away what led to it.
        self.failures: deque[dict[str, Any]] = deque(maxlen=_FAILURES)

    def happened(
        self,
        event: str,
        level: int = logging.INFO,
        logger: logging.Logger = logs.LIFECYCLE,
        **fields: Any,
    ) -> None:
        """Log something of the lifecycle, and keep it."""
        self.events.append({"time": time.time(), "event": event} | fields)
        logs.tell(logger, level, event, **fields)

    # -- weights, sleep, wake ------------------------------------------------------------------

    def sync_failed(self, error: BaseException, seconds: float) -> None:
        """A sync that was asked for has ended with `error`, after so long."""
        self.metrics.count("sync_failures")
        self._failed("sync", error, seconds)

    def synced(self, report: SyncReport) -> None:
        """A sync that was asked for went well."""
        self.last_sync = report
        self.metrics.observe("sync_seconds", report.seconds)
        self.metrics.count("sync_bytes", report.bytes, path=report.path)
        if report.wake_seconds:
            self.metrics.observe("wake_seconds", report.wake_seconds)
            self.happened("wake", policy_version=report.version, seconds=report.wake_seconds)
        self.happened(
            "sync",
            policy_version=report.version,
            path=report.path,
            bytes=report.bytes,
            seconds=report.seconds,
            verified=report.verified,
        )

    @contextlib.contextmanager
    def sleeping(self) -> Iterator[None]:
        """Around falling asleep."""
        started = time.perf_counter()
        try:
            yield
        except BaseException as error:
            self._failed("sleep", error, time.perf_counter() - started)
            raise
        seconds = time.perf_counter() - started
        self.metrics.observe("sleep_seconds", seconds)
        self.happened("sleep", seconds=seconds)

    def interrupted(self, generations: int, by: str) -> None:
        """Generations go on that were brought to rest; by: "sync" or "sleep"."""
        if generations:
            self.metrics.count("interrupted_generations", generations, by=by)

    # -- the engine ----------------------------------------------------------------------------

    # Nothing is raised to anyone for these: they are on the screen where nobody listens.

    def died(self, why: str) -> None:
        """The engine has ended, or hangs and was ended; another one will take its place."""
        self.happened("engine_died", logging.WARNING, logs.GENERAL, error=why)

    def restarted(self, seconds: float) -> None:
        """Another engine runs in its place."""
        self.metrics.count("engine_restarts")
        self.happened("engine_restarted", logging.WARNING, logs.GENERAL, seconds=seconds)

    def not_restarted(self, why: str) -> None:
        """Another engine didn't start."""
        self.happened("engine_restart_failed", logging.WARNING, logs.GENERAL, error=why)

    def broke(self, why: str) -> None:
        """The server is broken."""
        self.happened("broken", logging.ERROR, error=why)

    # -- sessions ------------------------------------------------------------------------------

    def session_opened(self, number: int) -> None:
        self.metrics.count("sessions_opened")
        logs.tell(logs.LIFECYCLE, logging.DEBUG, "session_opened", session=number)

    def session_ended(self, number: int, calls: int) -> None:
        self.metrics.count("sessions_ended")
        logs.tell(logs.LIFECYCLE, logging.DEBUG, "session_ended", session=number, calls=calls)

    def call_recorded(self) -> None:
        self.metrics.count("session_calls")

    def logprob_difference(self, nats: float, grammar: bool) -> None:
        """The trainer's log-probabilities from the engine's, per token; of tokens sampled under a
        `grammar` or freely."""
        sampled = "grammar" if grammar else "free"
        self.metrics.set("logprob_mean_absolute_difference_nats", nats, sampled=sampled)

    # -- requests ------------------------------------------------------------------------------

    def request(self, route: str, status: int, fields: Callable[[], dict[str, Any]]) -> None:
        """A request's end; fields: what else its record holds, asked only where it is wanted."""
        self.metrics.count("http_requests", route=route, status=str(status))
        level = logging.WARNING if status >= 500 else logging.INFO
        if status < 500 and not logs.REQUESTS.isEnabledFor(level):
            return
        told = {"route": route, "status": status} | fields()
        if status >= 500:
            self.failures.append({"time": time.time()} | told)
        logs.tell(logs.REQUESTS, level, "request", **told)

    def _failed(self, what: str, error: BaseException, seconds: float) -> None:
        told = f"{type(error).__name__}: {first_line(error)}"
        self.happened(f"{what}_failed", logging.WARNING, error=told, seconds=seconds)
