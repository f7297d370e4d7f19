"""`server.report()`: what to send with a bug report."""

import dataclasses
import datetime
import json
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from rollout_server import machine
from rollout_server.redact import scrubbed

if TYPE_CHECKING:
    from rollout_server.server import RolloutServer


class Report(dict):
    """By section: a dict of what JSON can hold; as text, to be read and pasted."""

    def __str__(self) -> str:
        lines = ["rollout_server report"]
        for section, told in self.items():
            lines += ["", f"== {section}"]
            lines += _lines(told)
        return "\n".join(lines) + "\n"

    __repr__ = __str__


def report(server: "RolloutServer") -> Report:
    """Everything that is known of a server, without secrets. A section that can't be told says
    why; nothing is raised."""
    return Report({name: _told(section, server) for name, section in _SECTIONS.items()})


def _told(section: Callable[["RolloutServer"], Any], server: "RolloutServer") -> Any:
    try:
        return scrubbed(section(server))
    except Exception as error:
        return scrubbed(f"can't be told: {type(error).__name__}: {error}")


def _server(server: "RolloutServer") -> dict[str, Any]:
    return {
        "time": _moment(datetime.datetime.now().timestamp()),
        "state": server.state,
        "why": server._box.why,
        "policy_version": server.policy_version,
        "base_urls": server.base_urls,
        "rank": f"{server._ranks.rank} of {server._ranks.size}",
        "engine_pid": server.engine_pid,
    }


def _config(server: "RolloutServer") -> dict[str, Any]:
    config = server._config
    told = {f.name: getattr(config, f.name) for f in dataclasses.fields(config)}
    return told | {"sampling": server._sampling}


def _model(server: "RolloutServer") -> dict[str, Any]:
    policy = server._policy
    model = policy.model()
    return {
        "class": type(model).__name__,
        "architecture": type(policy.bare).__name__,
        "dtype": policy.dtype,
        "device": str(next(model.parameters()).device),
        "parameters": sum(p.numel() for p in model.parameters()),
        "max_model_len": server.max_model_len,
    }


def _last_sync(server: "RolloutServer") -> Any:
    last = server._journal.last_sync
    return None if last is None else dataclasses.asdict(last)


def _events(server: "RolloutServer") -> list[str]:
    return [_event(e) for e in list(server._journal.events)]


def _failures(server: "RolloutServer") -> list[str]:
    return [_event(e) for e in list(server._journal.failures)]


_SECTIONS: dict[str, Callable[["RolloutServer"], Any]] = {
    "versions": lambda server: machine.versions(),
    "machine": lambda server: machine.hardware(),
    "server": _server,
    "config": _config,
    "model": _model,
    "memory": lambda server: server.memory(),
    "last sync": _last_sync,
    "metrics": lambda server: server.metrics(),
    "events": _events,
    "failed requests": _failures,
    "engine log": lambda server: server._engine_log().splitlines(),
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
