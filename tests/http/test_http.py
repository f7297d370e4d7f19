"""Real clients against the endpoint."""

import asyncio
import threading
from collections import Counter
from concurrent.futures import ThreadPoolExecutor

import anthropic
import httpx
import inside
import openai
import pytest
from over_http import MESSAGES, get, post
from support import eventually, held, trainer_logprobs, under_way

pytestmark = pytest.mark.slow


@pytest.fixture
def client(server):
    return server.openai()


# -- the openai client ------------------------------------------------------------------------


def test_chat(client, server, tokenizer):
    answer = client.chat.completions.create(model="policy", messages=MESSAGES, max_tokens=6)
    assert answer.policy_version == server.policy_version
    assert answer.choices[0].message.role == "assistant"
    rendered = tokenizer.apply_chat_template(MESSAGES, add_generation_prompt=True)["input_ids"]
    assert answer.usage.prompt_tokens == len(rendered)
    assert answer.usage.completion_tokens <= 6


@pytest.mark.core
def test_chat_with_n_and_logprobs(client, shared_model, tokenizer):
    answer = client.chat.completions.create(
        model="policy",
        messages=MESSAGES,
        n=4,
        max_tokens=5,
        logprobs=True,
        top_logprobs=3,
        extra_body={"ignore_eos": True, "return_token_ids": True},
    )
    assert [c.index for c in answer.choices] == [0, 1, 2, 3]
    for choice in answer.choices:
        ids = choice.token_ids
        own = trainer_logprobs(shared_model, answer.prompt_token_ids, ids)
        for position, token in enumerate(choice.logprobs.content):
            assert token.logprob == pytest.approx(own[position, ids[position]].item(), abs=1e-3)
            assert len(token.top_logprobs) == 3
    assert len({tuple(c.token_ids) for c in answer.choices}) > 1


@pytest.mark.core
def test_chat_streams(client, server):
    request = dict(model="policy", messages=MESSAGES, max_tokens=8, temperature=0)
    whole = client.chat.completions.create(**request)
    stream = client.chat.completions.create(
        **request, stream=True, stream_options={"include_usage": True}
    )
    chunks = list(stream)
    text = "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)
    assert text == whole.choices[0].message.content
    assert {c.policy_version for c in chunks} == {server.policy_version}
    assert chunks[-1].usage.completion_tokens == whole.usage.completion_tokens


async def test_the_async_client(server):
    client = server.async_openai()
    request = dict(model="policy", messages=MESSAGES, max_tokens=4, temperature=0)
    answers = await asyncio.gather(*[client.chat.completions.create(**request) for _ in range(8)])
    assert len({a.choices[0].message.content for a in answers}) == 1
    stream = await client.chat.completions.create(**request, stream=True)
    text = "".join([c.choices[0].delta.content or "" async for c in stream if c.choices])
    assert text == answers[0].choices[0].message.content


@pytest.mark.core
def test_completions(client, server, shared_model):
    answer = client.completions.create(
        model="policy",
        prompt=[5, 6, 7],
        max_tokens=6,
        logprobs=1,
        temperature=0,
        extra_body={"return_token_ids": True, "ignore_eos": True},
    )
    choice = answer.choices[0]
    own = trainer_logprobs(shared_model, [5, 6, 7], choice.token_ids)
    expected = own[range(6), choice.token_ids].tolist()
    assert choice.logprobs.token_logprobs == pytest.approx(expected, abs=1e-3)
    text = client.completions.create(model="policy", prompt=["one", "two"], max_tokens=2)
    assert len(text.choices) == 2 and text.policy_version == server.policy_version


@pytest.mark.core
def test_responses(client, server):
    answer = client.responses.create(model="policy", input="Say hello.", max_output_tokens=8)
    assert answer.policy_version == server.policy_version
    assert answer.output_text is not None
    events = list(
        client.responses.create(
            model="policy", input="Say hello.", max_output_tokens=8, stream=True
        )
    )
    assert events[0].type == "response.created"
    assert events[-1].type in ("response.completed", "response.incomplete")
    assert events[-1].policy_version == server.policy_version


def test_models(client, server, tiny_folder):
    names = [m.id for m in client.models.list()]
    assert names == ["policy", tiny_folder]
    answer = client.completions.create(model=tiny_folder, prompt=[5], max_tokens=1)
    assert answer.choices
    with pytest.raises(openai.NotFoundError, match="other"):
        client.completions.create(model="other", prompt=[5], max_tokens=1)


