"""Which routes a running server has."""

import re

import pytest
from attacks import CHAT
from hostile import raw, status_of
from vllm_fields import vllms_app

from rollout_server.http import routes

pytestmark = pytest.mark.slow


def vllm_routes(app):
    """Each (method, path) that vLLM's app has, {parameters} filled in."""
    waiting, found = [*app.routes], set()
    while waiting:
        route = waiting.pop()
        inner = getattr(getattr(route, "original_router", None), "routes", None)
        waiting += inner or []
        if path := getattr(route, "path", None):
            path = re.sub(r"\{[^}]*\}", "x", path)
            found |= {(method, path) for method in getattr(route, "methods", None) or {"GET"}}
    return found


def disguised(path):
    yield path
    yield path + "/"
    yield "/" + path
    yield path.replace("/", "//")
    yield path.swapcase()
    yield "/v1/models/.." + path
    yield "/v1/models/%2e%2e" + path
    yield "/v1/%2e%2e" + path
    yield "/health/.." + path
    yield "/v1beta/openai" + path
    yield "/v1beta/openai/.." + path
    yield path + "%00"
    yield path + ";a=b"
    yield path + "%3f"
    yield "/%2e" + path
    yield path.replace("/", "/%2f", 1)
    yield path.replace("/", "%5c", 1)
    yield "http://127.0.0.1" + path


def test_no_route_but_those_of_the_list(answering):
    """Every route of vLLM's own app, under every disguise and method."""
    server = answering
    every = vllm_routes(vllms_app())
    assert len(every) > 20
    # What vLLM registers in other set-ups (development mode, LoRA, elastic, profiler, ...).
    every |= {
        ("POST", path)
        for path in (
            "/sleep",
            "/wake_up",
            "/collective_rpc",
            "/pause",
            "/resume",
            "/reset_prefix_cache",
            "/reset_mm_cache",
            "/reset_encoder_cache",
            "/init_weight_transfer_engine",
            "/update_weights",
            "/start_weight_update",
            "/finish_weight_update",
            "/scale_elastic_ep",
            "/is_scaling_elastic_ep",
            "/v1/load_lora_adapter",
            "/v1/unload_lora_adapter",
            "/start_profile",
            "/stop_profile",
            "/abort_requests",
            "/invocations",
            "/fault_tolerance",
        )
    }
    every |= {
        ("GET", path)
        for path in (
            "/is_sleeping",
            "/is_paused",
            "/server_info",
            "/tokenizer_info",
            "/get_world_size",
            "/load",
            "/ping",
            "/redoc",
            "/docs/oauth2-redirect",
        )
    }
    refused = [(m, p) for m, p in every if not routes.known(m, p) and not routes.methods(p)]
    assert len(refused) > 30
    states = server.state, server.policy_version
    with server.session() as session:
        for method, path in sorted(refused):
            targets = [*disguised(path), f"/sessions/{session.id}{path}"]
            for target in targets if method != "HEAD" else [path]:
                for other in {method, "GET", "POST"} if target == path else {method}:
                    got = status_of(server, other, target)
                    # /v1/models/<anything> is a model's name, which isn't served, and only read.
                    named = "/models/" in target and other != "GET"
                    assert got in (400, 401, 404) or (named and got == 405), (other, target, got)
    for method in ("PUT", "DELETE", "PATCH", "OPTIONS", "TRACE", "CONNECT", "BREW"):
        for path in (CHAT, "/sleep", "/v1/models", "/metrics"):
            got = status_of(server, method, path)
            assert got in (400, 404, 405), (method, path, got)
    assert (server.state, server.policy_version) == states


@pytest.mark.parametrize("path", ["/sleep", "/collective_rpc", CHAT, "/v1/realtime", "/metrics"])
def test_a_websocket_is_no_way_in(answering, path):
    fields = ["connection: upgrade", "upgrade: websocket", "sec-websocket-version: 13"]
    fields += ["sec-websocket-key: dGhlIHNhbXBsZSBub25jZQ=="]
    lines = [f"GET {path} HTTP/1.1", "host: x", *fields]
    lines += [f"authorization: Bearer {answering.api_key}", "connection: close", "", ""]
    answer = raw(answering, "\r\n".join(lines).encode(), timeout=100)
    assert not answer.startswith(b"HTTP/1.1 101")
