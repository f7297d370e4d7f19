"""Engines that die or hang, and what becomes of requests."""

import asyncio
import os
import re
import signal
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from types import SimpleNamespace

import httpx
import openai
import psutil
import pytest
import torch
from conversations import goes_on
from inside import restarts
from support import MIB, eventually, greedy, held, large_step
from transformers import AutoModelForCausalLM

from rollout_server import attach
from rollout_server.concurrency.loop import LoopThread
from rollout_server.errors import EngineDeadError, StateError
from rollout_server.lifecycle import watchdog as watch
from rollout_server.lifecycle.restarts import Restarts

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]
LONG = {"temperature": 0, "max_tokens": 200, "ignore_eos": True}
PENALTY = {"frequency_penalty": 0.5}
GRAMMAR = "[ab]{150}"
PROMPT = [21, 22, 23]


@pytest.fixture(scope="module")
def policy(tiny_folder):
    return AutoModelForCausalLM.from_pretrained(tiny_folder, dtype=torch.float32)


@pytest.fixture(scope="module")
def mortals(policy, tokenizer):
    """The server for the next test: the last one's, as long as it can be restarted."""
    servers = []

    def give():
        if servers and (servers[-1].state != "awake" or not restarts(servers[-1]).left):
            servers.pop().close()
        if not servers:
            servers.append(
                attach(
                    policy,
                    tokenizer,
                    kv_cache_memory_bytes=128 * MIB,
                    hold_timeout=300,
                    liveness_timeout=4,
                    max_restarts=3,
                    progress=False,
                )
            )
        return servers[-1]

    yield give
    for server in servers:
        server.close()


@pytest.fixture
def mortal(mortals):
    return mortals()


def kill(server, how=signal.SIGKILL):
    os.kill(server.engine_pid, how)


def wait_for(server, *states):
    eventually(lambda: server.state in states, within=120)


def streamed(server, running):
    """A streamed completion's ids and text; `running` is set once it is under way."""
    ids, text = [], ""
    with server.openai() as client:
        events = client.completions.create(
            model="policy",
            prompt=PROMPT,
            stream=True,
            max_tokens=200,
            temperature=0,
            extra_body={"ignore_eos": True, "return_token_ids": True},
        )
        for event in events:
            for choice in event.choices:
                ids, text = ids + (choice.token_ids or []), text + choice.text
            if len(ids) > 5:
                running.set()
    return ids, text


def penalised(server, running):
    """A streamed completion whose distribution depends on what was sampled before."""
    with server.openai() as client:
        for _ in client.completions.create(
            model="policy",
            prompt=PROMPT,
            stream=True,
            max_tokens=200,
            presence_penalty=0.5,
            extra_body={"ignore_eos": True},
        ):
            running.set()


def ask(server, tokens=2):
    """The answer to a completion request."""
    asked = {"model": "policy", "prompt": PROMPT, "max_tokens": tokens, "ignore_eos": True}
    headers = {"authorization": f"Bearer {server.api_key}"}
    return httpx.post(f"{server.base_url}/completions", json=asked, headers=headers, timeout=200)


def by_grammar(server):
    """A chat answer whose grammar is a regular expression."""
    with server.openai() as client:
        answer = client.chat.completions.create(
            model="policy",
            messages=[{"role": "user", "content": "Letters?"}],
            max_tokens=400,
            extra_body={"structured_outputs": {"regex": GRAMMAR}},
        )
    return answer.choices[0].message.content


def converse(session):
    """Two turns, the first of them long."""
    messages = []
    with session.openai() as client:
        for tokens in (150, 4):
            messages.append({"role": "user", "content": "Go on."})
            answer = client.chat.completions.create(
                model="policy",
                messages=messages,
                max_tokens=tokens,
                extra_body={"ignore_eos": True},
            )
            messages.append({"role": "assistant", "content": answer.choices[0].message.content})


def test_requests_go_on_when_the_engine_dies(mortal, policy):
    (whole,) = mortal.generate(PROMPT, LONG)
    (other,) = mortal.generate(PROMPT, LONG | PENALTY)
    version, pid, running = mortal.policy_version, mortal.engine_pid, threading.Event()
    before, so_far = mortal.metrics(), len(mortal.report()["events"])
    with ThreadPoolExecutor(8) as pool, mortal.session() as session:
        stream = pool.submit(streamed, mortal, running)
        direct = pool.submit(mortal.generate, PROMPT, LONG)
        several = pool.submit(mortal.generate, PROMPT, LONG | {"n": 2, "temperature": 1})
        counting = pool.submit(mortal.generate, PROMPT, LONG | PENALTY)
        cut = pool.submit(penalised, mortal, cut_runs := threading.Event())
        grammar = pool.submit(by_grammar, mortal)
        conversation = pool.submit(converse, session)
        assert running.wait(60) and cut_runs.wait(60)
        kill(mortal)
        died = time.monotonic()
        wait_for(mortal, "down", "waking", "syncing")
        noticed = time.monotonic() - died
        late = pool.submit(greedy, mortal, PROMPT)  # waits for the next engine
        assert stream.result(200) == (whole.ids, whole.text)
        (completion,) = direct.result(200)
        assert completion.ids == whole.ids and completion.finish_reason == "length"
        assert torch.allclose(
            torch.tensor(completion.logprobs), torch.tensor(whole.logprobs), atol=1e-3
        )
        assert completion.versions == [(version, 0, 200)]
        assert [(len(c.ids), len(c.logprobs)) for c in several.result(200)] == [(200, 200)] * 2
        assert counting.result(200)[0].ids == other.ids != whole.ids
        with pytest.raises(openai.APIError, match="can't go on with presence_penalty"):
            cut.result(200)
        assert re.fullmatch(GRAMMAR, grammar.result(200))
        assert late.result(200).ids == whole.ids[:12]
        conversation.result(200)
        assert goes_on(session)
    assert noticed < 2
    assert mortal.state == "awake" and mortal.engine_pid != pid
    assert mortal.policy_version == version, "the weights are the same"
    mortal.verify_weights()
    told = mortal.metrics()
    restarted = "rollout_server_engine_restarts_total"
    assert told[restarted] - before[restarted] == 1
    interrupted = 'rollout_server_interrupted_generations_total{by="restart"}'
    assert told[interrupted] - before.get(interrupted, 0) >= 1
    events = "\n".join(mortal.report()["events"][so_far:])
    assert "event=engine_died " in events and "event=engine_restarted " in events


