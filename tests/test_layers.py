"""The layers in front of vLLM's app, over a small app of the tests' own."""

import asyncio
import json

import httpx
import pytest

from rollout_server.http.app import layered
from rollout_server.http.calls import Generation, Sample, current
from rollout_server.http.gate import Gate
from rollout_server.http.sessions import Sessions
from rollout_server.trajectories.session import Session

KEY = "key-of-the-tests"


class Answers:
    """An ASGI app that sends the chunks it was given."""

    def __init__(self, chunks, kind=b"application/json", status=200):
        self.chunks, self.kind, self.status = chunks, kind, status
        self.calls = 0

    async def __call__(self, scope, receive, send):
        self.calls += 1
        length = str(sum(map(len, self.chunks))).encode()
        headers = [(b"content-type", self.kind), (b"content-length", length)]
        await send({"type": "http.response.start", "status": self.status, "headers": headers})
        for chunk in self.chunks:
            await send({"type": "http.response.body", "body": chunk, "more_body": True})
        await send({"type": "http.response.body", "body": b""})


def client(app, gate=None, version=lambda: 7, key=KEY):
    if gate is None:
        gate = Gate(hold_timeout=5)
        gate.open()
    served = layered(app, KEY, gate, version, Sessions(), ["policy"], 100, {})
    transport = httpx.ASGITransport(app=served)
    headers = {"authorization": f"Bearer {key}"} if key else {}
    return httpx.AsyncClient(transport=transport, base_url="http://server", headers=headers)


async def test_json_answers_carry_the_version():
    app = Answers([b'{"id": "x",', b' "n": [1]}'])
    answer = await client(app).post("/v1/completions", json={})
    assert answer.json() == {"policy_version": 7, "id": "x", "n": [1]}
    assert answer.headers["x-policy-version"] == "7"
    assert int(answer.headers["content-length"]) == len(answer.content)
    empty = await client(Answers([b"{}"])).post("/v1/completions", json={})
    assert empty.json() == {"policy_version": 7}


@pytest.mark.parametrize("size", [1, 3, 1000])
async def test_events_carry_the_version_however_they_are_cut(size):
    stream = (
        b'event: a\ndata: {"x": 1}\n\n: note\n\ndata: {"x": {"y": "data: {"}}\n\ndata: [DONE]\n\n'
    )
    chunks = [stream[i : i + size] for i in range(0, len(stream), size)]
    versions = iter(range(100))
    app = Answers(chunks, kind=b"text/event-stream; charset=utf-8")
    answer = await client(app, version=lambda: next(versions)).post("/v1/messages", json={})
    lines = [line for line in answer.text.split("\n") if line.startswith("data: {")]
    events = [json.loads(line[6:]) for line in lines]
    assert [e.pop("policy_version") for e in events] == [1, 2]
    assert events == [{"x": 1}, {"x": {"y": "data: {"}}]
    assert answer.text.endswith("data: [DONE]\n\n")
    assert "event: a\n" in answer.text and ": note\n" in answer.text


async def test_errors_and_other_routes_are_left_alone():
    body = b'{"error": {"message": "no"}}'
    answer = await client(Answers([body], status=400)).post("/v1/completions", json={})
    assert (answer.status_code, answer.content) == (400, body)
    answer = await client(Answers([body])).get("/v1/models")
    assert answer.content == body


@pytest.mark.parametrize("key", [None, "", "wrong", KEY + "x", "Bearer"])
async def test_a_wrong_key_is_refused(key):
    app = Answers([b"{}"])
    answer = await client(app, key=key).get("/v1/models")
    assert answer.status_code == 401
    assert answer.json()["error"]["type"] == "authentication_error"
    assert KEY not in answer.text
    assert app.calls == 0


async def test_the_key_may_come_as_anthropic_sends_it():
    answer = await client(Answers([b"{}"]), key=None).post(
        "/v1/messages", json={}, headers={"x-api-key": KEY}
    )
    assert answer.status_code == 200


async def test_only_known_routes_reach_the_app():
    app = Answers([b"{}"])
    for path in (
        "/sleep",
        "/v1/load_lora_adapter",
        "/collective_rpc",
        "/scale_elastic_ep",
        "/ping",
    ):
        assert (await client(app).post(path)).status_code == 404
    answer = await client(app).get("/v1/chat/completions")
    assert (answer.status_code, answer.headers["allow"]) == (405, "POST")
    assert app.calls == 0
    assert (await client(app, key=None).get("/health")).status_code == 200


async def test_requests_wait_at_the_gate_and_the_others_do_not():
    gate, app = Gate(hold_timeout=5), Answers([b"{}"])
    waiting = [asyncio.ensure_future(client(app, gate).post("/v1/responses")) for _ in range(3)]
    await asyncio.sleep(0.05)
    assert gate.held == 3 and app.calls == 0
    assert (await client(app, gate).get("/v1/models")).status_code == 200
    gate.open()
    assert [r.status_code for r in await asyncio.gather(*waiting)] == [200] * 3
    assert gate.held == 0


async def test_who_waits_too_long_is_told_to_come_back():
    answer = await client(Answers([b"{}"]), Gate(hold_timeout=0.05)).post("/v1/completions")
    assert answer.status_code == 503
    assert int(answer.headers["retry-after"]) >= 1


async def test_a_gate_that_is_shut_says_why():
    gate = Gate(hold_timeout=5)
    waiting = asyncio.ensure_future(client(Answers([b"{}"]), gate).post("/v1/completions"))
    await asyncio.sleep(0.05)
    gate.shut("the server is closed")
    answer = await waiting
    assert answer.status_code == 503
    assert "the server is closed" in answer.json()["error"]["message"]


async def test_a_streams_end_is_recorded_before_it_is_told():
    gate, sessions = Gate(hold_timeout=5), Sessions()
    gate.open()
    session = Session("http://server/v1", (None, None), sessions.remove, {})
    sessions.add(session)
    recorded = []

    async def app(scope, receive, send):
        sample = Sample([5], [-1.0], versions=[(7, 0, 1)])
        current.get().generations.append(Generation([1], samples={0: sample}))
        headers = [(b"content-type", b"text/event-stream")]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        for reason in (None, "length"):
            sample.finish_reason = reason
            event = {"choices": [{"index": 0, "text": "x", "finish_reason": reason}]}
            body = b"data: " + json.dumps(event).encode() + b"\n\n"
            await send({"type": "http.response.body", "body": body, "more_body": True})
        await send({"type": "http.response.body", "body": b"data: [DONE]\n\n"})

    async def receive():
        return {"type": "http.request", "body": b"{}"}

    async def send(message):
        recorded.append((message.get("body", b"")[-40:], len(session.tree.calls)))

    key = [(b"authorization", f"Bearer {session.api_key}".encode())]
    scope = {"type": "http", "method": "POST", "path": "/v1/completions", "headers": key}
    await layered(app, KEY, gate, lambda: 7, sessions, ["policy"], 100, {})(scope, receive, send)
    assert [count for _, count in recorded] == [0, 0, 1, 1]
    assert b"length" in recorded[2][0]
