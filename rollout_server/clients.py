"""Clients of a server's endpoint that are ready to use, and sessions with clients of their own."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from rollout_server.errors import NotAvailableError
from rollout_server.http.endpoint import Endpoint
from rollout_server.observability.events import Journal
from rollout_server.trajectories.session import Session

if TYPE_CHECKING:
    from openai import AsyncOpenAI, OpenAI


class Clients:
    """Of one endpoint."""

    def __init__(
        self, base_url: str, api_key: str, timeout: float, endpoint: Endpoint, journal: Journal
    ):
        """timeout: seconds that a client waits for an answer."""
        self._options: dict[str, Any] = {
            "base_url": base_url,
            "api_key": api_key,
            "timeout": timeout,
        }
        self._base_url = base_url
        self._endpoint = endpoint
        self._journal = journal

    def openai(self, **options: Any) -> "OpenAI":
        import openai

        return openai.OpenAI(**(self._options | options))

    def async_openai(self, **options: Any) -> "AsyncOpenAI":
        import openai

        return openai.AsyncOpenAI(**(self._options | options))

    def session(
        self, on_sync: str, unmasked_logprobs: bool, metadata: Mapping[str, Any]
    ) -> Session:
        """A new one, which the endpoint knows from now on."""
        if not self._endpoint.is_open:
            raise NotAvailableError(
                "this rank's engine is served by its group's first rank; call session() there"
            )
        clients = self.openai, self.async_openai
        forget = self._endpoint.sessions.remove
        session = Session(self._base_url, clients, forget, metadata, self._journal.call_recorded)
        session.on_sync, session.unmasked_logprobs = on_sync, unmasked_logprobs
        self._endpoint.sessions.add(session)
        return session
