"""What a turn of a conversation takes over from those before it."""

import asyncio
import copy
import json

import inside
import pytest
from openai import BadRequestError
from small_app import CHAT, KEY, House

from rollout_server.http.tokens.calls import current
from rollout_server.http.tokens.parsed_messages import CachedPrefix, ParsedMessageCache


def say(role, content, **more):
    return {"role": role, "content": content, **more}


FIRST = [say("system", "Be short."), say("user", "One?")]
SECOND = [*FIRST, say("assistant", "One."), say("user", "Two?")]


# -- what was accepted ------------------------------------------------------------------------


def taken(*requests):
    """A `ParsedMessageCache` with these, and what it kept of each."""
    accepted = ParsedMessageCache()
    for messages in requests:
        accepted.add(messages, [dict(m) for m in messages], accepted.find(messages))
    return accepted


def test_a_request_goes_on_from_all_of_an_earlier_one():
    accepted = taken(FIRST)
    found = accepted.find(copy.deepcopy(SECOND)).messages
    assert found == FIRST and found[0] is not FIRST[0]
    assert accepted.find(FIRST).messages == []  # the last is always new
    assert accepted.find([FIRST[0], say("user", "Another?")]).messages == []
    for messages in (None, "text", {}, [], [None, None, None]):
        assert accepted.find(messages).messages == []
    accepted.add(SECOND, [*found, *SECOND[2:]], accepted.find(SECOND))
    third = [*SECOND, say("assistant", "Two."), say("user", "Three?")]
    assert accepted.find(third).messages == SECOND
    assert accepted.find([*FIRST, say("assistant", "1"), say("user", "Two?")]).messages == []


@pytest.mark.parametrize("old, new", [(1, True), (1, 1.0), (0.0, -0.0), ("1", 1)])
def test_what_python_takes_for_equal_is_told_apart(old, new):
    accepted = taken([say("user", "One?", extra=[old])])
    assert accepted.find([say("user", "One?", extra=[new]), SECOND[-1]]).messages == []
    assert accepted.find([say("user", "One?", extra=[old]), SECOND[-1]]).messages


def test_several_conversations_are_kept():
    others = [[say("user", f"I am {name}.")] for name in "abc"]
    accepted = taken(FIRST, *others, SECOND)
    for messages in (SECOND, *others):
        assert accepted.find([*messages, say("user", "More?")]).messages == messages


async def test_messages_are_parsed_once():
    parsed = []

    async def parse(messages):
        parsed.extend(messages)
        return [{"said": m["content"]} for m in messages], None, None

    earlier = CachedPrefix(SECOND)
    for _ in range(2):
        messages = [*SECOND[:2], say("assistant", "in its place"), *SECOND[3:], say("user", "And?")]
        conversation, *_ = await earlier.parse(messages, "string", parse)
        assert [m["said"] for m in conversation] == [m["content"] for m in messages]
    assert [m["content"] for m in parsed[5:]] == ["in its place", "Two?", "And?"]
    conversation, *_ = await earlier.parse([*SECOND, FIRST[1]], "string", parse)
    assert [m["said"] for m in conversation] == [m["content"] for m in [*SECOND, FIRST[1]]]
    del parsed[:]
    await earlier.parse([*SECOND, FIRST[1]], "string", parse)
    assert parsed == [FIRST[1]]
    await earlier.parse(SECOND, "openai", parse)
    assert len(parsed) == 1 + len(SECOND)


async def test_requests_at_once_parse_for_themselves():
    async def parse(messages):
        await asyncio.sleep(0)
        return [{"said": m["content"]} for m in messages], None, None

    accepted = taken(FIRST)
    messages = list(FIRST)
    for turn in range(3):
        messages += [say("assistant", f"Answer {turn}."), say("user", f"Question {turn}?")]
        earlier = accepted.find(messages)
        left = [*earlier.messages, *messages[len(earlier.messages) :]]
        for made, *_ in await asyncio.gather(
            *(earlier.parse(left, "string", parse) for _ in range(3))
        ):
            assert [m["said"] for m in made] == [m["content"] for m in messages]
        accepted.add(list(messages), left, earlier)
        assert accepted.find([*messages, say("user", "More?")]).messages == messages


# -- the layer, over a small app --------------------------------------------------------------


class Reads:
    """Answers a chat completion, and keeps what messages it was handed."""

    def __init__(self):
        self.handed = []
        self.refuses = lambda messages: False

    async def __call__(self, scope, receive, send):
        messages = json.loads((await receive())["body"]).get("messages")
        self.handed.append(messages)
        status = 400 if self.refuses(messages) else 200
        if status == 200 and isinstance(messages, list):
            call = current.get()
            call.messages = [*call.earlier.messages, *messages]
        await send({"type": "http.response.start", "status": status, "headers": []})
        await send({"type": "http.response.body", "body": b"%d" % len(self.handed)})


