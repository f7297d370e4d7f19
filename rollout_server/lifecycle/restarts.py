"""How often a dead engine may be restarted, and how long to wait before it."""

import time
from collections import deque
from collections.abc import Callable

from rollout_server.config import LONGEST_BACKOFF
from rollout_server.errors import EngineDeadError

_WINDOW = 3600.0  # seconds


class Restarts:
    """The tries of the last hour. count: of those that succeeded, since the beginning."""

    def __init__(self, limit: int, clock: Callable[[], float] = time.monotonic):
        self.limit = limit
        self.count = 0
        self._clock = clock
        self._tries: deque[float] = deque()
        self._failed = 0

    @property
    def left(self) -> bool:
        """Whether there is another try."""
        while self._tries and self._tries[0] < self._clock() - _WINDOW:
            self._tries.popleft()
        return len(self._tries) < self.limit

    def delay(self) -> float:
        """Take a try: seconds to wait before it, which double with each one that failed in a row.

        Raises `EngineDeadError` where none is left.
        """
        if not self.left:
            raise EngineDeadError(
                f"the engine has died, and max_restarts={self.limit} an hour are used up; look at "
                "its log, close() the server and attach() again"
            )
        self._tries.append(self._clock())
        return min(LONGEST_BACKOFF, 2.0 ** (self._failed - 1)) if self._failed else 0.0

    def failed(self) -> None:
        self._failed += 1

    def succeeded(self) -> None:
        self._failed = 0
        self.count += 1
