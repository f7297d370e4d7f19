"""Sessions that are open, each with what its conversations have taught."""

import threading
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from rollout_server.http.ending import Ending
from rollout_server.http.retries import Retries
from rollout_server.http.tokens.history import History
from rollout_server.http.tokens.parsed_messages import ParsedMessageCache
from rollout_server.http.tokens.splice import Known, Message
from rollout_server.observability.events import Journal
from rollout_server.trajectories.session import Session

_TOKEN_BYTES = 96  # an id, a float, and their places in two lists


@dataclass
class Live:
    """An open session and its conversations."""

    session: Session
    history: History = field(default_factory=History)
    accepted: ParsedMessageCache = field(default_factory=ParsedMessageCache)
    ending: Ending = field(default_factory=Ending)

    def known(self, messages: Sequence[Message], template: Any) -> Known | None:
        """The tokens of the latest answer in `messages` that was given to those before it."""
        found = self.history.find(template, messages)
        return None if found is None else Known(found[0], *self.session.tree.tokens(found[1]))

    @property
    def bytes(self) -> int:
        """About what its record takes: tokens with their log-probabilities, and messages, of which
        there are up to three forms."""
        return _TOKEN_BYTES * self.session.tree.size + 3 * self.history.size


class Sessions:
    """Those that are open. Used from any thread.

    retries: their last answers, for clients that ask again.
    """

    def __init__(
        self,
        journal: Journal | None = None,
        retry_bytes: int = 64 << 20,
        session_bytes: int = 256 << 20,
    ):
        """retry_bytes, session_bytes: see `max_retry_bytes` and `max_session_bytes` of
        `RolloutConfig`."""
        self._journal = journal or Journal()
        self.session_bytes = session_bytes
        self.retries = Retries(retry_bytes)
        self._lock = threading.Lock()
        self._by_id: dict[str, Live] = {}
        self._by_key: dict[bytes, Live] = {}

    def add(self, session: Session) -> None:
        with self._lock:
            live = Live(session)
            self._by_id[session.id] = live
            self._by_key[session.api_key.encode()] = live
        self._journal.session_opened(session.number)

    def remove(self, session: Session) -> None:
        with self._lock:
            live = self._by_id.pop(session.id, None)
            self._by_key.pop(session.api_key.encode(), None)
        if live is not None:
            live.ending.happen()
        self.retries.forget(session.id)
        self._journal.session_ended(session.number, len(session.tree.calls))

    def of_url(self, name: str) -> Live | None:
        return self._by_id.get(name)

    def of_key(self, key: bytes) -> Live | None:
        # Found by hash: what a wrong key's bytes have in common with a right one's isn't told.
        return self._by_key.get(key)

    def __len__(self) -> int:
        return len(self._by_id)
