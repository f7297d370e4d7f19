"""`server.report()`: what to send with a bug report."""

import dataclasses
import datetime
import json
from collections.abc import Callable, Mapping
from typing import Any, Protocol

from rollout_server.observability import machine
from rollout_server.observability.events import Journal
from rollout_server.observability.redact import scrubbed
from rollout_server.ranks import Ranks
from rollout_server.weights.policy import Policy


class Report(dict[str, Any]):
    """By section: a dict of what JSON can hold; as text, to be read and pasted."""

    def __str__(self) -> str:
        lines = ["rollout_server report"]
        for section, told in self.items():
            lines += ["", f"== {section}"]
            lines += _lines(told)
        return "\n".join(lines) + "\n"

    __repr__ = __str__


class Reported(Protocol):
    """What a server tells of itself."""

    @property
    def state(self) -> str: ...

    @property
    def policy_version(self) -> int: ...

    @property
    def base_urls(self) -> list[str]: ...

    @property
    def engine_pid(self) -> int: ...

    @property
    def max_model_len(self) -> int: ...

    def memory(self) -> dict[str, int]: ...


def server_report(
    server: Reported,
    why: str,
    ranks: Ranks,
    config: Mapping[str, Any],
    policy: Policy,
    log: Callable[[], str],
    journal: Journal,
) -> Report:
    """Of one server; why: it is broken; log: gives the end of its engine's."""
    rank = f"{ranks.rank} of {ranks.size}"
    return report(
        {
            "versions": machine.versions,
            "machine": machine.hardware,
            "server": lambda: {"time": now(), "state": server.state, "why": why, "rank": rank},
            "engine": lambda: {
                "policy_version": server.policy_version,
                "base_urls": server.base_urls,
                "pid": server.engine_pid,
                "max_model_len": server.max_model_len,
            },
            "config": lambda: config,
            "model": lambda: of_model(policy),
            "memory": server.memory,
            "engine log": lambda: log().splitlines(),
        }
        | of_journal(journal)
    )


def report(sections: Mapping[str, Callable[[], Any]]) -> Report:
    """What each section tells, without secrets. One that can't be told says why; nothing is
    raised."""
    return Report({name: _told(section) for name, section in sections.items()})


def _told(section: Callable[[], Any]) -> Any:
    try:
        return scrubbed(section())
    except Exception as error:
        return scrubbed(f"can't be told: {type(error).__name__}: {error}")


def now() -> str:
    return _moment(datetime.datetime.now().timestamp())


def of_model(policy: Policy) -> dict[str, Any]:
    """What a policy is."""
    model = policy.model()
    return {
        "class": type(model).__name__,
        "architecture": type(policy.bare).__name__,
        "dtype": policy.dtype,
        "device": str(next(model.parameters()).device),
        "parameters": sum(p.numel() for p in model.parameters()),
    }


def of_journal(journal: Journal) -> dict[str, Callable[[], Any]]:
    """The sections that a journal tells."""
    return {
        "last sync": lambda: journal.last_sync and dataclasses.asdict(journal.last_sync),
        "metrics": journal.metrics.values,
        "events": lambda: [_event(e) for e in list(journal.events)],
        "failed requests": lambda: [_event(e) for e in list(journal.failures)],
    }


def _event(event: dict[str, Any]) -> str:
    rest = {name: value for name, value in event.items() if name != "time"}
    return f"{_moment(event['time'])} {' '.join(f'{k}={v}' for k, v in rest.items())}"


def _moment(seconds: float) -> str:
    moment = datetime.datetime.fromtimestamp(seconds, datetime.UTC)
    return moment.isoformat(timespec="milliseconds")


def _lines(told: Any) -> list[str]:
    if isinstance(told, dict):
        shown = {
            k: v if isinstance(v, str) else json.dumps(v, default=str) for k, v in told.items()
        }
        return [f"{name}: {value}" for name, value in shown.items()]
    if isinstance(told, list):
        return [str(line) for line in told] or ["none"]
    return [str(told)]
