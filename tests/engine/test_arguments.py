"""What vLLM's engine is started with. No engine is started."""

import pkgutil

import pytest

from rollout_server.engine import arguments


@pytest.mark.parametrize("constant", ["WORKER_EXTENSION", "CPU_WORKER"])
def test_the_classes_that_the_engine_process_loads_are_where_the_strings_say(constant):
    """Nothing on this side imports rollout_server.worker, so no import shows a wrong name."""
    named = getattr(arguments, constant)
    module, _, name = named.rpartition(".")
    assert module.startswith("rollout_server.worker.")
    found = pkgutil.resolve_name(f"{module}:{name}")
    assert isinstance(found, type)
    assert (found.__module__, found.__qualname__) == (module, name)
