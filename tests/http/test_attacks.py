"""An attack table: what a hostile client may try, each line against the running server.

A line is refused with the status that it names, or shown to do no harm; after each the server still
answers, and nothing that it was told to fetch, read or run was fetched, read or run.
"""

import gzip
import json
import re
import socket
import threading
import time
from urllib.parse import urlsplit

import httpx
import pytest
from support import MIB, eventually
from vllm_fields import vllms_app

from rollout_server import RolloutConfig
from rollout_server.errors import ConfigError
from rollout_server.http import routes

pytestmark = pytest.mark.slow

MESSAGES = [{"role": "user", "content": "Hi"}]
CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
RESPONSES, ANTHROPIC = "/v1/responses", "/v1/messages"


def root(server):
    return server.base_url.removesuffix("/v1")


def key(server):
    return {"authorization": f"Bearer {server.api_key}"}


def chat(**fields):
    return CHAT, {"model": "policy", "messages": MESSAGES, "max_tokens": 2} | fields


def completion(**fields):
    return COMPLETIONS, {"model": "policy", "prompt": [5], "max_tokens": 2} | fields


def response(**fields):
    return RESPONSES, {"model": "policy", "input": "Hi", "max_output_tokens": 2} | fields


def anthropic(**fields):
    return ANTHROPIC, {"model": "policy", "messages": MESSAGES, "max_tokens": 2} | fields


def generate(**sampling):
    return "/generate", {"input_ids": [5], "sampling_params": {"max_new_tokens": 2} | sampling}


def with_part(**part):
    return [{"role": "user", "content": [{"type": next(iter(part))} | part]}]


def schema(**fields):
    return {"type": "json_schema", "json_schema": {"name": "a", "schema": fields}}


def post(server, path, request, **options):
    """`request`: JSON, or the bytes of a body."""
    headers = key(server) | {"content-type": "application/json"} | options.pop("headers", {})
    body = request if isinstance(request, bytes) else json.dumps(request).encode()
    return httpx.post(root(server) + path, content=body, headers=headers, timeout=30, **options)


def require_answering(server):
    answer = post(server, *completion())
    assert answer.status_code == 200, answer.text


@pytest.fixture
def answering(server):
    """The shared server, which answers a normal request after the test as before it."""
    yield server
    require_answering(server)


def refused(answer, named):
    """400 in OpenAI's form (or Anthropic's) that names the field."""
    assert answer.status_code == 400, answer.text
    message = answer.json()["error"]["message"]
    assert named in message, message
    assert "Traceback" not in message and "site-packages" not in message


# -- who may call -----------------------------------------------------------------------------


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
        told += [*capfd.readouterr(), caplog.text, server._engine.log_tail(100_000)]
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


# -- which routes -----------------------------------------------------------------------------


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


def raw(server, request, timeout=10):
    """What the server answers to the bytes of a request."""
    url = urlsplit(server.base_url)
    with socket.create_connection((url.hostname, url.port), timeout=timeout) as sock:
        sock.sendall(request)
        answer = b""
        while part := sock.recv(65536):
            answer += part
        return answer


def status_of(server, method, target, *fields):
    lines = [f"{method} {target} HTTP/1.1", "host: x", "connection: close", *fields]
    lines += [f"authorization: Bearer {server.api_key}", "", ""]
    answer = raw(server, "\r\n".join(lines).encode())
    return int(answer.split(b" ", 2)[1]) if answer else 0


class Listening:
    """A port of its own, which nothing may connect to."""

    def __enter__(self):
        self._sock = socket.create_server(("127.0.0.1", 0))
        self.port, self._clients = self._sock.getsockname()[1], []
        threading.Thread(target=self._accept, daemon=True).start()
        return self

    def _accept(self):
        while True:
            try:
                connection, client = self._sock.accept()
            except OSError:
                return
            connection.close()
            self._clients.append(client)

    def connections(self):
        """How many there were before one of our own: they are taken in their order."""
        with socket.create_connection(("127.0.0.1", self.port)) as own:
            eventually(lambda: own.getsockname() in self._clients)
            return self._clients.index(own.getsockname())

    def __exit__(self, *_):
        self._sock.close()


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


# -- what a request may not ask for -----------------------------------------------------------

_DEEP = {"type": "string"}
for _ in range(70):
    _DEEP = {"type": "object", "properties": {"a": _DEEP}}

