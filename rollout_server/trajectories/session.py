"""One rollout of an agent: its calls, as a tree of tokens, and its reward.

A session is named by its URL or by its key, so environment variables alone point an agent at it. It
is written to on the server's loop, and read from any thread.
"""

import itertools
import secrets
import threading
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, Literal

from rollout_server.config import ON_SYNC
from rollout_server.errors import ConfigError, StateError
from rollout_server.observability.redact import SESSION_ID, SESSION_KEY
from rollout_server.trajectories.export import Rollout, is_number, rows, single_row
from rollout_server.trajectories.tree import Node, TokenTree

if TYPE_CHECKING:
    from openai import AsyncOpenAI, OpenAI

_Clients = tuple[Callable[..., "OpenAI"], Callable[..., "AsyncOpenAI"]]
_numbers = itertools.count(1)


class Session:
    """One rollout of an agent: a URL and a key of its own, what it recorded, and its reward.

    Made by `RolloutServer.session`, ended by `end` or on the way out of a `with`.

    Attributes:
        number: what logs call it, counted in this process; `id` is part of the URL, and as secret.
        base_url: what OpenAI clients take as `base_url`; it needs no key of its own to be the
            session's.
        api_key: names the session at the server's own URL too.
        metadata: what the caller gave, such as the example that the agent works on.
        tree: what was recorded, as a tree of tokens; `trajectory` makes rows of it.
        on_sync: what a sync or a sleep does to a running request that doesn't say: "continue",
            "restart" or "finish", as in a request's body.
        unmasked_logprobs: whether to record, too, what the model gives for the sampled tokens
            without grammars, cut-offs and penalties. For a request with any of these it costs a
            second prefill; at a temperature other than 1 it isn't there.
    """

    def __init__(
        self,
        server_url: str,
        clients: _Clients,
        forget: Callable[["Session"], object],
        metadata: Mapping[str, Any],
        recorded: Callable[[], None] = lambda: None,
    ):
        """server_url: with "/v1"; clients: the server's `openai` and `async_openai`; forget: called
        with this session at its end; recorded: called with nothing after each call."""
        self.number = next(_numbers)
        self.id = SESSION_ID + secrets.token_urlsafe(18)
        self.api_key = SESSION_KEY + secrets.token_urlsafe(24)
        root = server_url.removesuffix("/v1")
        self.base_url = f"{root}/sessions/{self.id}/v1"
        self.metadata = dict(metadata)
        self.tree = TokenTree()
        self._openai, self._async_openai = clients
        self._forget = forget
        self._recorded = recorded
        self._lock = threading.Lock()
        self._reward: float | None = None
        self._components: dict[str, float] = {}
        self._ended = False
        self._on_sync = "continue"
        self._unmasked_logprobs = False

    # -- for the agent ------------------------------------------------------------------------

    @property
    def environment(self) -> dict[str, str]:
        """Environment variables that point the usual SDKs at this session."""
        root = self.base_url.removesuffix("/v1")
        return {
            "OPENAI_BASE_URL": self.base_url,
            "OPENAI_API_BASE": self.base_url,
            "OPENAI_API_KEY": self.api_key,
            "ANTHROPIC_BASE_URL": root,
            "ANTHROPIC_API_KEY": self.api_key,
        }

    def openai(self, **options: Any) -> "OpenAI":
        """A ready `openai.OpenAI` client; options are its own."""
        return self._openai(**(self._own | options))

    def async_openai(self, **options: Any) -> "AsyncOpenAI":
        """A ready `openai.AsyncOpenAI` client; options are its own."""
        return self._async_openai(**(self._own | options))

    @property
    def _own(self) -> dict[str, str]:
        return {"base_url": self.base_url, "api_key": self.api_key}

    @property
    def on_sync(self) -> str:
        """What a sync or a sleep does to a running request that doesn't say; see the class."""
        return self._on_sync

    @on_sync.setter
    def on_sync(self, value: str) -> None:
        if value not in ON_SYNC:
            allowed = ", ".join(map(repr, ON_SYNC))
            raise ConfigError(f"on_sync={value!r}: give one of {allowed}")
        self._on_sync = value

    @property
    def unmasked_logprobs(self) -> bool:
        """Whether the model's own log-probabilities are recorded too; see the class."""
        return self._unmasked_logprobs

    @unmasked_logprobs.setter
    def unmasked_logprobs(self, value: bool) -> None:
        if not isinstance(value, bool):
            raise ConfigError(f"unmasked_logprobs={value!r}: give True or False")
        self._unmasked_logprobs = value

    # -- its reward ---------------------------------------------------------------------------

    @property
    def reward(self) -> float | None:
        """The rollout's reward; None until it has one."""
        return self._reward

    @reward.setter
    def reward(self, value: float) -> None:
        self.set_reward(value)

    @property
    def components(self) -> dict[str, float]:
        """Named parts of the reward."""
        return dict(self._components)

    def set_reward(
        self, reward: float | None = None, components: Mapping[str, float] | None = None
    ) -> None:
        """Give the rollout its reward, or parts of it by name; later values replace earlier ones.

        Args:
            reward: of the whole rollout; None leaves it as it is.
            components: named parts of it, which are logged.

        Raises:
            ConfigError: a value isn't a finite number.
        """
        parts = {f"components[{name!r}]": value for name, value in (components or {}).items()}
        for name, value in {"reward": reward, **parts}.items():
            if not (value is None and name == "reward") and not is_number(value):
                raise ConfigError(f"{name}={value!r}: give a finite number")
        with self._lock:
            if reward is not None:
                self._reward = float(reward)
            self._components |= {name: float(value) for name, value in (components or {}).items()}

    # -- what came of it ----------------------------------------------------------------------

    @property
    def ended(self) -> bool:
        """Whether it takes no more calls."""
        return self._ended

    def end(self) -> None:
        """Take no more calls (they get 401), and end those that wait or run.

        What was recorded stays. It may be called any number of times.
        """
        with self._lock:
            first, self._ended = not self._ended, True
        if first:
            self._forget(self)

    def trajectory(self) -> list[Rollout]:
        """The rows to train on, one per branch of the conversation; see `export.rows`."""
        with self._lock:
            return rows(self.tree, self._reward, self._components, self.metadata)

    def rollout(self, choose: Literal["last", "most"] = "last") -> Rollout | None:
        """One row for all of it, None where nothing was sampled; see `export.single_row`."""
        with self._lock:
            row = self.tree, self._reward, self._components, self.metadata
            return single_row(*row, choose=choose)

    def __enter__(self) -> "Session":
        return self

    def __exit__(self, *_: Any) -> None:
        self.end()

    def __repr__(self) -> str:
        state = "ended" if self._ended else "open"
        return f"<Session {self.number} {state}, calls={len(self.tree.calls)}>"

    # -- the server's side --------------------------------------------------------------------

    def record(self, *args: Any, **options: Any) -> Node:
        """Keep a call; arguments are `TokenTree.add`'s."""
        with self._lock:
            if self._ended:
                raise StateError("the session has ended")
            node = self.tree.add(*args, **options)
        self._recorded()
        return node