@pytest.fixture
def reads():
    """(the app, post): post sends messages in a session, and gives the answer."""
    house = House(app := Reads())

    async def post(messages, key=None, **more):
        return await house.post(CHAT, {"messages": messages, **more}, key)

    return app, post


async def test_the_app_reads_what_is_new(reads):
    app, post = reads
    await post(FIRST)
    await post(SECOND, model="gpt-5")
    edited = [*SECOND[:3], say("user", "Edited.")]
    await post(edited)
    await post([*SECOND, say("user", "More?")], key=KEY)  # no session
    assert app.handed == [FIRST, SECOND[2:], edited, [*SECOND, say("user", "More?")]]


async def test_of_a_request_that_is_refused_the_app_reads_all(reads):
    app, post = reads
    await post(FIRST)
    app.refuses = lambda messages: messages[-1]["content"] == "Two?"
    answer = await post(SECOND)
    assert (answer.status_code, answer.content) == (400, b"3")
    assert app.handed == [FIRST, SECOND[2:], SECOND]
    app.refuses = lambda messages: len(messages) == 2
    assert (await post(SECOND)).status_code == 200  # whatever it had against the cut one
    assert app.handed[3:] == [SECOND[2:], SECOND]


async def test_what_was_not_rendered_is_read_again(reads):
    app, post = reads
    app.refuses = lambda messages: True
    await post(FIRST)
    await post(SECOND)
    await post("no messages")
    assert app.handed == [FIRST, SECOND, "no messages"]


# -- vLLM -------------------------------------------------------------------------------------

ARGUMENTS = '{"what":  "a", "count": 1}'
CALLS = [{"id": "call1", "type": "function", "function": {"name": "f", "arguments": ARGUMENTS}}]
TURNS = [
    [say("system", "Be short."), say("developer", "And kind."), say("user", "Call it.")],
    [say("assistant", None, tool_calls=CALLS), say("tool", "[1]", tool_call_id="call1")],
    [
        say("assistant", "It said one.", reasoning_content="Let me see."),
        say("user", [{"type": "text", "text": "In"}, {"type": "text", "text": "parts?"}]),
    ],
    [say("assistant", "Yes", tool_calls=CALLS), say("tool", "{}", tool_call_id="call1")],
    [say("assistant", "", tool_calls=[]), say("user", "So?", name="me")],
]


# Shows all that vLLM hands to a template, which SmolLM2's leaves the most of out.
TEMPLATE = "{% for m in messages %}<|im_start|>{{ m | tojson }}<|im_end|>{% endfor %}"


@pytest.fixture
def shown(server, monkeypatch):
    """(the server, a function): the messages of the prompt that a client's messages become."""
    tokenizer = inside.chat_tokenizer(server)
    monkeypatch.setattr(tokenizer, "chat_template", TEMPLATE)

    def shown(client, messages):
        answer = client.chat.completions.create(
            model="policy", messages=messages, max_tokens=1, extra_body={"return_token_ids": True}
        )
        text = tokenizer.decode(answer.choices[0].message.model_dump()["prompt_token_ids"])
        parts = text.removesuffix("<|im_end|>").split("<|im_end|>")
        return [json.loads(part.removeprefix("<|im_start|>")) for part in parts]

    return server, shown


def test_prompts_are_what_they_would_be_without_the_turns_before(shown):
    server, shown = shown
    messages = []
    with server.session() as session, session.openai() as client:
        for turn in TURNS:
            messages += turn
            with server.session() as other, other.openai() as fresh:
                conversation = shown(client, messages)
                assert conversation == shown(fresh, messages)
            assert len(conversation) == len(messages) - 1  # what the developer says is the system's
        assert conversation[2]["tool_calls"][0]["function"]["arguments"] == json.loads(ARGUMENTS)
        assert conversation[5]["content"] == "In\nparts?"
        edited = copy.deepcopy(messages)
        edited[3]["tool_calls"][0]["function"]["arguments"] = '{"what": "b"}'
        with server.session() as other, other.openai() as fresh:
            conversation = shown(client, edited)
            assert conversation == shown(fresh, edited)
        assert conversation[2]["tool_calls"][0]["function"]["arguments"] == {"what": "b"}
    recorded = session.tree.messages(session.tree.calls[len(TURNS) - 1])
    assert [m.get("tool_calls") for m in recorded].count(CALLS) == 2


def test_a_message_that_is_refused_is_told_by_its_place_among_all(server):
    bad = [*SECOND, say("assistant", "Two."), say("user", 3)]

    def refused(client):
        with pytest.raises(BadRequestError) as told:
            client.chat.completions.create(model="policy", messages=bad, max_tokens=1)
        return told.value.message

    with server.session() as session, session.openai() as client:
        client.chat.completions.create(model="policy", messages=SECOND, max_tokens=1)
        message = refused(client)
        client.chat.completions.create(model="policy", messages=bad[:-1], max_tokens=1)
    assert len(session.tree.calls) == 2
    with server.openai() as client:
        assert refused(client) == message