REFUSED = {
    # templates and what renders them
    "template": (
        *chat(chat_template="{{ cycler.__init__.__globals__.os.popen('id') }}"),
        "chat_template",
    ),
    "template of /tokenize": (
        "/tokenize",
        {"messages": MESSAGES, "chat_template": "{{ 1 }}"},
        "chat_template",
    ),
    **{
        f"template by kwargs: {name}": (
            *chat(chat_template_kwargs={name: value}),
            f"chat_template_kwargs.{name}",
        )
        for name, value in {
            "chat_template": "{{ 1 }}",
            "tokenize": True,
            "tools": [],
            "conversation": [],
            "messages": [],
            "documents": [],
            "return_dict": True,
            "return_tensors": "pt",
            "padding": True,
            "truncation": True,
            "max_length": 1,
            "tokenizer_kwargs": {},
            "return_assistant_tokens_mask": True,
            "__class__": 1,
        }.items()
    },
    "template kwargs of Responses": (
        *response(chat_template_kwargs={"chat_template": "x"}),
        "chat_template",
    ),
    "kwargs that are none": (*chat(chat_template_kwargs="x"), "chat_template_kwargs"),
    "processor": (*chat(mm_processor_kwargs={"num_crops": 10**6}), "mm_processor_kwargs"),
    "media reader": (*chat(media_io_kwargs={"image": {"mode": "x"}}), "media_io_kwargs"),
    # between engines
    "kv transfer": (*chat(kv_transfer_params={"remote_host": "127.0.0.1"}), "kv_transfer_params"),
    "encoder transfer": (*chat(ec_transfer_params={"a": 1}), "ec_transfer_params"),
    "extra arguments": (*completion(vllm_xargs={"a": 1}), "vllm_xargs"),
    "extra arguments, native": (*generate(extra_args={"a": 1}), "extra_args"),
    "priority": (*chat(priority=-100), "priority"),
    # code
    "pickled embeddings": (*completion(prompt_embeds="gASVBQ=="), "prompt_embeds"),
    "pickled embeddings in a message": (
        *chat(messages=with_part(image_embeds="gASV")),
        "image_embeds",
    ),
    "logits processor": (*chat(logits_processors=["os.system"]), "logits_processors"),
    "SGLang's logits processor": (
        "/generate",
        {"input_ids": [5], "custom_logit_processor": "x"},
        "custom_logit_processor",
    ),
    "an adapter": (*chat(lora_request={"lora_path": "/etc"}), "lora_request"),
    # what vLLM would drop
    "backend": (*chat(guided_decoding_backend="outlines"), "guided_decoding_backend"),
    "old grammar": (*chat(guided_regex="a+"), "guided_regex"),
    "beams": (*completion(use_beam_search=True, n=8), "use_beam_search"),
    "best of": (*completion(best_of=10**6), "best_of"),
    # sizes
    "n": (*chat(n=16384), "n=16384"),
    "prompts": (*completion(prompt=[[5]] * 1025), "1025 prompts"),
    "prompts times n": (*completion(prompt=["a"] * 512, n=3), "n=3 for 512 prompts"),
    "prompts, native": ("/generate", {"input_ids": [[5]] * 1025}, "1025 prompts"),
    "max_tokens": (*completion(max_tokens=10**12), "max_tokens"),
    "max_tokens below 0": (*completion(max_tokens=-1), "max_tokens"),
    "all of top_logprobs": (*chat(logprobs=True, top_logprobs=-1), "logprobs"),
    "top_logprobs": (*chat(logprobs=True, top_logprobs=49152), "logprobs"),
    "logprobs": (*completion(logprobs=49152), "logprobs"),
    "logprobs, native": (
        "/generate",
        {"input_ids": [5], "return_logprob": True, "top_logprobs_num": 49152},
        "logprobs",
    ),
    "prompt_logprobs": (*completion(prompt_logprobs=-1), "prompt logprobs"),
    "echoed logprobs": (*completion(echo=True, logprobs=49152), "logprobs"),
    "large number": (*completion(max_tokens=2**63), "64 bits"),
    "prompt": (*completion(prompt="a " * 10**6), "maximum context length"),
    "text to tokenise": ("/tokenize", {"prompt": "a" * (MIB + 1)}, "prompt"),
    "messages to tokenise": (
        "/tokenize",
        {"messages": [{"role": "user", "content": "a" * 2 * MIB}]},
        "messages",
    ),
    "tokens to detokenise": ("/detokenize", {"tokens": [5] * (MIB + 1)}, "tokens"),
    "stop strings": (*completion(stop=["a"] * 100), "stop"),
    "a stop string": (*completion(stop=["a" * 10**6]), "stop"),
    "stop strings of Anthropic": (*anthropic(stop_sequences=["a"] * 100), "stop_sequences"),
    "stop tokens": (*completion(stop_token_ids=[5] * 10**5), "stop_token_ids"),
    "bad words": (*completion(bad_words=["a"] * 10**5), "bad_words"),
    "a bad word": (*completion(bad_words=["a" * 10**5]), "bad_words"),
    "biases": (*completion(logit_bias={str(i): 1 for i in range(40000)}), "logit_bias"),
    "infinite bias": (COMPLETIONS, b'{"prompt": [5], "logit_bias": {"5": 1e999}}', "logit_bias"),
    "request id": (*chat(request_id="a" * 10**6), "request_id"),
    # grammars
    "large grammar": (
        *chat(
            structured_outputs={
                "grammar": "root ::= " + " | ".join(f'"{i}"' for i in range(50_000))
            }
        ),
        "structured_outputs",
    ),
    "long regex": (
        *chat(structured_outputs={"regex": "(a|b)*a" + "(a|b)" * 2000}),
        "structured_outputs.regex",
    ),
    "regex of repeats": (
        *chat(structured_outputs={"regex": "((a{1,1000}){1,1000}){1,1000}"}),
        "structured_outputs.regex",
    ),
    "choices": (
        *chat(structured_outputs={"choice": [str(i) for i in range(2000)]}),
        "structured_outputs.choice",
    ),
    "enum": (*chat(response_format=schema(enum=list(range(2000)))), "enum"),
    "repeats in a schema": (
        *chat(response_format=schema(type="string", pattern="(a{9,999}){9,999}")),
        "pattern",
    ),
    "items": (*chat(response_format=schema(type="array", minItems=10**9)), "minItems"),
    "a schema as text": (
        *chat(structured_outputs={"json": json.dumps({"type": "string", "maxLength": 10**9})}),
        "structured_outputs.json.maxLength",
    ),
    "a schema that is a number": (*chat(structured_outputs={"json": 5}), "structured_outputs"),
    "a grammar that is a number": (*chat(structured_outputs=5), "structured_outputs"),
    "a schema that refers to itself": (
        *chat(
            response_format=schema(**{"$defs": {"a": {"$ref": "#/$defs/a"}}, "$ref": "#/$defs/a"})
        ),
        "grammar",
    ),
    "a tool's schema": (
        *chat(
            tool_choice="required",
            tools=[
                {
                    "type": "function",
                    "function": {
                        "name": "f",
                        "parameters": {
                            "type": "object",
                            "properties": {"a": {"type": "string", "minLength": 10**9}},
                        },
                    },
                }
            ],
        ),
        "minLength",
    ),
    "schema of Responses": (
        *response(
            text={
                "format": {
                    "type": "json_schema",
                    "name": "a",
                    "schema": {"type": "string", "pattern": "(a{1,999}){1,999}"},
                }
            }
        ),
        "pattern",
    ),
    "deep schema": (*chat(response_format=schema(**_DEEP)), "nested"),
    # bodies
    "deep": (CHAT, b"[" * 100_000, "nested"),
    "deep, closed": (CHAT, b'{"a":' * 500 + b"1" + b"}" * 500, "nested"),
    "NaN": (COMPLETIONS, b'{"prompt": [5], "temperature": NaN}', "NaN"),
    "Infinity": (COMPLETIONS, b'{"prompt": [5], "temperature": -Infinity}', "-Infinity"),
    "1e999": (COMPLETIONS, b'{"prompt": [5], "temperature": 1e999}', "temperature"),
    "a number of a million digits": (COMPLETIONS, b'{"prompt": [' + b"9" * 10**6 + b"]}", "JSON"),
    "a name twice": (COMPLETIONS, b'{"prompt": [5], "n": 1, "n": 16384}', "'n' is given twice"),
    "half a character": (COMPLETIONS, b'{"prompt": "\\ud800"}', "surrogate"),
    "no UTF-8": (COMPLETIONS, b'{"prompt": "\xff\xfe"}', "UTF-8"),
    "encoded surrogate": (COMPLETIONS, b'{"prompt": "\xed\xa0\x80"}', "UTF-8"),
    "UTF-16": (COMPLETIONS, '{"prompt": [5]}'.encode("utf-16"), "UTF-8"),
    "no object": (CHAT, b"[1, 2]", ""),
    "nothing": (CHAT, b"", ""),
    "an empty message list": (*chat(messages=[]), ""),
    "token out of the vocabulary": (*completion(prompt=[49152]), ""),
    "token below 0": (*completion(prompt=[-1]), ""),
    "token too large for the machine": ("/detokenize", {"tokens": [10**30]}, ""),
    "stop token of a stranger": (*completion(stop_token_ids=[10**18]), "stop_token_ids"),
    "seed": (*completion(seed=2**80), "64 bits"),
    "top_k": (*completion(top_k=2**80), ""),
    "temperature": (*completion(temperature=1e300), "temperature"),
    "native types": (*generate(temperature="hot"), "temperature"),
    "native objects": (*generate(structured_outputs={"regex": "a"}), "structured_outputs"),
    "native output kind": (*generate(output_kind=7), "output_kind"),
    "native id": ("/generate", {"input_ids": [5], "rid": {"a": 1}}, "rid"),
}


