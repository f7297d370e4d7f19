"""What is logged, where, and that no secret is."""

import json
import logging
import re
import subprocess
import sys
import textwrap
import threading

import httpx
import pytest
import torch
from over_http import COMPLETION, MESSAGES, post

from rollout_server.errors import WeightSyncError
from rollout_server.observability import logs
from rollout_server.observability.events import Journal
from rollout_server.rollouts.agents import run_agents


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
