"""Log-probabilities of the model itself for what was sampled under a grammar."""

import json

import httpx
import openai
import pytest
import torch
from conversations import Asking, sampled
from support import trainer_logprobs

ASKED = {"model": "policy", "messages": [{"role": "user", "content": "Hi"}], "max_tokens": 24}
CHOICE = {"structured_outputs": {"choice": ["certainly not", "of course, why not?"]}}
SCHEMA = {
    "type": "object",
    "properties": {"yes": {"type": "boolean"}},
    "required": ["yes"],
    "additionalProperties": False,
}


def ask(client, temperature=1.0, **fields):
    """A chat answer, with what the model gives for its tokens."""
    fields = CHOICE | {"unmasked_logprobs": True} | fields
    options = {name: fields.pop(name) for name in ("stream", "n") if name in fields}
    return client.chat.completions.create(
        **ASKED, temperature=temperature, extra_body=fields, **options
    )


def far(logprobs, model, prompt_ids, ids):
    """The largest difference from the model's own log-softmax."""
    own = trainer_logprobs(model, prompt_ids, ids)
    own = own.gather(1, torch.tensor(ids)[:, None])[:, 0]
    return (torch.tensor(logprobs) - own).abs().max().item()


def choices(answer):
    return [choice.message.model_dump() for choice in answer.choices]


@pytest.mark.parametrize("temperature", [0, 1])
@pytest.mark.parametrize(
    "grammar",
    [
        CHOICE,
        {"structured_outputs": {"regex": "[0-9]{20}"}},
        {
            "response_format": {
                "type": "json_schema",
                "json_schema": {"name": "answer", "schema": SCHEMA},
            }
        },
    ],
    ids=["choice", "regex", "json"],
)
def test_they_are_the_models(server, shared_model, grammar, temperature):
    with server.openai() as client:
        answer = ask(client, temperature, **{"structured_outputs": None} | grammar)
    (message,) = choices(answer)
    prompt_ids, ids = sampled(answer)
    unmasked, masked = message["generation_log_probs_unmasked"], message["generation_log_probs"]
    assert len(unmasked) == len(ids) > 2 and answer.model_dump()["logprobs_of"]
    assert far(unmasked, shared_model, prompt_ids, ids) < 1e-3
    assert far(masked, shared_model, prompt_ids, ids) > 1


def test_each_choice_has_its_own(server, shared_model):
    with server.openai() as client:
        answer = ask(client, n=3)
    for message in choices(answer):
        tokens = message["prompt_token_ids"], message["generation_token_ids"]
        assert far(message["generation_log_probs_unmasked"], shared_model, *tokens) < 1e-3


def test_cut_offs_and_penalties_change_nothing(server, shared_model):
    fields = {"structured_outputs": None, "top_k": 5, "presence_penalty": 1.5, "logit_bias": {7: 9}}
    with server.openai() as client:
        cut = ask(client, **fields, min_tokens=8)
        (message,) = choices(cut)
        tokens = message["prompt_token_ids"], message["generation_token_ids"]
        assert far(message["generation_log_probs_unmasked"], shared_model, *tokens) < 1e-3
        assert far(message["generation_log_probs"], shared_model, *tokens) > 1
        # With nothing changed, they are what was sampled from.
        (message,) = choices(ask(client, structured_outputs=None))
    assert message["generation_log_probs_unmasked"] == message["generation_log_probs"]


def test_a_stream_ends_with_them(server, shared_model):
    with server.openai() as client:
        events = list(ask(client, stream=True))
    last = next(e for e in events if e.choices and e.choices[0].finish_reason)
    delta = last.choices[0].delta.model_dump()
    tokens = delta["prompt_token_ids"], delta["generation_token_ids"]
    assert far(delta["generation_log_probs_unmasked"], shared_model, *tokens) < 1e-3


def test_a_sessions_rows_have_them(server, shared_model):
    """A free turn, one under a grammar, and one of SGLang's route."""
    messages = list(ASKED["messages"])
    with server.session(unmasked_logprobs=True) as session, session.openai() as client:
        for grammar in ({}, CHOICE):
            asked = ASKED | {"messages": messages}
            answer = client.chat.completions.create(**asked, extra_body=grammar)
            content = answer.choices[0].message.content
            messages += [{"role": "assistant", "content": content}, ASKED["messages"][0]]
        (row,) = session.trajectory()
        url = session.base_url.removesuffix("/v1") + "/generate"
        fields = {"max_new_tokens": 8, "top_k": 3, "ignore_eos": True}
        native = {"input_ids": row.prompt_ids[:3], "sampling_params": fields}
        assert httpx.post(url, json=native, timeout=60).status_code == 200
    _, other = session.trajectory()
    for found in (row, other):
        trained = torch.tensor(found.env_mask).bool()
        own = trainer_logprobs(shared_model, found.prompt_ids, found.completion_ids)
        own = own.gather(1, torch.tensor(found.completion_ids)[:, None])[:, 0]
        unmasked, masked = torch.tensor(found.unmasked_logprobs), torch.tensor(found.logprobs)
        assert torch.allclose(unmasked[trained], own[trained], atol=1e-3)
        assert (unmasked[~trained] == 0).all()
        assert (masked - own)[trained].abs().max() > 1
    ((start, end),) = row.masked
    assert row.logprobs[:start] == row.unmasked_logprobs[:start]
    assert sum(row.env_mask[start:end]) == end - start


@pytest.mark.parametrize("fills", [False, True], ids=["another temperature", "a full context"])
def test_a_row_that_lacks_some_says_so(server, fills):
    longer = {"messages": [{"role": "user", "content": "word " * 960}], "max_tokens": None}
    asked = longer if fills else {"temperature": 0.5}
    with server.session(unmasked_logprobs=True) as session, session.openai() as client:
        extra = {"ignore_eos": True, "top_k": 5}
        answer = client.chat.completions.create(**ASKED | asked, logprobs=True, extra_body=extra)
    message = answer.choices[0].message.model_dump()
    assert (answer.usage.total_tokens == server.max_model_len) == fills
    assert message["generation_log_probs"] and "generation_log_probs_unmasked" not in message
    assert session.trajectory()[0].unmasked_logprobs is None


def test_they_are_left_out_of_what_two_versions_sampled(server):
    with Asking(server, unmasked_logprobs=True, top_k=5) as asked:
        server.sync_weights()
    assert len(asked.versions) == 2
    assert "generation_log_probs_unmasked" not in asked.answer.choices[0].message.model_dump()


def test_what_cannot_be_told_is_refused(server):
    with server.openai() as client:
        for asked, told in (
            ({"temperature": 0.5}, "temperature=0.5: they are told at temperature 1 alone"),
            ({"unmasked_logprobs": "yes"}, "unmasked_logprobs='yes': give true or false"),
        ):
            with pytest.raises(openai.BadRequestError) as error:
                ask(client, **asked)
            assert told in str(error.value)
        with pytest.raises(openai.BadRequestError, match="use /v1/chat/completions, or a session"):
            client.completions.create(
                model="policy", prompt="Hi", extra_body={"unmasked_logprobs": True}
            )
        # Sent back with the messages, as an SDK does.
        (message,) = choices(ask(client))
        message = {name: value for name, value in message.items() if value is not None}
        asked = ASKED | {"messages": [*ASKED["messages"], message, ASKED["messages"][0]]}
        assert client.chat.completions.create(**asked)
        message["generation_log_probs_unmasked"][0] = None
        with pytest.raises(openai.BadRequestError, match=r"unmasked\[0\] is None"):
            client.chat.completions.create(**json.loads(json.dumps(asked)))
