"""What becomes of answers: marked, recorded, remembered, or ended with their session."""

import asyncio
import contextlib
import json
import random
import threading

import httpx
import pytest

from rollout_server.http.middleware.stack import layered
from rollout_server.http.server.limits import Limits
from rollout_server.http.sessions import Sessions
from rollout_server.http.tokens.calls import Call, Generation, GenerationRequest, Sample, current
from rollout_server.lifecycle.gate import Gate
from rollout_server.trajectories.session import Session

KEY = "key-of-the-tests"
CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"


class House:
    """An app of a test behind all layers, with one session."""

    def __init__(self, app, running=256, **options):
        self.gate, self.sessions = Gate(hold_timeout=30), Sessions(**options)
        self.metrics = self.gate.metrics
        self.gate.open()
        self.session = self.open()
        limits = Limits(running=running)
        self.app = layered(
            app, KEY, self.gate, lambda: 7, self.sessions, ["policy"], 100, {}, limits
        )

    def open(self):
        session = Session("http://server/v1", (None, None), self.sessions.remove, {})
        self.sessions.add(session)
        return session

    @contextlib.asynccontextmanager
    async def client(self, key=None):
        transport = httpx.ASGITransport(app=self.app)
        headers = {"authorization": f"Bearer {key or self.session.api_key}"}
        async with httpx.AsyncClient(
            transport=transport, base_url="http://server", headers=headers
        ) as client:
            yield client

    def at(self, name):
        """A metric's value now."""
        return self.metrics.values()[f"rollout_server_{name}"]

    async def post(self, path, body=None, key=None, **headers):
        async with self.client(key) as client:
            return await client.post(path, json=body or {}, headers=headers)

    async def get(self, path, key=None):
        async with self.client(key) as client:
            return await client.get(path)


async def start(send, kind=b"text/event-stream", status=200):
    headers = [(b"content-type", kind)]
    await send({"type": "http.response.start", "status": status, "headers": headers})


async def say(send, event, more=True, name=""):
    text = event if isinstance(event, str) else json.dumps(event)
    body = f"{name}data: {text}\n\n".encode()
    await send({"type": "http.response.body", "body": body, "more_body": more})


def events(answer):
    lines = [line[6:] for line in answer.text.split("\n") if line.startswith("data: {")]
    return [json.loads(line) for line in lines]


# -- several choices --------------------------------------------------------------------------


def sampled(*samples):
    """Samples that grow as their stream goes on, each with a version and a length of its own."""
    return {
        at: Sample([10 + at] * size, [-1.0] * size, versions=[(version, 0, size)])
        for at, (version, size) in enumerate(samples)
    }


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 0, 1)])
async def test_each_choice_of_a_stream_ends_with_its_own_tokens_and_versions(order):
    samples = sampled((7, 1), (8, 2), (9, 3))

    async def app(scope, receive, send):
        current.get().generations.append(Generation([1, 2], samples=samples))
        await start(send)
        for at in samples:
            await say(send, {"choices": [{"index": at, "delta": {"content": "x"}}]})
        for at in order:
            samples[at].finish_reason = "length"
            end = {"index": at, "delta": {"content": ""}, "finish_reason": "length"}
            await say(send, {"choices": [end]})
        await say(send, {"choices": [], "usage": {}})
        await say(send, "[DONE]", more=False)

    request = {"n": 3, "stream": True, "return_token_ids": True}
    told = events(await House(app).post(CHAT, request, KEY))
    ends = [event for event in told if event["choices"] and "finish_reason" in event["choices"][0]]
    assert [event["choices"][0]["index"] for event in ends] == list(order)
    for at, event in zip(order, ends, strict=True):
        delta, size = event["choices"][0]["delta"], at + 1
        assert delta["generation_token_ids"] == [10 + at] * size
        assert delta["prompt_token_ids"] == [1, 2]
        assert event["policy_versions"] == [[{"version": 7 + at, "start": 0, "end": size}]]
    assert ["policy_versions" in event for event in told].count(True) == 3