@pytest.mark.parametrize("attack", REFUSED)
def test_it_is_refused_by_name(answering, attack):
    path, request, named = REFUSED[attack]
    started = time.perf_counter()
    refused(post(answering, path, request), named)
    assert time.perf_counter() - started < 5


@pytest.mark.parametrize("where", ["url", "session", "gemini"])
def test_no_way_around_the_refusals(answering, where):
    path, request = chat(chat_template="{{ 1 }}")
    with answering.session() as session:
        prefix = {"url": "", "session": f"/sessions/{session.id}", "gemini": "/v1beta/openai"}
        path = prefix[where] + (path.removeprefix("/v1") if where == "gemini" else path)
        refused(post(answering, path, request), "chat_template")


MEDIA = {
    "image": lambda url: chat(messages=with_part(image_url={"url": url})),
    "image as text": lambda url: chat(messages=with_part(image_url=url)),
    "audio": lambda url: chat(messages=with_part(audio_url={"url": url})),
    "video": lambda url: chat(messages=with_part(video_url={"url": url})),
    "another type": lambda url: chat(
        messages=[{"role": "user", "content": [{"type": "text", "text": "", "image_url": url}]}]
    ),
    "tool's result": lambda url: chat(
        messages=[
            {
                "role": "tool",
                "tool_call_id": "1",
                "content": [{"type": "image_url", "image_url": url}],
            },
        ]
    ),
    "Responses": lambda url: response(
        input=[{"role": "user", "content": [{"type": "input_image", "image_url": url}]}]
    ),
    "file of Responses": lambda url: response(
        input=[{"role": "user", "content": [{"type": "input_file", "file_url": url}]}]
    ),
    "output of Responses": lambda url: response(
        input=[
            {
                "type": "function_call_output",
                "call_id": "1",
                "output": [{"type": "input_image", "image_url": url}],
            }
        ]
    ),
    "Anthropic": lambda url: anthropic(
        messages=with_part(image=None, source={"type": "url", "url": url})
    ),
    "Anthropic's tool result": lambda url: anthropic(
        messages=[
            {
                "role": "user",
                "content": [
                    {
                        "type": "tool_result",
                        "tool_use_id": "1",
                        "content": [{"type": "image", "source": {"type": "url", "url": url}}],
                    }
                ],
            }
        ]
    ),
    "/tokenize": lambda url: ("/tokenize", {"messages": with_part(image_url={"url": url})}),
    "count_tokens": lambda url: (
        ANTHROPIC + "/count_tokens",
        {"model": "policy", "messages": with_part(image=None, source={"type": "url", "url": url})},
    ),
    "MCP": lambda url: response(
        tools=[{"type": "mcp", "server_label": "a", "server_url": url, "require_approval": "never"}]
    ),
}


