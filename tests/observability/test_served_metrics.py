"""The page /metrics, and what a server counts."""

import os
import subprocess
import sys
import textwrap
import threading
import time

import httpx
import pytest
import torch
from over_http import COMPLETION, MESSAGES, get, post, root
from prometheus_client.openmetrics.parser import text_string_to_metric_families as openmetrics
from prometheus_client.parser import text_string_to_metric_families as prometheus
from support import PREFIX

from rollout_server.errors import WeightSyncError


def scrape(server, **headers):
    answer = get(server, "/metrics", **headers)
    assert answer.status_code == 200
    return answer


class Change:
    """How much each of a server's metrics has grown."""

    def __init__(self, server):
        self._server, self._before = server, server.metrics()

    def __getitem__(self, name):
        now = self._server.metrics()
        return now.get(PREFIX + name, 0.0) - self._before.get(PREFIX + name, 0.0)


@pytest.mark.slow
def test_metrics_beside_vllms(server):
    post(server, "/v1/completions", json=COMPLETION)
    told = {}
    for family in prometheus(scrape(server).text):
        told |= {(s.name, *sorted(s.labels.items())): s.value for s in family.samples}
    assert any(name.startswith("vllm:") for name, *_ in told)
    assert told[PREFIX + "state", ("state", "awake")] == 1
    assert sum(v for (name, *_), v in told.items() if name == PREFIX + "state") == 1
    assert told[(PREFIX + "policy_version",)] == server.policy_version
    assert told[PREFIX + "sync_seconds_bucket", ("le", "+Inf")] >= 1
    assert told[(PREFIX + "http_connections",)] >= 1
    own = {name for name, *_ in told if name.startswith(PREFIX)}
    python = {name.partition("{")[0] for name in server.metrics()}
    assert own - {name for name in own if name.endswith("_bucket")} == python
    # As Prometheus itself asks.
    accept = "application/openmetrics-text;version=1.0.0,text/plain;q=0.5"
    answer = scrape(server, accept=accept, **{"accept-encoding": "gzip"})
    assert answer.headers["content-encoding"] == "gzip"
    assert answer.headers["content-type"].startswith("application/openmetrics-text")
    # That format's strict parser refuses two of vLLM's own names.
    lines = [x for x in answer.text.splitlines(True) if PREFIX in x or x.startswith("# EOF")]
    families = {f.name: f.type for f in openmetrics("".join(lines))}
    assert families[PREFIX + "sync_bytes"] == "counter"
    assert families[PREFIX + "sync_seconds"] == "histogram"


@pytest.mark.slow
def test_requests_are_counted_by_route_and_status(server):
    change = Change(server)
    assert post(server, "/v1/completions", json=COMPLETION).status_code == 200
    assert post(server, "/v1/completions", json=COMPLETION | {"top_p": 7}).status_code == 400
    assert post(server, "/v1/completions", key="wrong", json=COMPLETION).status_code == 401
    ok = 'http_requests_total{route="/v1/completions",status="%d"}'
    assert [change[ok % status] for status in (200, 400, 401)] == [1, 1, 1]


@pytest.mark.slow
def test_hostile_requests_make_no_new_series(server):
    post(server, "/nothing", json={})
    post(server, "/v1/completions", key="wrong", json={})
    before = set(server.metrics())
    for i in range(50):
        httpx.request(f"M{i}", f"{root(server)}/p{i}%22%7D%201%0A")
        post(server, f"/sessions/s{i}/v1/completions", key=f"k{i}", json={"model": f"m{i}"})
        post(server, f"/v1/x{i}", headers={"x-request-id": f"r{i}", "host": f"h{i}"}, json={})
    assert {name for name in set(server.metrics()) - before if 'status="4' not in name} == set()
    assert len(set(server.metrics()) - before) <= 4
    assert len(list(prometheus(scrape(server).text))) > 10, "the page can still be read"


