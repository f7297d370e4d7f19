"""The cases of templates.py themselves: that they are what the tests with them take them for."""

from random import Random

import played
import pytest
import templates
from played import play, render, rendered_text

USER = {"role": "user", "content": "Well?"}


@pytest.fixture(params=templates.NAMES)
def case(request):
    return templates.case(request.param)


def said(case, content="Two words.", reasoning="Because.", calls=0):
    """An assistant's message."""
    message = {"role": "assistant", "content": content}
    if case.reasons:
        message["reasoning_content"] = reasoning
    if calls:
        functions = [
            {"name": "lookup", "arguments": '{"query": "é \\"q\\"", "limit": 3}'},
            {"name": "run_code", "arguments": '{"source": "x = 1\\n"}'},
        ]
        message["tool_calls"] = [{"type": "function", "function": f} for f in functions[:calls]]
    return message


def written(case, message):
    """What the policy writes for a message, as text."""
    parts = case.format.write(message, lambda text: text)
    return "".join("".join(part) for part in parts)


def fields(message):
    """A message without the ids of its calls."""
    calls = [call["function"] for call in message.get("tool_calls", [])]
    return message.get("content") or "", message.get("reasoning_content"), calls


def test_three_turns_are_rendered(case):
    messages = [{"role": "system", "content": "Be short."}] * case.takes_system
    for content in ("One.", "Two.", "Three."):
        messages += [USER, said(case, content)]
    text = rendered_text(case, [*messages, USER])
    assert text.index("One.") < text.index("Two.") < text.index("Three.") < text.rindex("Well?")
    assert ("Be short." in text) is case.takes_system
    assert ("lookup" in text) is case.renders_tools
    assert ("Because." in text) is (case.reasons and not case.strips_reasoning)
    ids = render(case, [*messages, USER])
    assert case.tokenizer.decode(ids, skip_special_tokens=False).count("Well?") == 4


def test_what_the_policy_writes_is_what_the_template_renders(case):
    messages = [said(case)]
    if case.renders_tools:
        empty = {} if case.content_with_calls else {"content": ""}
        messages += [said(case, calls=n, **empty) for n in range(1, case.max_calls + 1)]
        messages += [said(case, content="", calls=1)]
    for message in messages:
        if case.name == "gpt-oss":
            del message["reasoning_content"]  # rendered from a field that servers don't fill
        before = rendered_text(case, [USER])
        after = rendered_text(case, [USER, message], generate=False)
        if case.name == "deepseek-v3":
            before = before.removesuffix("<think>\n")
            message = {**message, "reasoning_content": ""}
            assert after == before + message["content"] + case.tokenizer.eos_token
            continue
        # The terminator may be rendered as another, or in the next turn.
        assert after.startswith(before)
        text = written(case, message)
        assert after[len(before) :].startswith(text)
        rest = after[len(before) + len(text) :].strip(" ")
        end = case.tokenizer.convert_ids_to_tokens(case.end(message))
        assert rest.startswith(end) or (case.name == "glm4moe" and not rest)


def test_an_answer_is_read_as_it_was_written(case):
    prompt = render(case, [USER])
    for number in range(case.max_calls + 1):
        meant = said(
            case, content="" if number and not case.content_with_calls else "Hé 👩‍🔬", calls=number
        )
        for seed in range(20):
            ids = played.sample(Random(seed), case, meant)
            if ids[-1] != case.end(meant):
                continue
            content, reasoning, calls = fields(played.answer(case, prompt, ids))
            wanted, thought, functions = fields(meant)
            assert content.strip() == wanted
            assert reasoning is thought is None or reasoning.strip() == thought
            assert calls == functions


def test_the_terminator_is_one_token(case):
    token = case.tokenizer.convert_ids_to_tokens(case.terminator)
    assert render(case, [{"role": "user", "content": token}]).count(case.terminator) > render(
        case, [USER]
    ).count(case.terminator)
    assert case.terminator not in played.raw(case).encode(token).ids


def test_the_cases_differ():
    cases = templates.cases()
    assert [case.name for case in cases] == templates.NAMES
    assert any(case.terminator != case.tokenizer.eos_token_id for case in cases)
    assert {case.strips_reasoning for case in cases} == {True, False}
    assert {case.renders_tools for case in cases} == {True, False}
    assert {case.takes_system for case in cases} == {True, False}
    assert all(case.terminator not in case.extra_stop_ids for case in cases)


def test_conversations_are_the_same_for_the_same_seed(case):
    assert list(play(Random(5), case)) == list(play(Random(5), case))


def test_tokenising_the_history_again_changes_it(case):
    """So a server that does that fails the tests with these conversations."""
    turns = changed = cut = calls = empty = 0
    for seed in range(25):
        for turn in play(Random(seed), case):
            prompt = render(case, turn.messages)
            again = render(case, [*turn.messages, turn.message, USER])
            sampled = prompt + turn.ids
            turns += 1
            changed += again[: len(sampled)] != sampled
            cut += turn.ids[-1] not in case.stop_ids
            calls += "tool_calls" in turn.message
            empty += not (turn.message["content"] or "").strip()
    assert turns > 50
    assert 0.4 < changed / turns <= 1
    assert 0 < cut < turns / 3
    assert empty > 0
    assert (calls > 20) is case.renders_tools
