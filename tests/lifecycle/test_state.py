"""The table of states."""

import pytest

from rollout_server.errors import StateError
from rollout_server.lifecycle.state import State, StateBox


def test_a_whole_cycle():
    box = StateBox()
    for to in ("syncing", "awake", "closing_gate", "asleep", "waking", "syncing", "awake"):
        box.move(State(to))
        assert box.state == to


def test_a_step_that_is_not_in_the_table_is_refused():
    box = StateBox()
    with pytest.raises(StateError, match="starting can't become asleep"):
        box.move(State.ASLEEP)
    assert box.state == "starting"


def test_broken_and_closed_are_final():
    box = StateBox()
    box.break_("no reason")
    box.break_("another")
    with pytest.raises(StateError, match="no reason"):
        box.require_open()
    assert box.close() is True
    assert box.close() is False
    with pytest.raises(StateError, match="attach"):
        box.require_open()
    box.break_("too late")
    assert box.state == "closed"
