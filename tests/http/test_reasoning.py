"""Reasoning models in sessions: what is reasoning, and what is not, at every turn."""

import copy
import itertools

import pytest
import templates
from conversations import converse_by_messages, converse_by_responses
from scripted import chain, scripted
from support import MIB
from transformers import AddedToken

from rollout_server import attach

CALL = '\n{"name": "look_up", "arguments": {"what": "it"}}\n'
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "look_up",
            "parameters": {"type": "object", "properties": {"what": {"type": "string"}}},
        },
    }
]
THOUGHT, SAID = "Because of that", "Two words"


class Words:
    """A tokenizer whose template doesn't open the reasoning, and what a policy says with it."""

    def __init__(self):
        self.tokenizer = copy.deepcopy(templates.case("qwen3").tokenizer)
        self.tokenizer.add_tokens([AddedToken(CALL, normalized=False)])
        thought, said, (start,) = map(self.ids, (THOUGHT, SAID, "\n"))
        opened, closed, called, end, call = map(
            self.id, ("<think>", "</think>", "<tool_call>", "</tool_call>", CALL)
        )
        stop = self.tokenizer.eos_token_id
        self.script = chain(start, opened, *thought, closed, said[0])
        self.script |= chain(*said, stop) | chain(called, call, end, stop)
        self.script[closed].append(called)
        self.calls = {str(called): 20}  # a bias
        self.turn = [opened, *thought, closed, *said, stop]
        self.calling_turn = [opened, *thought, closed, called, call, end, stop]

    def ids(self, text):
        return self.tokenizer.encode(text, add_special_tokens=False)

    def id(self, token):
        return self.tokenizer.convert_tokens_to_ids(token)


@pytest.fixture(scope="module")
def words():
    return Words()


@pytest.fixture(scope="module", params=["deepseek_r1", "qwen3"])
def server(request, words):
    model = scripted(words.tokenizer, words.script)
    with attach(
        model,
        words.tokenizer,
        reasoning_parser=request.param,
        tool_call_parser="hermes",
        kv_cache_memory_bytes=64 * MIB,
        progress=False,
    ) as server:
        yield server


def chat(client, messages, stream, **asked):
    """The answer's message, with reasoning and content as they came."""
    asked = dict(model="policy", messages=messages, temperature=0, max_tokens=40) | asked
    if not stream:
        return (
            client.chat.completions.create(**asked).choices[0].message.model_dump(exclude_none=True)
        )
    message = {"role": "assistant", "content": "", "reasoning": ""}
    calls = {}
    for event in client.chat.completions.create(**asked, stream=True):
        for choice in event.choices:
            delta = choice.delta.model_dump(exclude_none=True)
            for name in ("content", "reasoning"):
                message[name] += delta.get(name) or ""
            for call in delta.get("tool_calls") or ():
                kept = calls.setdefault(call["index"], {"id": "", "name": "", "arguments": ""})
                kept["id"] += call.get("id") or ""
                for name, text in call["function"].items():
                    kept[name] += text or ""
    if calls:
        message["tool_calls"] = [
            {"id": c.pop("id"), "type": "function", "function": c} for c in calls.values()
        ]
    return message


def goes_on(session, turns):
    """Every prompt begins with the one before and what that sampled; and these were sampled."""
    calls = [session.tree.tokens(call) for call in session.tree.calls]
    assert [ids for _, ids in calls] == turns
    for (prompt, ids), (later, _) in itertools.pairwise(calls):
        assert later[: len(prompt) + len(ids)] == prompt + ids
    assert len(session.trajectory()) == 1


def _answer(call):
    message = call.messages[-1]
    return message["reasoning"], message["content"]


