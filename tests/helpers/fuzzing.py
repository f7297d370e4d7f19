"""Requests of no sense, made by hypothesis: mutations of good ones, and JSON of any shape.

What is required of the server, whatever it is sent: an answer, no 5xx but 503, and to go on.
"""

import json
from collections import Counter
from concurrent.futures import ThreadPoolExecutor

import httpx
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st

MESSAGES = [
    {"role": "system", "content": "Be short."},
    {"role": "user", "content": "Hi"},
    {
        "role": "assistant",
        "content": "Ho",
        "prompt_token_ids": [1, 2],
        "generation_token_ids": [3],
        "generation_log_probs": [-0.5],
    },
    {
        "role": "assistant",
        "content": None,
        "tool_calls": [
            {"id": "a", "type": "function", "function": {"name": "f", "arguments": "{}"}}
        ],
    },
    {"role": "tool", "tool_call_id": "a", "content": "4"},
    {"role": "user", "content": [{"type": "text", "text": "Go on"}]},
]
SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}
TOOLS = [{"type": "function", "function": {"name": "f", "description": "x", "parameters": SCHEMA}}]
SAMPLING = {
    "temperature": 1.0,
    "top_p": 1.0,
    "top_k": -1,
    "min_p": 0.0,
    "n": 1,
    "seed": 1,
    "stop": ["x"],
    "frequency_penalty": 0.0,
    "presence_penalty": 0.0,
    "repetition_penalty": 1.0,
    "min_tokens": 0,
    "stop_token_ids": [3],
    "ignore_eos": False,
    "bad_words": ["y"],
    "allowed_token_ids": [5, 6],
    "logit_bias": {"5": 1.0},
    "skip_special_tokens": True,
    "spaces_between_special_tokens": True,
    "include_stop_str_in_output": False,
    "truncate_prompt_tokens": 5,
    "prompt_logprobs": 1,
    "return_token_ids": True,
    "return_tokens_as_token_ids": False,
    "echo": False,
    "add_special_tokens": True,
    "cache_salt": "a",
    "request_id": "a",
    "logprob_token_ids": [1],
    "thinking_token_budget": 5,
    "user": "a",
    "stream_options": {"include_usage": True},
    "required_prefix_token_ids": [1, 2, 3],
    "length_penalty": 1.0,
    "include_reasoning": True,
    "repetition_detection": {"max_pattern_size": 2, "min_pattern_size": 1, "min_count": 2},
    "structured_outputs": {"regex": "a+"},
    "priority": 0,
    "stream": False,
    "session_id": "a",
}
CHAT_ONLY = {
    "tools": TOOLS,
    "tool_choice": "auto",
    "parallel_tool_calls": True,
    "reasoning_effort": "low",
    "response_format": {"type": "json_schema", "json_schema": {"name": "a", "schema": SCHEMA}},
    "add_generation_prompt": True,
    "continue_final_message": False,
    "top_logprobs": 1,
    "chat_template_kwargs": {"enable_thinking": True},
    "logprobs": True,
    "documents": [{"a": "b"}],
    "max_completion_tokens": 2,
}
# path: what is always in a request, and what may be.
ROUTES = {
    "/v1/chat/completions": (
        {"model": "policy", "messages": MESSAGES, "max_tokens": 2},
        SAMPLING | CHAT_ONLY,
    ),
    "/v1/completions": (
        {"model": "policy", "prompt": [5, 6], "max_tokens": 2},
        SAMPLING | {"logprobs": 1, "suffix": "a", "best_of": 1},
    ),
    "/v1/responses": (
        {
            "model": "policy",
            "input": [
                {"role": "user", "content": "Hi"},
                {
                    "type": "message",
                    "role": "assistant",
                    "id": "a",
                    "status": "completed",
                    "content": [{"type": "output_text", "text": "Ho", "annotations": []}],
                },
                {"type": "function_call", "call_id": "b", "name": "f", "arguments": "{}"},
                {"type": "function_call_output", "call_id": "b", "output": "4"},
            ],
            "max_output_tokens": 2,
        },
        SAMPLING
        | {
            "instructions": "a",
            "tools": [{"type": "function", "name": "f", "parameters": SCHEMA}],
            "tool_choice": "auto",
            "text": {"format": {"type": "text"}},
            "store": False,
            "reasoning": {"effort": "low"},
            "truncation": "auto",
            "metadata": {"a": "b"},
            "previous_response_id": "resp_a",
            "background": False,
            "top_logprobs": 1,
            "include": ["message.output_text.logprobs"],
            "max_tool_calls": 1,
            "previous_input_messages": [],
            "prompt": {"id": "a"},
        },
    ),
    "/v1/messages": (
        {
            "model": "policy",
            "max_tokens": 2,
            "messages": [
                {"role": "user", "content": "Hi"},
                {
                    "role": "assistant",
                    "content": [
                        {"type": "text", "text": "a"},
                        {"type": "tool_use", "id": "b", "name": "f", "input": {}},
                    ],
                },
                {
                    "role": "user",
                    "content": [{"type": "tool_result", "tool_use_id": "b", "content": "4"}],
                },
            ],
        },
        {
            "system": "a",
            "temperature": 1.0,
            "top_p": 1.0,
            "top_k": 5,
            "stop_sequences": ["a"],
            "tools": [{"name": "f", "input_schema": SCHEMA}],
            "tool_choice": {"type": "auto"},
            "stream": False,
            "metadata": {"user_id": "a"},
            "thinking": {"type": "enabled", "budget_tokens": 1024},
        },
    ),
    "/v1/messages/count_tokens": (
        {"model": "policy", "messages": MESSAGES[:2][1:]},
        {"system": "a", "tools": []},
    ),
    "/generate": (
        {"input_ids": [5, 6], "sampling_params": {"max_new_tokens": 2, "temperature": 1.0}},
        {
            "text": "a",
            "return_logprob": True,
            "top_logprobs_num": 1,
            "stream": False,
            "rid": "a",
            "logprob_start_len": 0,
            "image_data": None,
            "return_text_in_logprobs": False,
        },
    ),
    "/tokenize": (
        {"model": "policy", "messages": MESSAGES},
        {
            "prompt": "a",
            "add_special_tokens": True,
            "return_token_strs": True,
            "tools": TOOLS,
            "add_generation_prompt": True,
            "continue_final_message": False,
            "chat_template_kwargs": {},
        },
    ),
    "/detokenize": ({"model": "policy", "tokens": [5, 6]}, {}),
    "/v1/reward": ({"reward": 1.0, "components": {"a": 0.5}}, {}),
}

