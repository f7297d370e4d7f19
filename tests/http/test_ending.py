"""The end of a session ends its requests."""

import asyncio
import functools
import json
import threading

import pytest
from small_app import CHAT, House, events, say, start
from support import soon

from rollout_server.http.server.limits import Limits

until = functools.partial(soon, within=10)


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
    house = House(app := endless(), limits=Limits(running=2))
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