@pytest.mark.parametrize("kind", MEDIA)
def test_nothing_is_fetched(answering, kind):
    with Listening() as listening:
        for url in (
            f"http://127.0.0.1:{listening.port}/a.png",
            f"HTTP://127.0.0.1:{listening.port}/a",
            f" http://127.0.0.1:{listening.port}/",
            f"https://127.0.0.1:{listening.port}/a",
            "file:///etc/passwd",
            "/etc/passwd",
            "ftp://127.0.0.1/",
            "data :,a",
        ):
            answer = post(answering, *MEDIA[kind](url))
            assert answer.status_code == 400, (url, answer.text)
            assert "root:" not in answer.text
        assert listening.connections() == 0


def test_data_for_a_model_that_takes_none_does_no_harm(answering):
    for kind in ("image_url", "audio_url", "video_url"):
        part = with_part(**{kind: {"url": "data:image/png;base64,AAAA"}})
        refused(post(answering, *chat(messages=part)), "not a multimodal model")


def test_a_schema_that_refers_elsewhere_fetches_nothing(answering):
    with Listening() as listening:
        where = f"http://127.0.0.1:{listening.port}/schema.json"
        answer = post(answering, *chat(response_format=schema(**{"$ref": where})))
        assert answer.status_code in (200, 400)
        assert listening.connections() == 0


