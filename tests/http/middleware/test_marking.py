"""Answers are marked with the versions and tokens of each choice."""

import json

import pytest
from small_app import CHAT, COMPLETIONS, KEY, House, events, say, start

from rollout_server.http.tokens.calls import Generation, Sample, current


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
