"""Agents over HTTP: token-exact conversations, sessions, and what is recorded of them."""

import itertools
import json

import httpx
import openai
import pytest
from conversations import SAMPLING, converse, sampled


@pytest.mark.core
def test_each_prompt_of_a_session_begins_with_what_was_sampled(server, tokenizer):
    with server.session() as session, session.openai() as client:
        # So many tokens that some don't survive being text: a dozen do half of the time.
        _, answers = converse(client, 6, logprobs=True, max_tokens=60)
    ends = 0
    for before, after in itertools.pairwise(answers):
        prompt, ids = sampled(before)
        later, _ = sampled(after)
        assert later[: len(prompt) + len(ids)] == prompt + ids
        text = tokenizer.decode(later[len(prompt) + len(ids) :])
        assert text.startswith("<|im_end|>\n<|im_start|>user\nQuestion")
        ends += tokenizer(tokenizer.decode(ids), add_special_tokens=False)["input_ids"] != ids
    assert ends, "every answer survived tokenising its text: nothing was tested"
    (row,) = session.trajectory()
    prompt, ids = sampled(answers[-1])
    assert row.prompt_ids + row.completion_ids == prompt + ids
    assert sum(row.env_mask) == 6 * 60
    logprobs = [x for x, trained in zip(row.logprobs, row.env_mask, strict=True) if trained]
    told = [x for a in answers for x in a.choices[0].message.model_dump()["generation_log_probs"]]
    assert logprobs == told
    assert len(row.messages) == 13 and row.messages[-1]["role"] == "assistant"


@pytest.mark.core
def test_messages_that_carry_their_tokens_need_no_session(server):
    messages, answers = [], []
    with server.openai() as client:
        for turn in range(3):
            messages.append({"role": "user", "content": f"Question {turn}?"})
            answer = client.chat.completions.create(
                model="policy", messages=messages, logprobs=True, **SAMPLING
            )
            answers.append(answer)
            messages.append(answer.choices[0].message.model_dump(exclude_none=True))
        for before, after in itertools.pairwise(answers):
            prompt, ids = sampled(before)
            assert sampled(after)[0][: len(prompt) + len(ids)] == prompt + ids
        # /tokenize tells what a chat request would be given.
        url = server.base_url.removesuffix("/v1") + "/tokenize"
        body = {"model": "policy", "messages": messages[:-1]}
        headers = {"authorization": f"Bearer {server.api_key}"}
        assert (
            httpx.post(url, json=body, headers=headers).json()["tokens"] == sampled(answers[-1])[0]
        )
        # Edited, it is rendered as it is now.
        edited = [dict(m) for m in messages]
        edited[0]["content"] = "Another question?"
        answer = client.chat.completions.create(
            model="policy", messages=edited, logprobs=True, **SAMPLING
        )
        plain = [{"role": m["role"], "content": m["content"]} for m in edited]
        fresh = client.chat.completions.create(
            model="policy", messages=plain, logprobs=True, **SAMPLING
        )
        assert sampled(answer)[0] == sampled(fresh)[0]


def test_a_prefix_that_is_required_is_taken(server):
    with server.openai() as client:
        messages, (first,) = converse(client, 1, logprobs=True)
        prompt, ids = sampled(first)
        messages.append({"role": "user", "content": "More?"})
        extra = {"required_prefix_token_ids": prompt + ids, "ignore_eos": True}
        answer = client.chat.completions.create(
            model="policy", messages=messages, logprobs=True, max_tokens=4, extra_body=extra
        )
        assert sampled(answer)[0][: len(prompt) + len(ids)] == prompt + ids


@pytest.mark.core
def test_a_stream_tells_its_tokens_and_is_recorded(server):
    with server.session() as session, session.openai() as client:
        events = list(
            client.chat.completions.create(
                model="policy",
                messages=[{"role": "user", "content": "Hello"}],
                stream=True,
                logprobs=True,
                **SAMPLING,
            )
        )
        last = next(e for e in events if e.choices and e.choices[0].finish_reason)
        delta = last.choices[0].delta.model_dump()
        assert len(delta["generation_token_ids"]) == len(delta["generation_log_probs"]) == 12
        spans = last.model_dump()["policy_versions"]
        assert spans == [[{"version": server.policy_version, "start": 0, "end": 12}]]
        content = "".join(e.choices[0].delta.content or "" for e in events if e.choices)
        answer = client.chat.completions.create(
            model="policy",
            logprobs=True,
            **SAMPLING,
            messages=[
                {"role": "user", "content": "Hello"},
                {"role": "assistant", "content": content},
                {"role": "user", "content": "And?"},
            ],
        )
        known = delta["prompt_token_ids"] + delta["generation_token_ids"]
        assert sampled(answer)[0][: len(known)] == known
    assert len(session.trajectory()) == 1