@pytest.mark.parametrize("name", ["/etc/passwd", "../../etc", "policy/../x", "a\x00b", "x" * 10**5])
def test_a_models_name_is_no_path(answering, name):
    answer = post(answering, *completion(model=name))
    assert answer.status_code == 404, answer.text[:200]


HARMLESS = {
    "documents": chat(documents=[{"title": "a", "text": "{{ 7 * 7 }}"}]),
    "salt": chat(cache_salt="a"),
    "greedy regex": chat(structured_outputs={"regex": "(a+)+b"}),
    "grammar that is ambiguous": chat(structured_outputs={"grammar": 'root ::= root root | "a"'}),
    "as many answers as are let": completion(n=64, max_tokens=1),
    "zero bytes": completion(prompt="a\x00b"),
    "the same id twice": chat(request_id="same"),
    "small probabilities": completion(temperature=1e-300, top_p=1e-300),
    "penalties": completion(repetition_penalty=1e300),
    "tokens of no meaning": ("/detokenize", {"tokens": [0, 49151]}),
    "a role of no meaning": chat(messages=[{"role": "root", "content": "x"}]),
}


@pytest.mark.parametrize("attack", HARMLESS)
def test_it_does_no_harm(answering, attack):
    started = time.perf_counter()
    answer = post(answering, *HARMLESS[attack])
    assert answer.status_code == 200, answer.text
    assert time.perf_counter() - started < 10


def test_a_template_in_a_message_is_text(answering):
    said = "{{ 7 * 7 }}{% x %}"
    messages = [{"role": "user", "content": said}]
    tokens = post(answering, "/tokenize", {"model": "policy", "messages": messages}).json()[
        "tokens"
    ]
    prompt = post(answering, "/detokenize", {"model": "policy", "tokens": tokens}).json()["prompt"]
    assert said in prompt


def test_requests_with_one_id_are_told_apart(answering):
    """An id that a client makes up neither ends nor answers another's request."""
    from concurrent.futures import ThreadPoolExecutor

    path, request = completion(request_id="same", max_tokens=20, ignore_eos=True)
    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(lambda _: post(answering, path, request), range(8)))
    assert {a.json()["usage"]["completion_tokens"] for a in answers} == {20}


# -- HTTP itself ------------------------------------------------------------------------------


def test_headers_that_steer_vllm_are_refused(answering):
    refused(post(answering, *chat(), headers={"x-data-parallel-rank": "5"}), "data-parallel")
    body = gzip.compress(json.dumps(chat()[1]).encode())
    refused(post(answering, CHAT, body, headers={"content-encoding": "gzip"}), "content-encoding")
    for kind in (
        "text/plain",
        "application/x-www-form-urlencoded",
        "multipart/form-data",
        "a" * 999,
    ):
        answer = post(answering, *chat(), headers={"content-type": kind})
        assert answer.status_code in (400, 415), kind


def test_forwarded_addresses_change_nothing(answering):
    headers = {"x-forwarded-for": "127.0.0.1", "x-forwarded-host": "a", "forwarded": "for=a"}
    answer = httpx.get(root(answering) + "/version", headers=headers)
    assert answer.status_code == 401


