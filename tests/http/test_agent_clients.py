"""Real clients in sessions, and what a sync or a sleep does to their conversations."""

import asyncio
import io
import json
import logging
import os
import re
import threading

import inside

os.environ.setdefault("OPENAI_AGENTS_DISABLE_TRACING", "1")

import agents
import httpx
import huggingface_hub
import openai
import pytest
from conversations import (
    converse,
    converse_by_messages,
    converse_by_responses,
    goes_on,
    sampled,
)
from support import held, soon


@pytest.mark.parametrize("stream", [False, True])
def test_anthropic_conversations_are_recorded(server, stream):
    with server.session() as session:
        list(converse_by_messages(session, 3, stream, max_tokens=8, system="Be short."))
        assert goes_on(session)
    (row,) = session.trajectory()
    assert sum(row.env_mask) == sum(len(c.ids) for c in session.tree.calls)


@pytest.mark.parametrize("stream", [False, True])
def test_responses_are_recorded(server, stream):
    with server.session() as session, session.openai() as client:
        list(converse_by_responses(client, 3, stream, max_output_tokens=8))
        assert goes_on(session)


def test_hugging_faces_client(server, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    with server.session() as session:
        client = huggingface_hub.InferenceClient(base_url=session.base_url, api_key=session.api_key)
        messages = []
        for turn in range(2):
            messages.append({"role": "user", "content": f"Question {turn}?"})
            answer = client.chat_completion(messages, max_tokens=8)  # model="dummy"
            messages.append({"role": "assistant", "content": answer.choices[0].message.content})
        assert goes_on(session)


def test_defaults_of_hugging_faces_client_outside_sessions(server, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    client = huggingface_hub.InferenceClient(base_url=server.base_url, api_key=server.api_key)
    answer = client.chat_completion([{"role": "user", "content": "Hi."}], max_tokens=4)
    assert answer.usage.completion_tokens <= 4


def test_geminis_openai_surface(server):
    with server.session() as session:
        root = session.base_url.removesuffix("/v1")
        with openai.OpenAI(base_url=f"{root}/v1beta/openai/", api_key=session.api_key) as client:
            messages = []
            for turn in range(2):
                messages.append({"role": "user", "content": f"Question {turn}?"})
                thinking = {"google": {"thinking_config": {"thinking_budget": 100}}}
                answer = client.chat.completions.create(
                    model="gemini-2.5-flash",
                    messages=messages,
                    max_tokens=8,
                    extra_body={"extra_body": thinking},
                )
                messages.append(answer.choices[0].message.model_dump(exclude_none=True))
            assert goes_on(session)


def test_a_tool_call_that_is_cut_off_prints_nothing(server, monkeypatch):
    """vLLM's parser of tool calls logs such a one with its traceback."""
    printed = io.StringIO()
    # Not pytest's own, which it adds to loggers that don't propagate.
    terminal = [h for h in logging.getLogger("vllm").handlers if type(h) is logging.StreamHandler]
    for handler in terminal:
        monkeypatch.setattr(handler, "stream", printed)
    assert terminal
    tool = {"type": "function", "function": {"name": "look_up", "parameters": {"type": "object"}}}
    grammar = {"structured_outputs": {"regex": CALL}}
    with server.openai() as client:
        for most in (1, 8, 14):
            for stream in (False, True):
                answer = client.chat.completions.create(
                    model="policy",
                    messages=HELLO,
                    tools=[tool],
                    max_tokens=most,
                    stream=stream,
                    extra_body=grammar,
                )
                if stream:
                    list(answer)
    assert "Traceback" not in printed.getvalue()


def test_sglangs_generate(server):
    """As slime's rollout functions call it."""
    fields = {
        "temperature": 1.0,
        "top_p": 1.0,
        "top_k": -1,
        "max_new_tokens": 8,
        "stop": None,
        "stop_token_ids": None,
        "skip_special_tokens": False,
        "no_stop_trim": True,
        "spaces_between_special_tokens": False,
        "ignore_eos": True,
    }
    with server.session() as session:
        url = session.base_url.removesuffix("/v1") + "/generate"
        prompt = [21, 22, 23]
        for _ in range(2):
            asked = {"sampling_params": fields, "return_logprob": True, "input_ids": prompt}
            answer = httpx.post(url, json=asked, timeout=60).json()
            meta = answer["meta_info"]
            ids = [item[1] for item in meta["output_token_logprobs"]]
            assert ids == answer["output_ids"] and len(ids) == meta["completion_tokens"] == 8
            assert all(item[0] <= 0 for item in meta["output_token_logprobs"])
            assert meta["finish_reason"] == {"type": "length", "length": 8}
            assert meta["weight_version"] == str(server.policy_version)
            prompt = prompt + ids + [24]
        assert goes_on(session)
        (row,) = session.trajectory()
        assert row.prompt_ids + row.completion_ids == prompt[:-1] and sum(row.env_mask) == 16
        several = asked | {"input_ids": [[21], [22]], "sampling_params": [fields, fields]}
        assert len(httpx.post(url, json=several, timeout=60).json()) == 2
        with httpx.stream("POST", url, json=asked | {"stream": True}, timeout=60) as stream:
            lines = [line for line in stream.iter_lines() if line]
        assert lines[-1] == "data: [DONE]"
        grown = [json.loads(line[6:])["output_ids"] for line in lines[:-1]]
        assert len(grown[-1]) == 8 and grown[-1][: len(grown[0])] == grown[0]
        for bad, named in (
            ({"input_ids": [10**9]}, "input_ids[0][0]"),
            ({}, "give one of them"),
            ({"input_ids": [1], "sampling_params": {"tempratur": 1}}, "tempratur"),
            ({"input_ids": []}, "is empty"),
            ({"text": 5}, "text"),
            ({"input_ids": [1], "unheard_of": 5}, "unheard_of"),
            ({"input_ids": [1] * 5000}, "maximum context length"),
        ):
            refused = httpx.post(url, json=bad)
            assert refused.status_code == 400 and named in refused.json()["error"]["message"]


HELLO = [{"role": "user", "content": "Hello"}]


@pytest.mark.parametrize(
    "path, asked, end",
    [
        ("/v1/chat/completions", {"messages": HELLO, "max_tokens": 4}, '"finish_reason":"'),
        ("/v1/completions", {"prompt": [21, 22], "max_tokens": 4}, '"finish_reason":"'),
        (
            "/v1/responses",
            {"input": "Hello", "max_output_tokens": 4},
            "^event: response.(comp|inc)",
        ),
        ("/v1/messages", {"messages": HELLO, "max_tokens": 4}, "message_stop"),
        ("/generate", {"input_ids": [21], "sampling_params": {"max_new_tokens": 4}}, '"type": "'),
    ],
)
def test_a_client_that_has_the_end_may_end_the_session(server, path, asked, end):
    """Without reading what else the stream says."""
    for _ in range(3):
        with server.session() as session:
            url = session.base_url.removesuffix("/v1") + path
            body = {**asked, "stream": True} | ({} if path == "/generate" else {"model": "policy"})
            with httpx.stream("POST", url, json=body, timeout=60) as stream:
                assert any(re.search(end, line) for line in stream.iter_lines())
                session.end()
            assert [len(call.ids) for call in session.tree.calls] == [4]


def test_completions_are_recorded(server):
    with server.session() as session, session.openai() as client:
        prompt = [21, 22, 23]
        for _ in range(2):
            answer = client.completions.create(
                model="policy",
                prompt=prompt,
                max_tokens=6,
                extra_body={"return_token_ids": True, "ignore_eos": True},
            )
            prompt = [*prompt, *answer.choices[0].model_dump()["token_ids"], 24]
        assert goes_on(session)


def test_a_stream_over_three_syncs_is_one_answer(server):
    """Weights didn't change, so neither do greedy tokens; the versions of each are told."""
    asked = dict(
        model="policy",
        messages=[{"role": "user", "content": "Count."}],
        temperature=0,
        max_tokens=240,
        logprobs=True,
        extra_body={"ignore_eos": True},
    )
    with server.openai() as client:
        undisturbed = sampled(client.chat.completions.create(**asked))[1]
    before = server.policy_version
    with server.session() as session, session.openai() as client:
        started, syncs = threading.Event(), []

        def disturb():
            started.wait(20)
            for _ in range(3):
                syncs.append(server.sync_weights().version)

        thread = threading.Thread(target=disturb)
        thread.start()
        events = []
        for event in client.chat.completions.create(**asked, stream=True):
            events.append(event)
            if len(events) == 20:
                started.set()
        thread.join(30)
    assert syncs == [before + 1, before + 2, before + 3]
    last = next(e for e in events if e.choices and e.choices[0].finish_reason)
    assert last.choices[0].finish_reason == "length"
    assert last.choices[0].delta.model_dump()["generation_token_ids"] == undisturbed
    (spans,) = last.model_dump()["policy_versions"]
    assert spans[0]["version"] == before and spans[-1]["version"] > before
    assert [s["start"] for s in spans[1:]] == [s["end"] for s in spans[:-1]]
    assert (spans[0]["start"], spans[-1]["end"]) == (0, 240)
    (row,) = session.trajectory()
    assert [tuple(s) for s in row.versions] == [(s["version"], s["start"], s["end"]) for s in spans]


async def test_requests_that_are_held_over_a_sleep_are_answered_once(server):
    """500 of them, in 20 sessions; with a conversation that goes on from before."""
    sessions = [server.session(number=i) for i in range(20)]
    clients = [s.async_openai(max_retries=0) for s in sessions]

    async def ask(client, text):
        answer = await client.chat.completions.create(
            model="policy",
            messages=[{"role": "user", "content": text}],
            max_tokens=2,
            extra_body={"ignore_eos": True},
        )
        return answer.id

    await asyncio.to_thread(server.sleep)
    asked = [asyncio.ensure_future(ask(clients[i % 20], f"Question {i}")) for i in range(500)]
    await soon(lambda: held(server) == 500, within=60)
    assert not any(task.done() for task in asked)
    await asyncio.to_thread(server.wake)
    answers = await asyncio.wait_for(asyncio.gather(*asked), 120)
    assert len(set(answers)) == 500
    assert [len(s.tree.calls) for s in sessions] == [25] * 20
    for client, session in zip(clients, sessions, strict=True):
        await client.close()
        session.end()


def test_a_client_that_goes_away_frees_its_generation(server):
    with server.session() as session, session.openai() as client:
        stream = client.chat.completions.create(
            model="policy",
            messages=[{"role": "user", "content": "Count."}],
            stream=True,
            max_tokens=900,
            extra_body={"ignore_eos": True},
        )
        next(iter(stream))
        stream.close()
        # An answer that nobody has isn't part of the conversation.
        converse(client, 1)
        assert len(session.tree.calls) == 1
    assert not inside.output_processor(server).has_unfinished_requests()


CALL = r'<tool_call>\n\{"name": "look_up", "arguments": \{"what": "[a-z]{3}"\}\}\n</tool_call>'


# The SDK takes an answer that is cut off for a failure, and a random model never ends by itself.
ENDS = agents.ModelSettings(
    max_tokens=160, temperature=1.0, extra_body={"structured_outputs": {"regex": "[a-z ]{8}"}}
)
AGENTS_MODELS = [agents.OpenAIResponsesModel, agents.OpenAIChatCompletionsModel]


@pytest.mark.parametrize("model", AGENTS_MODELS)
async def test_openai_agents(server, model):
    """Two runs of an agent, the second of which is given all of the first."""
    with server.session() as session:
        client = session.async_openai()
        agent = agents.Agent(
            name="a",
            instructions="Be short.",
            model=model("policy", client),
            model_settings=ENDS,
        )
        history = []
        for turn in range(2):
            history.append({"role": "user", "content": f"Question {turn}?"})
            result = await agents.Runner.run(agent, history)
            assert isinstance(result.final_output, str)
            history = result.to_input_list()
        await client.close()
    assert len(session.tree.calls) == 2 and goes_on(session)
    assert len(session.trajectory()) == 1


@pytest.mark.parametrize("model", AGENTS_MODELS)
async def test_openai_agents_calls_a_tool(server, tokenizer, model):
    """The call that was sampled is the one that is made, and the run goes on with its result."""
    asked = []

    @agents.function_tool(strict_mode=False)  # vLLM makes grammars of its own for strict ones
    def look_up(what: str) -> str:
        """Look it up."""
        asked.append(what)
        return "It is 4."

    with server.session() as session:
        client = session.async_openai()
        calls = agents.ModelSettings(extra_body={"structured_outputs": {"regex": CALL}})
        agent = agents.Agent(
            name="a",
            instructions="Be short.",
            model=model("policy", client),
            tools=[look_up],
            tool_use_behavior="stop_on_first_tool",
            model_settings=ENDS.resolve(calls),
        )
        result = await agents.Runner.run(agent, "Look it up.")
        assert result.final_output == "It is 4."
        history = [*result.to_input_list(), {"role": "user", "content": "And now?"}]
        again = await agents.Runner.run(agent.clone(model_settings=ENDS), history, max_turns=2)
        assert isinstance(again.final_output, str)
        await client.close()
    first, _ = session.tree.calls
    (what,) = asked
    _, ids = session.tree.tokens(first)
    assert f'"arguments": {{"what": "{what}"}}' in tokenizer.decode(ids)