# -- the anthropic client ---------------------------------------------------------------------


@pytest.mark.core
def test_anthropic(server, tokenizer):
    root = server.base_url.removesuffix("/v1")
    client = anthropic.Anthropic(base_url=root, api_key=server.api_key)
    answer = client.messages.create(model="policy", messages=MESSAGES, max_tokens=6)
    assert answer.policy_version == server.policy_version
    assert answer.role == "assistant" and answer.usage.output_tokens <= 6
    counted = client.messages.count_tokens(model="policy", messages=MESSAGES)
    assert counted.input_tokens == answer.usage.input_tokens
    with client.messages.stream(model="policy", messages=MESSAGES, max_tokens=6) as stream:
        text = "".join(stream.text_stream)
        final = stream.get_final_message()
    assert text == "".join(block.text for block in final.content)
    with pytest.raises(anthropic.AuthenticationError):
        anthropic.Anthropic(base_url=root, api_key="wrong").messages.create(
            model="policy", messages=MESSAGES, max_tokens=6
        )


# -- the other routes -------------------------------------------------------------------------


@pytest.mark.core
def test_tokenize_and_back(server, tokenizer):
    told = post(server, "/tokenize", json={"model": "policy", "messages": MESSAGES}).json()
    rendered = tokenizer.apply_chat_template(MESSAGES, add_generation_prompt=True)["input_ids"]
    assert told["tokens"] == rendered
    text = post(server, "/detokenize", json={"model": "policy", "tokens": rendered}).json()
    assert text["prompt"] == tokenizer.decode(rendered)


@pytest.mark.core
def test_health_and_metrics(server):
    root = server.base_url.removesuffix("/v1")
    assert httpx.get(root + "/health").status_code == 200
    assert httpx.get(root + "/metrics").status_code == 401
    assert "vllm:" in get(server, "/metrics").text


@pytest.mark.parametrize(
    "path",
    [
        "/sleep",
        "/wake_up",
        "/pause",
        "/resume",
        "/collective_rpc",
        "/update_weights",
        "/init_weight_transfer_engine",
        "/reset_prefix_cache",
        "/scale_elastic_ep",
        "/invocations",
        "/v1/load_lora_adapter",
        "/inference/v1/generate",
        "/abort_requests",
        "/start_profile",
        "/v1/chat/completions/batch",
        "//sleep",
        "/v1/../sleep",
    ],
)
def test_there_is_no_control_route(server, path):
    assert post(server, path, json={}).status_code == 404
    assert server.state == "awake"


# -- sampling defaults ------------------------------------------------------------------------


def test_the_greedy_default_of_a_checkpoint_is_not_taken(client):
    """Fields left out are the server's: here temperature 1, so samples differ."""
    answer = client.completions.create(model="policy", prompt=[5, 6], n=8, max_tokens=8)
    assert len({c.text for c in answer.choices}) > 1


# -- bad input --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("path", "request_", "status", "part"),
    [
        ("/v1/chat/completions", {"content": "no json"}, 400, "JSON"),
        ("/v1/chat/completions", {"content": '{"model": "policy"'}, 400, "JSON"),
        ("/v1/chat/completions", {"json": {"model": "policy"}}, 400, "messages"),
        (
            "/v1/completions",
            {"json": {"model": "policy", "prompt": [5] * 2000}},
            400,
            "maximum context length",
        ),
        (
            "/v1/chat/completions",
            {"json": {"model": "policy", "messages": [{"role": "user", "content": "a " * 3000}]}},
            400,
            "maximum context length",
        ),
        (
            "/v1/completions",
            {"json": {"model": "policy", "prompt": "x", "temperature": -1}},
            400,
            "temperature",
        ),
        ("/v1/completions", {"json": {"model": "policy", "prompt": "x", "top_p": 7}}, 400, "top_p"),
        ("/v1/completions", {"json": {"model": "policy", "prompt": [10**9]}}, 400, ""),
        (
            "/v1/completions",
            {"json": {"model": "policy", "prompt": "x", "logprobs": 500}},
            400,
            "logprobs",
        ),
        ("/v1/messages", {"json": {"model": "policy"}}, 400, "messages"),
        ("/v1/responses", {"json": {"model": "policy"}}, 400, "input"),
        ("/tokenize", {"json": {"model": "policy"}}, 400, ""),
        ("/detokenize", {"json": {"model": "policy", "tokens": [-1]}}, 400, ""),
    ],
)
def test_bad_requests_get_400(server, path, request_, status, part):
    headers = {"content-type": "application/json"}
    answer = post(server, path, headers=headers, **request_)
    assert answer.status_code == status, answer.text
    assert part in answer.text
    assert "Traceback" not in answer.text


