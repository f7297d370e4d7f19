"""Who may call a running server, and what it tells of its keys."""

from urllib.parse import urlsplit

import httpx
import inside
import pytest
from attacks import CHAT, chat, completion
from hostile import post
from over_http import key, root

from rollout_server import RolloutConfig
from rollout_server.errors import ConfigError

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.0.2.1", "example.org"])
def test_a_weak_key_is_refused_where_others_can_reach_it(host):
    with pytest.raises(ConfigError, match=r"api_key.*16 characters") as error:
        RolloutConfig(host=host, api_key="fifteen-letters")
    assert "fifteen-letters" not in str(error.value)
    RolloutConfig(host=host, api_key="sixteen--letters")
    RolloutConfig(host=host)  # one is made
    for loopback in ("127.0.0.1", "::1", "localhost"):
        RolloutConfig(host=loopback, api_key="short")


def test_it_listens_on_loopback_and_makes_a_long_key(server):
    assert urlsplit(server.base_url).hostname == "127.0.0.1"
    assert len(server.api_key) >= 43  # 256 bits


@pytest.mark.parametrize("path", ["/docs", "/openapi.json", "/metrics", "/version", "/v1/models"])
def test_all_but_health_needs_the_key(server, path):
    assert httpx.get(root(server) + path).status_code == 401
    assert httpx.get(root(server) + path, headers=key(server)).status_code == 200
    other = key(server)["authorization"][:-1] + "x"
    assert httpx.get(root(server) + path, headers={"authorization": other}).status_code == 401
    assert httpx.get(root(server) + "/health").status_code == 200


def test_two_keys_are_no_key(server):
    wrong = ("authorization", "Bearer wrong")
    right = ("authorization", f"Bearer {server.api_key}")
    for headers in ([wrong, right], [right, wrong], [right, right]):
        assert httpx.get(root(server) + "/version", headers=headers).status_code == 401


def test_a_session_opens_itself_alone(answering):
    server = answering
    with server.session() as mine, server.session() as other:
        url = mine.base_url.removesuffix("/v1")
        for theirs in ({"authorization": f"Bearer {other.api_key}"}, {"x-api-key": other.api_key}):
            assert httpx.post(url + CHAT, json=chat()[1], headers=theirs).status_code == 401
        for path in (
            f"/sessions/{mine.id[:-1]}/v1/models",
            f"/sessions/{mine.id.swapcase()}/v1/models",
            f"/sessions//{mine.id}/v1/models",
            f"//sessions/{mine.id}/v1/models",
            f"/sessions/{mine.id}%00/v1/models",
            "/sessions/%2e/v1/models",
        ):
            assert httpx.get(root(server) + path).status_code == 401, path
        for path in (f"/sessions/{mine.id}/sessions/{other.id}{CHAT}", f"/v1/../{mine.id}{CHAT}"):
            answer = httpx.post(root(server) + path, json=chat()[1], headers=key(server))
            assert answer.status_code == 404, path
        assert not mine.tree.calls and not other.tree.calls
    assert httpx.get(mine.base_url + "/models").status_code == 401


def test_keys_are_told_nowhere(answering, capfd, caplog, tmp_path):
    server = answering
    with server.session() as session:
        secrets = [server.api_key, session.api_key, session.id]
        url = session.base_url.removesuffix("/v1")
        told = [
            repr(server),
            server._repr_html_(),
            repr(session),
            repr(RolloutConfig(api_key=server.api_key)),
        ]
        for _ in range(2):
            told += [httpx.post(url + CHAT, json=chat()[1], timeout=30).text]
            told += [httpx.post(url + "/nothing", json={}).text, httpx.get(url + CHAT).text]
            told += [post(server, CHAT, b"{").text, post(server, *chat(n="x")).text]
            told += [httpx.get(root(server) + "/version", headers=key(session)).text]
            told += [httpx.get(root(server), headers=key(server) | {"x": "y"}).text]
        told += [httpx.get(root(server) + "/metrics", headers=key(server)).text]
        told += [str(error_of(server.sync_weights().__getattribute__, "nothing"))]
        told += [*capfd.readouterr(), caplog.text, inside.engine(server).log_tail(100_000)]
    for secret in secrets:
        assert not any(secret in text for text in told)


def error_of(call, *args):
    with pytest.raises(AttributeError) as error:
        call(*args)
    return error.value


def test_no_other_origin_is_let_in(server):
    origin = {"origin": "https://example.org", "access-control-request-method": "POST"}
    asked = httpx.options(root(server) + CHAT, headers=origin)
    assert asked.status_code == 401
    asked = httpx.options(root(server) + CHAT, headers=origin | key(server))
    assert asked.status_code == 405
    answer = post(server, *completion(), headers=origin)
    for one in (asked, answer):
        assert not [name for name in one.headers if name.startswith("access-control")]