async def test_choices_of_several_prompts_tell_their_versions():
    prompts = [Generation([1], samples=sampled((7, 1), (8, 2))), Generation([2])]
    prompts[1].samples = sampled((9, 3), (10, 4))

    async def app(scope, receive, send):
        streams = json.loads((await receive())["body"]).get("stream")
        current.get().generations += prompts
        choices = [{"index": at, "text": "x", "finish_reason": "length"} for at in range(4)]
        for generation in prompts:
            for sample in generation.samples.values():
                sample.finish_reason = "length"
        await start(send, b"text/event-stream" if streams else b"application/json")
        if not streams:
            body = json.dumps({"choices": choices}).encode()
            await send({"type": "http.response.body", "body": body})
            return
        for choice in choices:
            await say(send, {"choices": [choice]})
        await say(send, "[DONE]", more=False)

    house, request = House(app), {"prompt": ["a", "b"], "n": 2}
    whole = (await house.post(COMPLETIONS, request, KEY)).json()["policy_versions"]
    assert [spans[0]["version"] for spans in whole] == [7, 8, 9, 10]
    told = events(await house.post(COMPLETIONS, request | {"stream": True}, KEY))
    assert [event["policy_versions"] for event in told] == [[spans] for spans in whole]


# -- what is remembered for those who ask again ------------------------------------------------


def answering(*events, kind=b"text/event-stream", status=200, finish="length"):
    """An app that tells events, the number of its call first, and counts the calls."""

    async def app(scope, receive, send):
        app.calls += 1
        current.get().generations.append(
            Generation([1], samples={0: Sample([5], [-1.0], None, [(7, 0, 1)], finish)})
        )
        await start(send, kind, status)
        for event in events:
            await say(send, event)
        await say(send, "[DONE]", more=False)

    app.calls = 0
    return app


WHOLE = {"choices": [{"index": 0, "delta": {"content": "x"}, "finish_reason": "length"}]}
ERRORS = {
    "vllm": ({"error": {"message": "no", "code": 500}}, CHAT),
    "anthropic": ({"type": "error", "error": {"type": "api_error"}}, "/v1/messages"),
    "responses": ({"type": "response.failed", "response": {"output": []}}, "/v1/responses"),
    "responses, an error": ({"type": "error", "code": "server_error"}, "/v1/responses"),
}


async def test_a_whole_stream_is_told_again_as_it_was():
    house = House(app := answering(WHOLE))
    first = await house.post(CHAT, **{"idempotency-key": "a"})
    again = await house.post(CHAT, **{"idempotency-key": "a"})
    assert (first.status_code, app.calls) == (200, 1)
    assert again.content == first.content
    for answer in (first, again):
        del answer.headers["x-request-id"]  # it is another request
    assert again.headers == first.headers
    assert len(house.session.tree.calls) == 1


@pytest.mark.parametrize("name", ERRORS)
async def test_a_stream_that_ended_in_an_error_is_not_the_answer(name):
    event, path = ERRORS[name]
    house = House(app := answering({"type": "ping"}, event))
    for _ in range(2):
        await house.post(path, **{"idempotency-key": "a"})
    assert app.calls == 2 and house.session.tree.calls == []


@pytest.mark.parametrize("finish", ["abort", "error"])
async def test_nor_is_one_that_the_engine_gave_up(finish):
    house = House(app := answering(WHOLE, finish=finish))
    for _ in range(2):
        await house.post(CHAT, **{"idempotency-key": "a"})
    assert app.calls == 2


async def test_what_is_remembered_is_bounded_in_bytes():
    text = random.Random(0).randbytes(50_000).hex()  # doesn't compress below a half

    async def app(scope, receive, send):
        app.calls += 1
        current.get().generations.append(
            Generation([1], samples={0: Sample([5], [-1.0], None, [(7, 0, 1)], "length")})
        )
        await start(send)
        size = int(dict(scope["headers"])[b"x-size"])
        for at in range(0, size, 100):
            await say(send, {"choices": [{"index": 0, "delta": {"content": text[at : at + 100]}}]})
        await say(send, WHOLE)
        await say(send, "[DONE]", more=False)

    app.calls = 0
    house = House(app, retry_bytes=150_000)
    sessions = house.sessions
    others = [house.open() for _ in range(3)]

    async def ask(name, size, key):
        return await house.post(CHAT, key=key, **{"idempotency-key": name, "x-size": str(size)})

    for number, session in enumerate(others):
        await ask("a", 100_000, session.api_key)
        assert sessions.retries.bytes <= 150_000
        assert app.calls == number + 1
    await ask("a", 100_000, others[2].api_key)
    assert app.calls == 3  # the newest is there
    await ask("a", 100_000, others[0].api_key)
    assert app.calls == 4  # the oldest isn't
    for session in others:
        session.end()
    assert sessions.retries.bytes == 0
    for at in range(40):
        await ask(f"{at}", 100, house.session.api_key)
    assert 0 < sessions.retries.bytes < 40_000  # the last 16
    text *= 10
    assert len(text) == 1_000_000
    await ask("large", 1_000_000, house.session.api_key)
    assert sessions.retries.bytes <= 150_000
    house.session.end()
    assert sessions.retries.bytes == 0