def test_a_wrong_key(server):
    client = openai.OpenAI(base_url=server.base_url, api_key="wrong")
    with pytest.raises(openai.AuthenticationError):
        client.models.list()


# -- many clients -----------------------------------------------------------------------------


@pytest.mark.core
def test_clients_wait_through_syncs_and_sleeps(server):
    """Requests that come while the engine sleeps, and such as run when the weights move, three
    times: each is answered, the first by the weights that it waited for."""
    client, before = server.openai(max_retries=0), server.metrics()

    def ask(i):
        return client.completions.create(
            model="policy", prompt=[5 + i], max_tokens=100, extra_body={"ignore_eos": True}
        )

    answers = []
    with ThreadPoolExecutor(64) as pool:
        for _ in range(3):
            version = server.policy_version
            caught = [pool.submit(ask, i) for i in range(32)]
            eventually(lambda: under_way(server))
            server.sync_weights()
            server.sleep()
            waiting = [pool.submit(ask, i) for i in range(32)]
            eventually(lambda: held(server) >= 32)
            assert not any(one.done() for one in waiting)
            server.wake()
            answers += [one.result(60) for one in caught + waiting]
            assert {one.result().policy_version for one in waiting} == {version + 2}
            versions = [one.result().policy_version for one in caught]
            assert set(versions) <= {version, version + 1, version + 2} and max(versions) > version
    assert {a.usage.completion_tokens for a in answers} == {100}
    assert {a.choices[0].finish_reason for a in answers} == {"length"}
    waited = "rollout_server_gate_held_seconds_count"
    assert server.metrics()[waited] - before[waited] >= 3 * 32


def test_clients_wait_for_the_end_of_a_sync(server, monkeypatch):
    """Requests that come while weights are written are held at the gate, not in the engine."""
    writing, go = threading.Event(), threading.Event()
    engine = inside.engine(server)
    refit = engine.refit

    async def held_up(*args):
        writing.set()
        await asyncio.to_thread(go.wait, 60)
        return await refit(*args)

    monkeypatch.setattr(engine, "refit", held_up)
    version, asked = server.policy_version, {"model": "policy", "prompt": [5], "max_tokens": 2}
    with ThreadPoolExecutor(5) as pool:
        sync = pool.submit(server.sync_weights)
        try:
            assert writing.wait(30)
            waiting = [pool.submit(post, server, "/v1/completions", json=asked) for _ in range(4)]
            eventually(lambda: held(server) == 4)
            assert server.state == "syncing" and not any(one.done() for one in waiting)
        finally:
            go.set()
        assert sync.result(60).version == version + 1
        assert {one.result(60).json()["policy_version"] for one in waiting} == {version + 1}


def test_a_client_that_goes_away_frees_its_generation(server, monkeypatch):
    """Not by vLLM's metrics: those of a process are its newest engine's."""
    processor, tokens = inside.output_processor(server), Counter()
    process = processor.process_outputs

    def counted(outputs, *others, **options):
        for output in outputs:
            tokens[output.request_id] += len(output.new_token_ids)
        return process(outputs, *others, **options)

    monkeypatch.setattr(processor, "process_outputs", counted)
    asked = {"model": "policy", "prompt": [5], "ignore_eos": True}
    headers = {"authorization": f"Bearer {server.api_key}"}
    url = server.base_url + "/completions"
    streamed = asked | {"max_tokens": 1000, "stream": True}
    with httpx.stream("POST", url, json=streamed, headers=headers) as answer:
        lines = answer.iter_lines()  # which, let go, would end the stream
        next(lines)
        (generation,) = under_way(server)
    eventually(lambda: generation not in under_way(server))
    sampled = tokens[generation.request_id]
    assert 0 < sampled < 900
    httpx.post(url, json=asked | {"max_tokens": 300}, headers=headers, timeout=60)
    assert sum(tokens.values()) > tokens[generation.request_id] + 299
    assert tokens[generation.request_id] < sampled + 30, "it was sampled beside the next one"
