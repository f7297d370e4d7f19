"""How full the KV cache was, from vLLM's own statistics."""

from collections.abc import Callable
from typing import Any


class PeakUsage:
    """The highest share (0 to 1) of the KV cache in use since it was last taken; `reports`: how
    often the engine has told of it."""

    def __init__(self) -> None:
        self.reports = 0
        self._peak = 0.0

    def see(self, usage: float) -> None:
        self.reports += 1
        self._peak = max(self._peak, usage)

    def take(self) -> float:
        peak, self._peak = self._peak, 0.0
        return peak


def stat_logger(peak: PeakUsage) -> Callable[..., Any]:
    """A factory for vLLM's `stat_loggers`, feeding `peak`."""
    from vllm.v1.metrics.loggers import StatLoggerBase

    class UsageLogger(StatLoggerBase):
        def __init__(self, vllm_config: Any, engine_index: int = 0):
            pass

        def record(
            self,
            scheduler_stats: Any,
            iteration_stats: Any,
            mm_cache_stats: Any = None,
            engine_idx: int = 0,
        ) -> None:
            if scheduler_stats is not None:
                peak.see(getattr(scheduler_stats, "kv_cache_usage", 0.0))

        def log_engine_initialized(self) -> None:
            pass

    return UsageLogger
