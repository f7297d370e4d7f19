"""The fuzz of tests/http/test_fuzz.py for longer; ROLLOUT_FUZZ_CASES says how long."""

import os
import time

import pytest
from fuzzing import fuzz, require_answering
from surface import explore

CASES = int(os.environ.get("ROLLOUT_FUZZ_CASES", "10000"))
NUMBER = int(os.environ.get("ROLLOUT_FUZZ_SEED", "1"))


@pytest.mark.timeout(600 + CASES)
def test_nothing_that_is_sent_is_answered_with_a_failure(server):
    started = time.perf_counter()
    counts = fuzz(server, CASES, NUMBER)
    tell(counts, started)
    assert sum(counts.values()) >= CASES * 0.9


@pytest.mark.timeout(600 + CASES)
def test_the_surface_that_the_app_describes(server):
    started = time.perf_counter()
    counts = explore(server, CASES, NUMBER)
    tell(counts, started)
    assert sum(counts.values()) >= CASES * 0.9
    require_answering(server)


def tell(counts, started):
    seconds = time.perf_counter() - started
    told = ", ".join(f"{counts[status]} x {status}" for status in sorted(counts))
    print(f"\n{sum(counts.values())} requests in {seconds:.0f} s: {told}")