# -- what was sampled but not shown ------------------------------------------------------------


class Step:
    """What vLLM gives for a prompt; its only output has a token."""

    prompt_token_ids, finished = [1, 2], True

    def __init__(self):
        self.logprob = logprob = type("Logprob", (), {"logprob": -1.0})
        self.outputs = [
            type(
                "Output",
                (),
                {
                    "index": 0,
                    "token_ids": [5],
                    "logprobs": [{5: logprob}],
                    "finish_reason": "length",
                },
            )
        ]


async def test_a_token_that_nobody_sees_is_not_recorded():
    gate, step = Gate(hold_timeout=5), Step()

    async def steps(*_):
        yield step

    for silent, ids in ((False, [5]), (True, [])):
        call = Call(lambda: 7, gate, silent=silent)
        output_kind = type("Kind", (), {"name": "FINAL_ONLY"})
        params = type("Params", (), {"structured_outputs": None, "output_kind": output_kind})
        start = GenerationRequest(steps, None, "a", {})
        assert [s async for s in call.generate(start, {}, params)] == [step]
        sample = call.generations[0].samples[0]
        assert (sample.ids, sample.finish_reason) == (ids, "length")


async def test_versions_are_told_where_vllm_does_not_tell_them():
    """Before 0.32 it doesn't: each step's tokens are of the version of that moment."""
    version, told = 7, []

    async def steps(*_):
        nonlocal version
        for now, ids in ((7, [1]), (7, [2, 3]), (8, [4]), (9, []), (9, [5])):
            version, step = now, Step()
            step.outputs[0].token_ids = ids
            step.outputs[0].logprobs = [{i: step.logprob} for i in ids]
            step.outputs[0].finish_reason = "length" if ids == [5] else None
            yield step

    call = Call(lambda: version, Gate(hold_timeout=5))
    output_kind = type("Kind", (), {"name": "DELTA"})
    params = type("Params", (), {"structured_outputs": None, "output_kind": output_kind})
    start = GenerationRequest(steps, None, "a", {})
    async for _ in call.generate(start, {}, params):
        told.append(list(call.generations[0].samples[0].versions))
    assert told[-1] == [(7, 0, 3), (8, 3, 4), (9, 4, 5)]
    assert told[1] == [(7, 0, 3)] and told[3] == told[2]


def test_the_prompt_alone_is_told_and_recorded(server):
    with server.session() as session, session.openai() as client:
        answer = client.completions.create(
            model="policy", prompt="One two", max_tokens=0, echo=True, logprobs=1
        )
        assert answer.choices[0].text == "One two"
        assert answer.policy_versions == [[]]
    (call,) = session.tree.calls
    assert session.tree.tokens(call)[1] == [] and session.tree.tokens(call)[0]
    assert session.trajectory() == []


# -- what a session's key opens ----------------------------------------------------------------


@pytest.mark.parametrize("path", ["/metrics", "/docs", "/openapi.json", "/version"])
async def test_a_sessions_key_does_not_open_what_is_the_servers(path):
    async def app(scope, receive, send):
        await start(send, b"application/json")
        await send({"type": "http.response.body", "body": b"{}"})

    house = House(app)
    own, theirs = f"/sessions/{house.session.id}{path}", path
    for asked, key in ((theirs, None), (own, None), (own, KEY)):
        answer = await house.get(asked, key)
        assert (answer.status_code, answer.json()["error"]["type"]) == (403, "permission_error")
        assert path in answer.json()["error"]["message"]
    assert (await house.get(path, KEY)).status_code == 200


async def test_a_sessions_key_opens_an_agents_calls():
    async def app(scope, receive, send):
        await start(send, b"application/json")
        await send({"type": "http.response.body", "body": b'{"choices": [{"message": {}}]}'})

    house = House(app)
    for path in (CHAT, "/v1/messages/count_tokens", "/tokenize", "/detokenize", "/generate"):
        assert (await house.post(path)).status_code == 200
    assert (await house.post("/v1/reward", {"reward": 1.0})).json()["reward"] == 1.0
    for path in ("/v1/models", "/v1/models/policy", "/health"):
        assert (await house.get(path)).status_code == 200
    for path in ("/v1/responses/resp_1", "/v1/responses/resp_1/cancel"):
        method = house.post if path.endswith("cancel") else house.get
        assert (await method(path)).status_code == 403
    assert (await house.get("/v1/nothing")).status_code == 404
    assert (await house.get(CHAT)).status_code == 405


# -- the end of a session ----------------------------------------------------------------------


async def until(condition):
    async with asyncio.timeout(10):
        while not condition():
            await asyncio.sleep(0.005)


