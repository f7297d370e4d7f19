"""Counting, without an engine."""

import re
import threading

import pytest
from support import PREFIX

from rollout_server.errors import StateError
from rollout_server.lifecycle.gate import Gate, GateTimeout
from rollout_server.observability.metrics import COUNTERS, GAUGES, HISTOGRAMS, Metrics


def test_names_follow_prometheuss_conventions():
    for name in (*COUNTERS, *HISTOGRAMS, *GAUGES):
        assert re.fullmatch(r"[a-z]+(_[a-z]+)*", name)
        assert not name.endswith(("_total", "_count", "_sum", "_bucket", "_info"))
    assert all(name.endswith("_seconds") for name in HISTOGRAMS)


def test_what_is_counted_can_be_read():
    metrics = Metrics()
    metrics.count("sync_bytes", 10, path="plan")
    metrics.count("sync_bytes", 5, path="plan")
    metrics.count("sync_bytes", 1, path="share")
    for seconds in (0.002, 0.2, 5000.0):
        metrics.observe("sleep_seconds", seconds)
    metrics.read("state", lambda: {"awake": True, "asleep": False})
    metrics.read("http_connections", lambda: 1 / 0)
    told = metrics.values()
    assert told[PREFIX + 'sync_bytes_total{path="plan"}'] == 15
    assert told[PREFIX + 'sync_bytes_total{path="share"}'] == 1
    assert told[PREFIX + "sync_failures_total"] == 0, "there from the start, for rate()"
    assert told[PREFIX + "sleep_seconds_count"] == 3
    assert told[PREFIX + "sleep_seconds_sum"] == pytest.approx(5000.202)
    assert told[PREFIX + 'state{state="awake"}'] == 1
    assert told[PREFIX + 'state{state="asleep"}'] == 0
    assert PREFIX + "http_connections" not in told, "its owner can't tell"
    (family,) = [f for f in metrics.families() if f.name.endswith("sleep_seconds")]
    buckets = [value for ending, _, value in family.samples if ending == "_bucket"]
    assert buckets == sorted(buckets) and (buckets[0], buckets[-2:]) == (1, [2, 3])


def test_an_unknown_name_or_label_is_a_mistake():
    metrics = Metrics()
    for wrong in (
        lambda: metrics.count("no_such"),
        lambda: metrics.observe("no_such", 1),
        lambda: metrics.set("no_such", 1),
        lambda: metrics.read("no_such", int),
        lambda: metrics.count("sync_bytes"),
        lambda: metrics.count("engine_restarts", by="x"),
    ):
        with pytest.raises((KeyError, ValueError)):
            wrong()


def test_threads_lose_no_counts():
    metrics = Metrics()

    def work():
        for _ in range(5000):
            metrics.count("session_calls")
            metrics.observe("wake_seconds", 0.5)

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    told = metrics.values()
    assert told[PREFIX + "session_calls_total"] == told[PREFIX + "wake_seconds_count"] == 40000


async def test_the_gate_counts_who_waits_and_who_is_refused():
    metrics = Metrics()
    gate = Gate(0.05, metrics)
    with pytest.raises(GateTimeout):
        await gate.passage()
    gate.open()
    await gate.passage()
    gate.shut("broken")
    with pytest.raises(StateError):
        await gate.passage()
    told = metrics.values()
    assert told[PREFIX + 'gate_refused_requests_total{reason="timeout"}'] == 1
    assert told[PREFIX + 'gate_refused_requests_total{reason="shut"}'] == 1
    assert told[PREFIX + "gate_held_seconds_count"] == 1
    assert 0.05 <= told[PREFIX + "gate_held_seconds_sum"] < 5