@pytest.mark.slow
def test_what_a_step_does_is_counted(server):
    change = Change(server)
    sampling = {"temperature": 0, "max_tokens": 400, "ignore_eos": True}
    running = threading.Thread(target=lambda: server.generate([[5, 6]] * 3, sampling))
    running.start()
    deadline = time.monotonic() + 20
    while server.metrics()[PREFIX + "running_generations"] < 3 and time.monotonic() < deadline:
        time.sleep(0.002)
    server.sleep()
    told = server.metrics()
    assert (
        told[PREFIX + 'state{state="asleep"}'] == 1 and told[PREFIX + 'state{state="awake"}'] == 0
    )
    assert told[PREFIX + "running_generations"] == 3
    held = threading.Thread(target=lambda: post(server, "/v1/completions", json=COMPLETION))
    held.start()
    while server.metrics()[PREFIX + "gate_held_requests"] < 1 and time.monotonic() < deadline:
        time.sleep(0.002)
    time.sleep(0.2)
    report = server.wake()
    held.join(60)
    running.join(60)
    assert change['interrupted_generations_total{by="sleep"}'] == 3
    assert change['interrupted_generations_total{by="sync"}'] == 0
    assert change["sleep_seconds_count"] == change["wake_seconds_count"] == 1
    assert change["sync_seconds_count"] == 1
    assert change["sync_seconds_sum"] == pytest.approx(report.seconds)
    assert change["wake_seconds_sum"] == pytest.approx(report.wake_seconds)
    assert change['sync_bytes_total{path="plan"}'] == report.bytes > 0
    assert change["gate_held_seconds_count"] == 1
    assert change["gate_held_seconds_sum"] >= 0.2
    assert change["policy_version"] == 1
    assert server.metrics()[PREFIX + "running_generations"] == 0
    assert server.metrics()[PREFIX + "gate_held_requests"] == 0


@pytest.mark.slow
def test_a_sync_that_fails_and_the_mismatch_are_counted(server, shared_model):
    change, norm = Change(server), shared_model.model.norm.weight
    good = norm.detach().clone()
    with torch.no_grad():
        norm[3] = torch.nan
    with pytest.raises(WeightSyncError):
        server.sync_weights()
    with torch.no_grad():
        norm.copy_(good)
    assert change["sync_failures_total"] == 1 and change["sync_seconds_count"] == 0
    name = "logprob_mean_absolute_difference_nats"
    server.note_logprob_difference(0.25)
    server.note_logprob_difference(1.5, grammar=True)
    told = server.metrics()
    assert told[PREFIX + name + '{sampled="free"}'] == 0.25
    assert told[PREFIX + name + '{sampled="grammar"}'] == 1.5


@pytest.mark.slow
def test_sessions_are_counted(server):
    change = Change(server)
    with server.session() as session, server.session():
        for _ in range(2):
            session.openai().chat.completions.create(
                model="policy", messages=MESSAGES, max_tokens=2
            )
        assert change["sessions_open"] == 2
    session.end()
    assert change["sessions_opened_total"] == change["sessions_ended_total"] == 2
    assert change["session_calls_total"] == 2 and change["sessions_open"] == 0


@pytest.mark.slow
def test_in_prometheus_clients_multiprocess_mode_too(tmp_path):
    """vLLM then shows what all processes wrote to a folder; ours are beside it, once."""
    code = """
        import asyncio, httpx
        from prometheus_client import Counter
        from rollout_server.http.dialects.metrics import MetricsMiddleware
        from rollout_server.observability.metrics import Metrics

        Counter("other", "Of another library.").inc(3)

        async def main():
            for failures in (1, 2):  # one server, and the next
                metrics = Metrics()
                metrics.count("sync_failures", failures)
                transport = httpx.ASGITransport(app=MetricsMiddleware(None, metrics))
                async with httpx.AsyncClient(transport=transport) as client:
                    print((await client.get("http://server/metrics")).text)

        asyncio.run(main())
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        capture_output=True,
        text=True,
        env=os.environ | {"PROMETHEUS_MULTIPROC_DIR": str(tmp_path)},
    )
    lines = done.stdout.splitlines()
    assert [x for x in lines if x.startswith("other_total")] == ["other_total 3.0"] * 2, done.stderr
    assert [x for x in lines if x.startswith(PREFIX + "sync_failures_total")] == [
        PREFIX + "sync_failures_total 1.0",
        PREFIX + "sync_failures_total 2.0",
    ]