PATIENCE = 240  # seconds

# Values that break things: ends of ranges, wrong types, names and texts that mean something.
NASTY = [
    None,
    True,
    False,
    0,
    1,
    -1,
    2,
    20,
    49151,
    49152,
    2**31,
    2**63 - 1,
    -(2**63),
    2**64,
    10**40,
    0.0,
    -0.0,
    0.5,
    -1.5,
    1e-300,
    1e300,
    "",
    "a",
    "0",
    "policy",
    "\x00",
    "é\U0001f600",
    "{{ 1 }}",
    "{%",
    "<|im_start|>",
    "<|im_end|>",
    "</think>",
    "data:image/png;base64,AAAA",
    "http://[",
    "a{9}",
    "none",
    "auto",
    "required",
    "user",
    "assistant",
    "tool",
    "text",
    "image_url",
    "json_object",
    [],
    {},
    [[]],
    [None],
    [0],
    [-1],
    ["a"],
    [[5]],
    [{}],
    {"a": None},
    {"": 0},
    {"type": "text"},
    {"type": "function", "function": {"name": "f"}},
    {"url": "x"},
    {"regex": "["},
    {"json": {}},
    {"choice": ["a", "b"]},
    {"grammar": "root ::= x"},
    {"json": {"type": "x"}},
    {"json_object": 1},
    [{"type": "text", "text": "a"}],
    [{"role": "user", "content": "a"}],
    [{"type": "text"}],
    {"$ref": "#"},
    {"type": "json_schema", "json_schema": {"name": "a", "schema": {"$ref": "#"}}},
]

anything = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**65), 2**65)
    | st.text(max_size=8)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.sampled_from(NASTY),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3)
    ),
    max_leaves=6,
)
wrong = st.sampled_from(NASTY) | anything


def places(value, before=()):
    """The paths of all that is in a JSON value."""
    if not isinstance(value, (dict, list)):
        return
    for name, inner in value.items() if isinstance(value, dict) else enumerate(value):
        yield (*before, name)
        yield from places(inner, (*before, name))