def endless():
    """An app that answers, as vLLM's, until its client is gone."""

    async def app(scope, receive, send):
        body = json.loads((await receive())["body"])
        app.running += 1
        try:
            if body.get("stream"):
                await start(send)
                await say(send, {"choices": []})
            while (await receive())["type"] != "http.disconnect":
                pass
        finally:
            app.running -= 1
        if not body.get("stream"):  # what vLLM's handler leads to
            await start(send, b"application/json")
            await send({"type": "http.response.body", "body": b"null"})

    app.running = 0
    return app


async def end_in_a_thread(session):
    thread = threading.Thread(target=session.end)
    thread.start()
    await asyncio.to_thread(thread.join)


async def test_a_sessions_end_ends_its_requests():
    house = House(app := endless(), running=2)
    other = house.open()
    bodies = [{"on_sync": "finish"}, {"stream": True}, {}]  # the last waits for its turn
    waiting = [asyncio.ensure_future(house.post(CHAT, body)) for body in bodies]
    await until(lambda: app.running == 2)
    theirs = asyncio.ensure_future(house.post(CHAT, key=other.api_key))
    await until(lambda: house.at("queued_requests") == 2)
    assert house.gate.to_finish == 1
    await end_in_a_thread(house.session)
    async with asyncio.timeout(10):
        told = await asyncio.gather(*waiting)
    assert [answer.status_code for answer in told] == [401, 200, 401]
    assert all("has ended" in answer.text for answer in told)
    assert events(told[1])[-1]["error"]["type"] == "authentication_error"
    await until(lambda: app.running == 1)  # the other session's turn has come
    assert house.gate.to_finish == 0
    assert (house.at("running_requests"), house.at("queued_requests")) == (1, 0)
    await end_in_a_thread(other)
    assert (await theirs).status_code == 401
    await until(lambda: house.at("running_requests") == 0)
    assert (await house.post(CHAT)).status_code == 401


async def test_a_sessions_end_ends_those_that_are_held():
    house = House(app := endless())
    house.gate.close()
    waiting = asyncio.ensure_future(house.post(CHAT))
    await until(lambda: house.gate.held == 1)
    await end_in_a_thread(house.session)
    async with asyncio.timeout(10):
        assert (await waiting).status_code == 401
    assert house.gate.held == app.running == 0


def test_a_sessions_end_frees_its_generations(server):
    before = server.metrics()
    with server.session(on_sync="finish") as session, session.openai(max_retries=0) as client:
        streams = [
            client.chat.completions.create(
                model="policy",
                messages=[{"role": "user", "content": "Go on."}],
                stream=True,
                max_tokens=900,
                extra_body={"ignore_eos": True},
            )
            for _ in range(2)
        ]
        for stream in streams:
            next(iter(stream))
        session.end()
        server.sleep()  # waits for none
        for stream in streams:
            with pytest.raises(Exception, match="has ended"):
                list(stream)
    server.wake()
    assert session.tree.calls == []
    after = server.metrics()
    for name in ("running_generations", "running_requests", "gate_held_requests"):
        name = f"rollout_server_{name}"
        assert after[name] == before[name] == 0


# -- how much a session keeps -------------------------------------------------------------------


async def test_the_record_of_one_session_is_bounded_in_bytes():
    async def app(scope, receive, send):
        call = current.get()
        call.generations.append(
            Generation(
                list(range(100)), samples={0: Sample([5], [-1.0], None, [(7, 0, 1)], "stop")}
            )
        )
        call.messages = scope["rollout_request"]["messages"]
        answer = {"role": "assistant", "content": "?"}
        body = {"choices": [{"index": 0, "message": answer, "finish_reason": "stop"}]}
        await start(send, b"application/json")
        await send({"type": "http.response.body", "body": json.dumps(body).encode()})

    house = House(app, session_bytes=100_000)
    other, statuses = house.open(), []
    for turn in range(40):
        messages = [{"role": "user", "content": f"{turn}" * 2000}]
        statuses.append((await house.post(CHAT, {"messages": messages})).status_code)
    full = statuses.index(413)
    assert 5 < full < 40
    assert set(statuses[:full]) == {200}
    assert set(statuses[full:]) == {413}
    assert len(house.session.tree.calls) == full
    refused = await house.post(CHAT, {"messages": messages})
    assert "max_session_bytes=100000" in refused.json()["error"]["message"]
    assert (await house.post("/v1/reward", {"reward": 1.0})).status_code == 200
    assert (await house.post(CHAT, {"messages": messages}, key=other.api_key)).status_code == 200
