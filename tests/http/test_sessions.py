"""How much a session keeps."""

import json

from small_app import CHAT, House, start

from rollout_server.http.tokens.calls import Generation, Sample, current


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
