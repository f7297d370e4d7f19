"""What a sync or a sleep does to a running generation, as its request asks."""

import contextlib
import dataclasses

import httpx
import inside
import openai
import pytest
from conversations import TOKENS, Asking
from support import greedy, large_step, running

from rollout_server.errors import ConfigError, DeadlineError

ROUTES = {
    "/chat/completions": {"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 2},
    "/completions": {"prompt": "Hi", "max_tokens": 2},
    "/responses": {"input": "Hi", "max_output_tokens": 2},
    "/messages": {"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 2},
    "/generate": {"input_ids": [21, 22], "sampling_params": {"max_new_tokens": 2}},
}


def test_continued_from_its_own_tokens(server, shared_model):
    before = server.policy_version
    large_step(shared_model, [1], seed=1)
    with Asking(server) as asked, Asking(server, on_sync="continue") as named:
        server.sync_weights()
    for request in (asked, named):
        (old, start, middle), (new, again, end) = request.versions
        assert (old, start, again, end) == (before, 0, middle, TOKENS)
        assert new == before + 1 and 0 < middle < TOKENS


@pytest.mark.parametrize("by", ["body", "session"])
@pytest.mark.parametrize("sleeps", [False, True], ids=["sync", "sleep"])
def test_restarted_it_is_one_versions(server, shared_model, by, sleeps):
    session = server.session(**({"on_sync": "restart"} if by == "session" else {}))
    fields = {"on_sync": "restart"} if by == "body" else {}
    old = greedy(server, [1, 2, 3]).ids
    large_step(shared_model, [1], seed=2)
    with session, Asking(server, session, **fields) as asked:
        if sleeps:
            server.sleep()
        new = server.sync_weights().version
    assert asked.versions == [(new, 0, TOKENS)]
    assert asked.ids == greedy(server, asked.prompt_ids, TOKENS).ids
    assert old != greedy(server, [1, 2, 3]).ids
    (call,) = session.tree.calls
    assert call.ids == asked.ids and [tuple(v) for v in call.versions] == asked.versions
    assert not running(server)


def test_restarted_as_often_as_weights_change(server):
    with Asking(server, on_sync="restart", n=2, temperature=1) as asked:
        for _ in range(2):
            new = server.sync_weights().version
    both = asked.answer.model_dump()["policy_versions"]
    assert both == [[{"version": new, "start": 0, "end": TOKENS}]] * 2


def test_a_sync_waits_for_one_that_finishes(server):
    with Asking(server, on_sync="finish") as asked:
        new = server.sync_weights().version
    assert asked.versions == [(new - 1, 0, TOKENS)]


def test_a_sleep_waits_for_one_that_finishes(server):
    with server.session(on_sync="finish") as session, Asking(server, session) as asked:
        server.sleep()
        asked.join(10)
        assert len(asked.ids) == TOKENS and server.state == "asleep"
        server.wake()


def test_one_that_finishes_too_late_leaves_the_server_awake(server, monkeypatch):
    config = dataclasses.replace(inside.config(server), drain_timeout=0.05)
    monkeypatch.setattr(inside.steps(server), "config", config)
    version = server.policy_version
    with Asking(server, on_sync="finish", tokens=300) as asked:
        for transition in (server.sleep, server.sync_weights):
            with pytest.raises(DeadlineError, match=r"running requests finish.*0\.05 s"):
                transition()
            assert server.state == "awake" and server.policy_version == version
        assert asked.is_alive()
        assert len(greedy(server, [1, 2, 3]).ids) == 12
    assert asked.versions == [(version, 0, 300)]


@pytest.mark.parametrize("path", ROUTES)
def test_all_routes_take_it(server, path):
    root = server.base_url.removesuffix("/v1") if path == "/generate" else server.base_url
    headers = {"authorization": f"Bearer {server.api_key}"}
    with httpx.Client(headers=headers, timeout=60) as client:
        asked = {"model": "policy"} | ROUTES[path]
        for value in ("continue", "restart", "finish", None):
            answer = client.post(root + path, json=asked | {"on_sync": value})
            assert answer.status_code == 200, answer.text
        stream = asked | {"on_sync": "finish", "stream": True}
        assert client.post(root + path, json=stream).status_code == 200
        for bad in ("resume", 5, True, ["finish"]):
            answer = client.post(root + path, json=asked | {"on_sync": bad})
            assert answer.status_code == 400
            message = answer.json()["error"]["message"]
            assert f"on_sync={bad!r}: give one of 'continue', 'restart', 'finish'" in message
        answer = client.post(root + path, json=asked | {"on_sync": "restart", "stream": True})
        assert answer.status_code == 400
        assert "on_sync='restart' with stream=true" in answer.json()["error"]["message"]


def test_a_session_takes_what_there_is(server):
    for bad in ({"on_sync": "resume"}, {"unmasked_logprobs": 1}):
        with pytest.raises(ConfigError, match=next(iter(bad))):
            server.session(**bad)
    with server.session(on_sync="restart") as session, session.openai() as client:
        asked = dict(model="policy", messages=[{"role": "user", "content": "Hi"}], max_tokens=2)
        with pytest.raises(openai.BadRequestError, match="with stream=true"):
            client.chat.completions.create(**asked, stream=True)
        with contextlib.closing(
            client.chat.completions.create(**asked, stream=True, extra_body={"on_sync": "finish"})
        ) as events:
            assert list(events)
        assert session.metadata == {}
