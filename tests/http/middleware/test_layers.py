"""The layers in front of vLLM's app, over a small app of the tests' own."""

import asyncio
import io
import json
import logging
from types import SimpleNamespace

import pytest
from small_app import KEY, House, events, say, start
from support import soon

from rollout_server.http.tokens import vllm_hooks
from rollout_server.http.tokens.calls import Generation, Sample, current
from rollout_server.http.tokens.texts import Texts
from rollout_server.lifecycle.gate import Gate


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
    return House(app, gate, version, names=["policy", "base/model"]).client(key or "")


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
    told = events(answer)
    assert [e.pop("policy_version") for e in told] == [1, 2]
    assert told == [{"x": 1}, {"x": {"y": "data: {"}}]
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
    await soon(lambda: gate.held == 3)
    assert app.calls == 0
    assert (await client(app, gate).get("/v1/models")).status_code == 200
    gate.open()
    assert [r.status_code for r in await asyncio.gather(*waiting)] == [200] * 3
    assert gate.held == 0


async def test_who_waits_too_long_is_told_to_come_back():
    gate, app = Gate(hold_timeout=0.05), Answers([b"{}"])
    answer = await client(app, gate).post("/v1/completions")
    assert answer.status_code == 503
    assert int(answer.headers["retry-after"]) >= 1
    assert (gate.held, app.calls) == (0, 0)


async def test_a_gate_that_is_shut_says_why():
    gate, app = Gate(hold_timeout=5), Answers([b"{}"])
    waiting = asyncio.ensure_future(client(app, gate).post("/v1/completions"))
    await soon(lambda: gate.held == 1)
    gate.shut("the server is closed")
    late = client(app, gate).post("/v1/completions")
    for answer in await asyncio.gather(waiting, late):
        assert answer.status_code == 503
        assert "the server is closed" in answer.json()["error"]["message"]
    assert app.calls == 0


async def test_a_streams_end_is_recorded_before_it_is_told():
    recorded = []

    async def app(scope, receive, send):
        sample = Sample([5], [-1.0], versions=[(7, 0, 1)])
        current.get().generations.append(Generation([1], samples={0: sample}))
        await start(send)
        for reason in (None, "length"):
            sample.finish_reason = reason
            await say(send, {"choices": [{"index": 0, "text": "x", "finish_reason": reason}]})
        await say(send, "[DONE]", more=False)

    async def receive():
        return {"type": "http.request", "body": b"{}"}

    async def send(message):
        recorded.append((message.get("body", b"")[-40:], len(house.session.tree.calls)))

    house = House(app)
    key = [(b"authorization", f"Bearer {house.session.api_key}".encode())]
    scope = {"type": "http", "method": "POST", "path": "/v1/completions", "headers": key}
    await house.app(scope, receive, send)
    assert [count for _, count in recorded] == [0, 0, 1, 1]
    assert b"length" in recorded[2][0]


class Asked:
    """An ASGI app that says which model it was asked for."""

    async def __call__(self, scope, receive, send):
        body = (await receive())["body"]
        await Answers([json.dumps({"asked": json.loads(body)["model"]}).encode()])(
            scope, receive, send
        )


@pytest.mark.parametrize(
    "path, name",
    [
        ("/v1/chat/completions", "dummy"),
        ("/v1/chat/completions", "tgi"),
        ("/v1/chat/completions", "gpt-5.6-luna"),
        ("/v1/responses", "gpt-4.1"),
        ("/v1/messages", "claude-sonnet-4-5-20250929"),
        ("/v1/messages/count_tokens", "claude-opus-4-1"),
        ("/v1beta/openai/chat/completions", "gemini-2.5-flash"),
        ("/v1beta/openai/chat/completions", "models/gemini-2.5-pro"),
        ("/v1/completions", "base/model"),
    ],
)
async def test_names_that_a_dialects_clients_send_unasked_are_the_policys(path, name):
    answer = await client(Asked()).post(path, json={"model": name})
    assert answer.json()["asked"] == ("policy" if name != "base/model" else name)


@pytest.mark.parametrize(
    "path, name",
    [
        ("/v1/chat/completions", "gemini-2.5-flash"),
        ("/v1/chat/completions", "claude-sonnet-4-5"),
        ("/v1/chat/completions", "polcy"),
        ("/v1/completions", "dummy"),
        ("/v1/messages", "gpt-4.1"),
        ("/v1beta/openai/chat/completions", "dummy"),
        ("/tokenize", "gpt-4.1"),
    ],
)
async def test_other_names_are_refused_with_those_that_are_right(path, name):
    answer = await client(Asked()).post(path, json={"model": name})
    assert answer.status_code == 404 and answer.json()["error"]["param"] == "model"
    message = answer.json()["error"]["message"]
    assert all(repr(known) in message for known in (name, "policy", "base/model"))