@pytest.mark.parametrize("sends", ["reasoning", "reasoning_content", None])
@pytest.mark.parametrize("stream", [False, True])
def test_reasoning_is_reasoning_at_every_turn(server, words, stream, sends):
    """Whatever of it the client sends back."""
    with server.session() as session, session.openai() as client:
        messages = []
        for turn in range(3):
            messages.append({"role": "user", "content": f"Question {turn}?"})
            answer = chat(client, messages, stream)
            assert (answer["reasoning"], answer["content"]) == (THOUGHT, SAID)
            back = {"role": "assistant", "content": answer["content"]}
            messages.append(back | ({sends: answer["reasoning"]} if sends else {}))
        goes_on(session, [words.turn] * 3)
        for call in session.tree.calls:
            assert _answer(call) == (THOUGHT, SAID)


@pytest.mark.parametrize("stream", [False, True])
def test_reasoning_before_calls_of_tools(server, words, stream):
    with server.session() as session, session.openai() as client:
        messages = [{"role": "user", "content": "Look it up."}]
        for turn in range(4):
            calls = turn < 3
            bias = words.calls if calls else {}
            answer = chat(client, messages, stream, tools=TOOLS, logit_bias=bias)
            assert answer["reasoning"] == THOUGHT
            assert (answer.get("content") or "").strip() == ("" if calls else SAID)
            messages.append(answer)
            if calls:
                (call,) = answer["tool_calls"]
                assert call["function"] == {"name": "look_up", "arguments": '{"what": "it"}'}
                messages.append({"role": "tool", "tool_call_id": call["id"], "content": "It is 4."})
        goes_on(session, [words.calling_turn] * 3 + [words.turn])


@pytest.mark.parametrize("stream", [False, True])
def test_reasoning_that_was_cut_off(server, words, stream):
    """The next turn's is its own, whether or not the one before came to its end."""
    with server.session() as session, session.openai() as client:
        messages = []
        for turn, most in enumerate((3, 40, 40)):
            messages.append({"role": "user", "content": f"Question {turn}?"})
            answer = chat(client, messages, stream, max_tokens=most)
            if turn:
                assert (answer["reasoning"], answer["content"]) == (THOUGHT, SAID)
            else:
                assert THOUGHT.startswith(answer["reasoning"]) and not answer.get("content")
            messages.append({"role": "assistant", "content": answer.get("content") or ""})
        goes_on(session, [words.turn[:3], words.turn, words.turn])


@pytest.mark.parametrize("stream", [False, True])
def test_reasoning_in_responses(server, words, stream):
    with server.session() as session, session.openai() as client:
        asked = dict(max_output_tokens=40, temperature=0)
        for answer in converse_by_responses(client, 3, stream, **asked):
            reasoning, _ = answer.output
            assert reasoning.content[0].text == THOUGHT and answer.output_text == SAID
        goes_on(session, [words.turn] * 3)
        assert {_answer(call) for call in session.tree.calls} == {(THOUGHT, SAID)}


@pytest.mark.parametrize("stream", [False, True])
def test_reasoning_in_anthropics_messages(server, words, stream):
    with server.session() as session:
        asked = dict(max_tokens=40, extra_body={"temperature": 0})
        for answer in converse_by_messages(session, 3, stream, **asked):
            thinking, text = answer.content
            assert (thinking.thinking, text.text) == (THOUGHT, SAID)
        goes_on(session, [words.turn] * 3)
        assert {_answer(call) for call in session.tree.calls} == {(THOUGHT, SAID)}


@pytest.mark.parametrize("route", ["chat", "responses"])
def test_a_grammar_is_for_what_comes_after_the_reasoning(server, words, route):
    grammar = {"structured_outputs": {"choice": ["nought", "one"]}}
    with server.session() as session, session.openai() as client:
        messages = []
        for turn in range(3):
            messages.append({"role": "user", "content": f"Question {turn}?"})
            if route == "chat":
                answer = chat(client, messages, False, extra_body=grammar)
                thought, text = answer.get("reasoning"), answer.get("content")
            else:
                answer = client.responses.create(
                    model="policy",
                    input=messages,
                    max_output_tokens=40,
                    temperature=0,
                    extra_body=grammar,
                )
                thought, text = answer.output[0].content[0].text, answer.output_text
            assert thought == THOUGHT and text in ("nought", "one")
            messages.append({"role": "assistant", "content": text})
        assert len(session.trajectory()) == 1