def test_an_edited_history_is_a_new_branch(server):
    with server.session() as session, session.openai() as client:
        messages, _ = converse(client, 2)
        messages[2]["content"] = "Something else."
        messages.append({"role": "user", "content": "Go on."})
        client.chat.completions.create(model="policy", messages=messages, **SAMPLING)
    rows = session.trajectory()
    assert len(rows) == 2
    assert sum(sum(row.env_mask) for row in rows) == 3 * 12


def test_a_session_is_named_by_its_url_or_by_its_key(server):
    session = server.session(example=5)
    asked = {"model": "policy", "messages": [{"role": "user", "content": "Hi"}], "max_tokens": 2}
    url = server.base_url + "/chat/completions"
    ours = {"authorization": f"Bearer {session.api_key}"}
    assert httpx.post(url, json=asked, headers=ours, timeout=60).status_code == 200
    named = session.base_url + "/chat/completions"
    assert httpx.post(named, json=asked, timeout=60).status_code == 200
    assert len(session.tree.calls) == 2 and session.metadata == {"example": 5}
    other = server.session()
    theirs = {"authorization": f"Bearer {other.api_key}"}
    assert httpx.post(named, json=asked, headers=theirs).status_code == 401
    reward = httpx.post(
        session.base_url + "/reward", json={"reward": 1, "components": {"format": 0.5}}
    )
    assert reward.json() == {"reward": 1.0, "components": {"format": 0.5}}
    assert session.trajectory()[0].reward == 1.0
    for bad in ({"reward": "1"}, {"components": {"x": None}}, {"points": 1}, [], "x"):
        answer = httpx.post(url.replace("chat/completions", "reward"), json=bad, headers=ours)
        assert answer.status_code == 400, bad
    assert httpx.post(session.base_url + "/reward", content='{"reward": NaN}').status_code == 400
    session.end()
    other.end()
    for answer in (
        httpx.post(url, json=asked, headers=ours),
        httpx.post(named, json=asked),
        httpx.post(session.base_url.replace(session.id, "unknown") + "/reward", json={}),
    ):
        assert answer.status_code == 401


def test_what_an_sdk_asks_for_again_is_answered_once(server):
    with server.session() as session:
        url = session.base_url + "/chat/completions"
        asked = {"model": "policy", "messages": [{"role": "user", "content": "Hi"}]}
        asked |= {"max_tokens": 8, "ignore_eos": True}
        first = httpx.post(url, json=asked, timeout=60)
        again = httpx.post(url, json=asked, headers={"x-stainless-retry-count": "1"}, timeout=60)
        assert again.content == first.content
        assert len(session.tree.calls) == 1
        other = httpx.post(url, json=asked, timeout=60)  # no retry: a sample of its own
        assert other.json()["id"] != first.json()["id"]
        assert len(session.tree.calls) == 2


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"generation_token_ids": [1, 2], "generation_log_probs": [0.0]}, "generation_log_probs"),
        ({"generation_token_ids": [1, -2]}, "generation_token_ids[1] is -2"),
        ({"generation_token_ids": [10**9]}, "generation_token_ids[0]"),
        ({"prompt_token_ids": "abc"}, "prompt_token_ids is 'abc'"),
        ({"prompt_token_ids": [True]}, "prompt_token_ids[0] is True"),
    ],
)
def test_bad_tokens_are_named(server, fields, named):
    messages = [
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "Ho"} | fields,
        {"role": "user", "content": "Hm"},
    ]
    with server.openai() as client, pytest.raises(openai.BadRequestError) as error:
        client.chat.completions.create(model="policy", messages=messages, max_tokens=1)
    assert "messages[1]." + named in str(error.value)


def test_a_session_needs_one_answer_a_call(server):
    asked = {"model": "policy", "messages": [{"role": "user", "content": "Hi"}], "n": 2}
    with server.session() as session:
        answer = httpx.post(session.base_url + "/chat/completions", json=asked)
    assert answer.status_code == 400 and "n=2" in answer.json()["error"]["message"]


def test_an_overlong_conversation_is_told(server):
    with server.session() as session, session.openai() as client:
        messages, _ = converse(client, 1)
        messages.append({"role": "user", "content": "word " * 2000})
        with pytest.raises(openai.BadRequestError, match="maximum context length"):
            client.chat.completions.create(model="policy", messages=messages)


def test_json_in_a_row_round_trips(server):
    from rollout_server.trajectories.export import from_json_line, json_lines

    with server.session() as session, session.openai() as client:
        converse(client, 2)
    session.reward = 0.25
    (line,) = json_lines(session.trajectory())
    assert from_json_line(line) == session.trajectory()[0]
    assert json.loads(line)["reward"] == 0.25