def test_one_that_dies_asleep_is_started_when_it_is_to_wake(mortal, policy):
    mortal.sleep()
    so_far, pid = restarts(mortal).count, mortal.engine_pid
    kill(mortal)
    with ThreadPoolExecutor(1) as pool:
        late = pool.submit(ask, mortal)
        eventually(lambda: held(mortal) == 1 and not psutil.pid_exists(pid))
        time.sleep(2 * watch._PERIOD)  # it has been looked at since: nothing is to happen
        assert mortal.state == "asleep" and not late.done()
        assert restarts(mortal).count == so_far
        large_step(policy, PROMPT, seed=3)
        mortal.wake()
        assert late.result(60).status_code == 200
    assert restarts(mortal).count == so_far + 1
    mortal.verify_weights()


def test_one_that_hangs_is_ended(mortal, monkeypatch):
    monkeypatch.setenv("LOCAL_RANK", "0")  # a trainer's that goes on meanwhile
    version, seen, over = mortal.policy_version, set(), threading.Event()

    def look():
        while not over.wait(0.005):
            seen.add((os.environ.get("LOCAL_RANK"), os.environ.get("TMPDIR")))

    looking = threading.Thread(target=look)
    looking.start()
    kill(mortal, signal.SIGSTOP)
    (completion,) = mortal.generate(PROMPT, {"max_tokens": 4, "ignore_eos": True})
    over.set()
    looking.join()
    assert completion.versions == [(version, 0, 4)] and mortal.state == "awake"
    assert seen == {("0", os.environ.get("TMPDIR"))}


def test_when_the_restarts_are_used_up_all_are_told(mortal):
    while restarts(mortal).left:
        restarts(mortal).delay()
    with ThreadPoolExecutor(4) as pool:
        running = threading.Event()
        stream = pool.submit(streamed, mortal, running)
        direct = pool.submit(mortal.generate, PROMPT, LONG)
        asked = pool.submit(ask, mortal, tokens=200)
        assert running.wait(60)
        kill(mortal)
        with pytest.raises(EngineDeadError):
            direct.result(10)
        with pytest.raises(openai.APIError, match="engine"):
            stream.result(10)
        assert asked.result(10).status_code == 503
        assert "engine" in asked.result().json()["error"]["message"]
    assert mortal.state == "broken"
    assert ask(mortal).status_code == 503
    for call in (mortal.sync_weights, mortal.sleep, lambda: mortal.generate(PROMPT)):
        with pytest.raises(StateError, match="broken"):
            call()


def test_a_request_that_may_be_the_cause_is_given_up():
    from vllm.sampling_params import RequestOutputKind, SamplingParams

    from rollout_server.engine.client import _refusal

    ids = []
    kind = RequestOutputKind.DELTA
    state = SimpleNamespace(detokenizer=SimpleNamespace(output_token_ids=ids), output_kind=kind)
    request = SimpleNamespace(sampling_params=SamplingParams())

    def dies(while_it_had_it=True):
        state.had_by_core = while_it_had_it
        return _refusal(state, request, 3)

    assert [dies(), dies(), dies(while_it_had_it=False)] == [None] * 3
    ids.append(5)  # it goes on: not the cause
    assert [dies(), dies()] == [None] * 2
    assert "died 3 times" in dies()


def test_closed_in_the_middle_of_a_sync(tiny, tokenizer):
    server = attach(tiny, tokenizer, kv_cache_memory_bytes=64 * MIB, max_restarts=0, progress=False)
    with ThreadPoolExecutor(3) as pool:
        kill(server, signal.SIGSTOP)
        sync = pool.submit(server.sync_weights)
        wait_for(server, "closing_gate", "syncing")
        late = pool.submit(ask, server)
        eventually(lambda: held(server) == 1)
        started = time.monotonic()
        server.close()
        assert time.monotonic() - started < 20
        with pytest.raises(StateError, match="closed"):
            sync.result(5)
        with pytest.raises(httpx.TransportError) if late.exception(5) else nullcontext():
            assert late.result().status_code == 503
    server.close()
    assert server.state == "closed"


def test_who_waits_for_a_loop_that_stops_is_told():
    loop = LoopThread()
    with ThreadPoolExecutor(1) as pool:
        begun = threading.Event()

        async def wait():
            begun.set()
            await asyncio.sleep(60)

        waiting = pool.submit(loop.call, wait(), 60, "waiting")
        assert begun.wait(5) and loop.stop(5)
        with pytest.raises(StateError, match="waiting: the server was closed"):
            waiting.result(5)


def test_the_restarts_of_the_last_hour_count():
    now = 0.0
    restarts = Restarts(3, clock=lambda: now)
    assert restarts.delay() == 0
    restarts.failed()
    assert restarts.delay() == 1
    restarts.failed()
    assert restarts.delay() == 2
    restarts.succeeded()
    assert not restarts.left
    with pytest.raises(EngineDeadError, match="max_restarts=3"):
        restarts.delay()
    now = 3601.0
    assert restarts.delay() == 0 and restarts.count == 1
