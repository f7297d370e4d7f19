"""Both kinds of engine have what the rest of the package asks of one, as it asks for it."""

import inspect

import pytest

from rollout_server.engine.engine import Engine
from rollout_server.engine.group import GroupEngine
from rollout_server.engine.protocol import EngineProtocol

ASKED = {name: member for name, member in vars(EngineProtocol).items() if name[0] != "_"}


def parameters(function):
    """Names, kinds and defaults; the types are the type checker's."""
    return [(p.name, p.kind, p.default) for p in inspect.signature(function).parameters.values()]


def differences(kind):
    """What a class lacks of the protocol, or has with another signature."""
    attributes = set(inspect.getattr_static(kind, "__annotations__", ()))
    lines = []
    for name, asked in ASKED.items():
        has = inspect.getattr_static(kind, name, None)
        if isinstance(asked, property):
            if not (isinstance(has, property) or (has is None and name in attributes)):
                lines.append(f"{name} isn't a property or an attribute")
        elif not inspect.isfunction(has):
            lines.append(f"{name} isn't there")
        elif inspect.iscoroutinefunction(has) != inspect.iscoroutinefunction(asked):
            lines.append(f"{name} is a coroutine function in one of them only")
        elif parameters(has) != parameters(asked):
            lines.append(f"{name}{inspect.signature(has)} isn't {name}{inspect.signature(asked)}")
    return lines


@pytest.mark.parametrize("kind", [Engine, GroupEngine])
def test_an_engine_has_what_is_asked_of_one(kind):
    assert len(ASKED) > 30
    assert differences(kind) == []


def test_what_is_missing_or_changed_is_seen():
    class Lacking(GroupEngine):
        pause = None

        def drain(self):
            """No coroutine."""

        async def write_weights(self, message, when):
            """Takes something else."""

    assert [line.split("(")[0].split()[0] for line in differences(Lacking)] == [
        "drain",
        "pause",
        "write_weights",
    ]
