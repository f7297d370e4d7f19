"""A short fuzz of every route; `make soak` runs a long one."""

import pytest
from fuzzing import fuzz, require_answering
from surface import explore

pytestmark = pytest.mark.slow


def test_nothing_that_is_sent_is_answered_with_a_failure(server):
    counts = fuzz(server, cases=400, number=0)
    assert sum(counts.values()) >= 300
    assert counts[200] > 20 and counts[400] > 100, counts  # both halves are tried


def test_the_surface_that_the_app_describes(server):
    counts = explore(server, cases=150)
    assert counts[200] > 20 and counts[400] > 20, counts
    require_answering(server)
