"""What a session's key opens."""

import pytest
from small_app import CHAT, KEY, House, start


@pytest.mark.parametrize("path", ["/metrics", "/docs", "/openapi.json", "/version"])
async def test_a_sessions_key_does_not_open_what_is_the_servers(path):
    async def app(scope, receive, send):
        await start(send, b"application/json")
        await send({"type": "http.response.body", "body": b"{}"})

    house = House(app)
    own, theirs = f"/sessions/{house.session.id}{path}", path
    for asked, key in ((theirs, None), (own, None), (own, KEY)):
        answer = await house.get(asked, key)
        assert (answer.status_code, answer.json()["error"]["type"]) == (403, "permission_error")
        assert path in answer.json()["error"]["message"]
    assert (await house.get(path, KEY)).status_code == 200


async def test_a_sessions_key_opens_an_agents_calls():
    async def app(scope, receive, send):
        await start(send, b"application/json")
        await send({"type": "http.response.body", "body": b'{"choices": [{"message": {}}]}'})

    house = House(app)
    for path in (CHAT, "/v1/messages/count_tokens", "/tokenize", "/detokenize", "/generate"):
        assert (await house.post(path)).status_code == 200
    assert (await house.post("/v1/reward", {"reward": 1.0})).json()["reward"] == 1.0
    for path in ("/v1/models", "/v1/models/policy", "/health"):
        assert (await house.get(path)).status_code == 200
    for path in ("/v1/responses/resp_1", "/v1/responses/resp_1/cancel"):
        method = house.post if path.endswith("cancel") else house.get
        assert (await method(path)).status_code == 403
    assert (await house.get("/v1/nothing")).status_code == 404
    assert (await house.get(CHAT)).status_code == 405
