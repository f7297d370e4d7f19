"""What start-up is doing, and how long each thing took, on standard error."""

import contextlib
import sys
import time
from collections.abc import Iterator


class Progress:
    """Prints one line a step; silent if `shown` is False."""

    def __init__(self, shown: bool):
        self._shown = shown

    @contextlib.contextmanager
    def step(self, doing: str) -> Iterator[None]:
        """Announce `doing`, and its duration once done."""
        live = self._shown and sys.stderr.isatty()
        if live:
            print(f"rollout_server: {doing} ...", end="", file=sys.stderr, flush=True)
        started = time.monotonic()
        try:
            yield
        except BaseException:
            if live:
                print(file=sys.stderr)
            raise
        if self._shown:
            took = f"rollout_server: {doing}: {time.monotonic() - started:.1f} s"
            print(f"\r{took}   " if live else took, file=sys.stderr, flush=True)

    def say(self, text: str) -> None:
        if self._shown:
            print(f"rollout_server: {text}", file=sys.stderr, flush=True)