@pytest.fixture
def terminal(monkeypatch):
    """What vLLM prints to where it has its handlers print."""
    printed = io.StringIO()
    logger = logging.getLogger("vllm")
    handlers = [logging.StreamHandler(printed), logging.StreamHandler(io.StringIO())]
    monkeypatch.setattr(logger, "handlers", handlers)
    monkeypatch.setattr(logger, "propagate", False)
    before = logger.level  # what an engine of this process has set, or none
    logger.setLevel(logging.WARNING)
    yield printed
    logger.setLevel(before)


@pytest.mark.parametrize("status", [200, 400, 500])
async def test_tracebacks_of_requests_go_to_our_log(terminal, caplog, status):
    logger = logging.getLogger("vllm.tool_parsers.some")

    def work():
        try:
            json.loads('{"cut": ')
        except ValueError:
            logger.exception("Error in extracting tool call from response.")

    async def app(scope, receive, send):
        work()
        await asyncio.get_running_loop().run_in_executor(None, work)  # knows no request
        logger.warning("Something that the user should know.")
        await Answers([b"{}"], status=status)(scope, receive, send)

    with caplog.at_level(logging.DEBUG, "rollout_server"):
        answer = await client(app).post("/v1/chat/completions", json={})
    assert answer.status_code == status
    assert terminal.getvalue() == "Something that the user should know.\n"
    ours = [r for r in caplog.records if r.name.startswith("rollout_server.http")]
    assert [r.levelname for r in ours] == ["DEBUG", "ERROR" if status == 500 else "DEBUG"]
    assert all("extracting tool call" in r.message for r in ours)
    assert all("JSONDecodeError" in r.exc_text for r in ours)


async def test_what_vllm_logs_of_no_request_is_left_alone(terminal):
    client(Answers([b"{}"]))
    logging.getLogger("vllm.v1.engine").error("The engine is gone.")
    assert "The engine is gone." in terminal.getvalue()


class Engine:
    """As much of vLLM's client as is tapped, for a model whose conversations vLLM renders without
    the method that is tapped."""

    def __init__(self):
        config = SimpleNamespace(model_type="gpt_oss")
        self.model_config = SimpleNamespace(
            hf_config=config, max_model_len=100, try_get_generation_config=dict
        )
        self.renderer = SimpleNamespace(render_messages_async=None)
        self.started = 0

    async def generate(self, prompt, params, request_id, **options):
        self.started += 1
        yield SimpleNamespace(prompt_token_ids=[1], outputs=[], finished=True)


TOLD = [
    {"role": "user", "content": "Hi."},
    {
        "role": "assistant",
        "content": "Yes.",
        "prompt_token_ids": [1],
        "generation_token_ids": [2],
        "generation_log_probs": [-1.0],
    },
    {"role": "user", "content": "And?"},
]


@pytest.mark.parametrize(
    "path, body, in_session, refused",
    [
        ("/v1/chat/completions", {}, True, True),
        ("/v1/responses", {}, True, True),
        ("/v1/messages", {"stream": True}, True, True),
        ("/v1/completions", {}, True, False),
        ("/generate", {}, True, False),
        ("/v1/chat/completions", {}, False, False),
        ("/v1/chat/completions", {"messages": TOLD}, False, True),
        (
            "/v1/chat/completions",
            {
                "messages": [*TOLD[:1], {"role": "assistant", "content": "Yes."}],
                "required_prefix_token_ids": [1, 2],
            },
            False,
            True,
        ),
    ],
)
async def test_what_is_rendered_unseen_is_refused_where_it_must_be_exact(
    tokenizer, path, body, in_session, refused
):
    engine = Engine()
    state = SimpleNamespace(openai_serving_chat=None, _state={})
    vllm_hooks.install_hooks(engine, state, Texts(tokenizer))

    async def app(scope, receive, send):
        params = SimpleNamespace(
            logprobs=0, structured_outputs=None, output_kind=SimpleNamespace(name="DELTA")
        )
        async for _ in engine.generate({}, params, "id"):
            pass
        await Answers([b"{}"])(scope, receive, send)

    house = House(app)
    answer = await house.post(path, body, key=None if in_session else KEY)
    assert engine.started == (not refused)
    assert answer.status_code == (400 if refused else 200)
    if refused:
        assert "gpt_oss" in answer.json()["error"]["message"]
        assert not house.session.tree.calls
