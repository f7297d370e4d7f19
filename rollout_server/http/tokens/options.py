"""Fields of a request that are ours, which vLLM must not see.

on_sync: what becomes of the generation when weights change or the engine sleeps. "continue" freezes
it, and it goes on from its own tokens; "restart" samples it anew with the new weights; "finish" has
the sync or the sleep wait for it.

unmasked_logprobs: also tell what the model itself gives for the tokens that were sampled: without a
grammar, cut-offs or penalties, at temperature 1.
"""

from dataclasses import dataclass
from typing import Any

from rollout_server.config import ON_SYNC
from rollout_server.http.responses import BadRequest
from rollout_server.http.routes import CHAT
from rollout_server.trajectories.session import Session

_ON_SYNC, _UNMASKED = "on_sync", "unmasked_logprobs"
NAMES = (_ON_SYNC, _UNMASKED)


@dataclass(frozen=True)
class Options:
    """Of one request, or where it says nothing its session's."""

    on_sync: str = ON_SYNC[0]
    unmasked_logprobs: bool = False

    @classmethod
    def of(
        cls, path: str, request: dict[str, Any], session: Session | None, temperature: float | None
    ) -> "Options":
        """request: the JSON body; temperature: the default. Raises `BadRequest`."""
        on_sync = request.get(_ON_SYNC)
        if on_sync is None:
            on_sync = cls.on_sync if session is None else session.on_sync
        if on_sync not in ON_SYNC:
            allowed = ", ".join(map(repr, ON_SYNC))
            raise BadRequest(f"{_ON_SYNC}={on_sync!r:.60}: give one of {allowed}")
        if on_sync == "restart" and request.get("stream"):
            raise BadRequest(
                f"{_ON_SYNC}='restart' with stream=true: what was streamed can't be taken back; "
                f"send stream=false, or {_ON_SYNC}='continue' or 'finish'"
            )
        unmasked = request.get(_UNMASKED)
        if unmasked is None:
            return cls(on_sync, session is not None and session.unmasked_logprobs)
        if not isinstance(unmasked, bool):
            raise BadRequest(f"{_UNMASKED}={unmasked!r:.60}: give true or false")
        if unmasked:
            _require_unmasked(path, request, session is not None, temperature)
        return cls(on_sync, unmasked)


def _require_unmasked(
    path: str, request: dict[str, Any], recorded: bool, temperature: float | None
) -> None:
    if path != CHAT and not recorded:
        raise BadRequest(
            f"{_UNMASKED}=true: an answer of {path} has no place for them; use {CHAT}, or a "
            "session, which records them"
        )
    own = (request.get("sampling_params") or {}) if path == "/generate" else request
    given = own.get("temperature") if isinstance(own, dict) else None
    given = temperature if given is None else given
    if given not in (None, 0, 1):
        raise BadRequest(
            f"{_UNMASKED}=true with temperature={given!r:.60}: they are told at temperature 1 "
            f"alone; send temperature=1, or leave {_UNMASKED} out"
        )