def short(request, base):
    """With a length: an answer as long as the context is no attack, it only takes its time."""
    for name in ("max_tokens", "max_output_tokens", "sampling_params"):
        if name in base and not request.get(name):  # 0 is none to some routes
            request[name] = base[name]
    fields = request.get("sampling_params")
    if isinstance(fields, dict) and not fields.get("max_new_tokens"):
        fields["max_new_tokens"] = 2
    return request


def holder(value, place):
    for name in place[:-1]:
        value = value[name]
    return value


@st.composite
def mutated(draw, path):
    """A good request for a route, some of its values put out, replaced, or doubled."""
    base, options = ROUTES[path]
    names = draw(st.lists(st.sampled_from(sorted(options) or ["none"]), max_size=3))
    request = json.loads(json.dumps(base | {n: options[n] for n in names if n in options}))
    for _ in range(draw(st.integers(0, 3))):
        known = sorted(places(request), key=repr)
        if not known:
            break
        place = draw(st.sampled_from(known))
        inside, name = holder(request, place), place[-1]
        what = draw(st.sampled_from(["replace", "replace", "replace", "delete", "double", "wrap"]))
        if what == "delete":
            del inside[name]
        elif what == "double" and isinstance(inside, list):
            inside.insert(name, inside[name])
        elif what == "wrap":
            inside[name] = [inside[name]]
        else:
            inside[name] = json.loads(json.dumps(draw(wrong)))
    return short(request, base)


@st.composite
def bodies(draw):
    """(path, the bytes of a body)."""
    path = draw(st.sampled_from(sorted(ROUTES)))
    kind = draw(st.sampled_from(["mutated"] * 8 + ["anything", "bytes"]))
    if kind == "mutated":
        return path, json.dumps(draw(mutated(path))).encode()
    if kind == "anything":
        return path, json.dumps(draw(anything)).encode()
    whole = json.dumps(ROUTES[path][0]).encode()
    at = draw(st.integers(0, len(whole)))
    return path, whole[:at] + draw(st.binary(max_size=4)) + whole[at + draw(st.integers(0, 3)) :]


class Fuzz:
    """Sends bodies to a server and its session; `counts` by status."""

    def __init__(self, server):
        self._server = server
        self._root = server.base_url.removesuffix("/v1")
        self._session = server.session()
        self._client = httpx.Client(timeout=PATIENCE)
        self.counts = Counter()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self._client.close()
        self._session.end()

    def send(self, path, body, in_session):
        headers = {"content-type": "application/json"}
        if in_session:
            url = f"{self._root}/sessions/{self._session.id}{path}"
        else:
            url = self._root + path
            headers["authorization"] = f"Bearer {self._server.api_key}"
        try:
            answer = self._client.post(url, content=body, headers=headers)
        except httpx.HTTPError as error:
            raise AssertionError(f"{path} {body!r}: {error!r}") from error
        status = answer.status_code
        self.counts[status] += 1
        assert status < 500 or status == 503, f"{path} {body!r}: {answer.text[:500]}"
        assert "Traceback" not in answer.text, f"{path} {body!r}: {answer.text[:500]}"
        if status >= 400:
            assert answer.json()["error"]["message"] is not None


def require_answering(server):
    """It answers a normal request, and nothing of others is left behind."""
    with server.openai() as client:
        answer = client.completions.create(model="policy", prompt=[5], max_tokens=2)
    assert answer.usage.completion_tokens >= 1
    assert not server._engine.client.output_processor.has_unfinished_requests()
    assert server.state == "awake"


def fuzz(server, cases, number, clients=4):
    """Send `cases` bodies, from several clients at a time; how many were answered, by status."""
    with ThreadPoolExecutor(clients) as pool, Fuzz(server) as fuzzing:
        runs = [pool.submit(_run, fuzzing, cases // clients, number + i) for i in range(clients)]
        for run in runs:
            run.result()
    require_answering(server)
    return fuzzing.counts


def _run(fuzzing, cases, number):
    @seed(number)
    @settings(
        max_examples=cases,
        deadline=None,
        database=None,
        suppress_health_check=list(HealthCheck),
        phases=[Phase.generate],
        print_blob=False,
    )
    @given(bodies(), st.booleans())
    def send(body, in_session):
        fuzzing.send(*body, in_session)

    send()