def smuggled(server, *fields, body=b""):
    head = [f"POST {COMPLETIONS} HTTP/1.1", "host: x", *fields, "connection: close"]
    head += [f"authorization: Bearer {server.api_key}", "content-type: application/json", "", ""]
    return raw(server, "\r\n".join(head).encode() + body)


def test_requests_of_two_lengths_are_refused(answering):
    for fields in (
        ["content-length: 4", "transfer-encoding: chunked"],
        ["content-length: 4", "content-length: 5"],
        ["content-length: -1"],
        ["content-length: 1e9"],
        ["content-length: 99999999999999999999"],
        ["transfer-encoding: chunked, identity"],
    ):
        answer = smuggled(answering, *fields, body=b"4\r\nabcd\r\n0\r\n\r\n")
        assert answer.split(b" ", 2)[1] in (b"400", b"413"), (fields, answer)


def test_garbage_is_refused(answering):
    for garbage in (
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(100) + b"\r\n\r\n",
        b"GET\r\n\r\n",
        b"GET / HTTP/9.9\r\n\r\n",
        b"\x00" * 1000,
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
        b"GET /\x00 HTTP/1.1\r\n\r\n",
        b"GET / HTTP/1.1\r\na\x00b: c\r\n\r\n",
        b"GET / HTTP/1.1\r\n: c\r\n\r\n",
        b"GET http:// HTTP/1.1\r\nhost: x\r\n\r\n",
    ):
        answer = raw(answering, garbage)
        assert answer.split(b" ", 2)[1] in (b"400", b"401", b"404", b"505"), (garbage, answer)


def test_large_headers_are_refused(answering):
    many = [f"x-{i}: y" for i in range(1000)]
    assert status_of(answering, "GET", "/version", *many) == 431
    assert status_of(answering, "GET", "/version", "x: " + "y" * 100_000) == 431
    assert status_of(answering, "GET", "/version?" + "y" * 65_000, "x: " + "y" * 900) == 431
    assert status_of(answering, "GET", "/version?" + "y" * 100_000) in (400, 431)
    assert status_of(answering, "GET", "/version?" + "y" * 10_000) == 200
    # One that never ends isn't waited for.
    url = urlsplit(answering.base_url)
    with socket.create_connection((url.hostname, url.port), timeout=20) as sock:
        sock.sendall(b"GET / HTTP/1.1\r\nx: ")
        with pytest.raises(OSError):  # a reset, or a broken pipe
            while True:
                sock.sendall(b"y" * 65536)


@pytest.mark.parametrize("head", ["x: ", "content-length: 9999999999\r\n\r\n"])
def test_who_is_refused_while_sending_reads_why(answering, head):
    """No reset comes in the place of the answer, or of its end."""
    url = urlsplit(answering.base_url)
    start = f"POST {COMPLETIONS} HTTP/1.1\r\nauthorization: Bearer {answering.api_key}\r\n{head}"
    with socket.create_connection((url.hostname, url.port), timeout=20) as sock:
        sock.sendall(start.encode() + b"y" * 70_000)
        answer = sock.recv(65536)  # it is refused, and goes on sending
        for _ in range(20):
            sock.sendall(b"y" * 65536)
        sock.shutdown(socket.SHUT_WR)
        while part := sock.recv(65536):
            answer += part
    assert int(answer.split(b" ", 2)[1]) in (413, 431)
    assert b"too large" in answer or b"send less" in answer


def test_large_bodies_are_refused(answering):
    most = RolloutConfig().max_body_bytes
    answer = smuggled(answering, f"content-length: {most + 1}")  # before it is sent
    assert answer.startswith(b"HTTP/1.1 413"), answer

    def endless():
        for _ in range(100):
            yield b" " * MIB

    try:
        answer = httpx.post(root(answering) + CHAT, content=endless(), headers=key(answering))
    except httpx.WriteError:
        pass  # cut while it was sent
    else:
        assert answer.status_code == 413


def test_chunked_bodies_are_taken(answering):
    body = json.dumps(completion()[1]).encode()
    answer = httpx.post(
        root(answering) + COMPLETIONS,
        content=(bytes([b]) for b in body),
        timeout=30,
        headers=key(answering) | {"content-type": "application/json"},
    )
    assert answer.status_code == 200, answer.text
