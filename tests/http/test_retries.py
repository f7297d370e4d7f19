"""What is remembered for those who ask again."""

import random

import pytest
from small_app import CHAT, House, say, start

from rollout_server.http.tokens.calls import Generation, Sample, current


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
