"""What of a prompt opens the answer, for real templates and vLLM's parsers of reasoning."""

import asyncio
from types import SimpleNamespace

import played
import pytest
import templates
from offline import Server

from rollout_server.http.tokens.calls import current
from rollout_server.http.tokens.reasoning import Openings, hook_parsers, of_answer
from rollout_server.http.tokens.texts import Texts

ASKED = {"role": "user", "content": "Well </think> then?"}
CALL = {"id": "call00000", "type": "function", "function": {"name": "lookup", "arguments": "{}"}}
CALLED = {"role": "assistant", "content": "", "tool_calls": [CALL]}
RESULT = {
    "role": "tool",
    "tool_call_id": "call00000",
    "name": "lookup",
    "content": "It is </think>",
}
ANSWER = {"role": "assistant", "content": "<think>Because.</think>Two words."}


def opening(case, messages):
    openings = Openings(Texts(case.tokenizer))
    return asyncio.run(openings.after(messages, Server(case).render, case.name))


@pytest.mark.parametrize("name", templates.NAMES)
def test_the_opening_is_what_follows_the_last_message(name):
    case = templates.case(name)
    for messages in ([ASKED], [ASKED, ANSWER, ASKED], [ASKED, CALLED, RESULT]):
        if messages[-1] is RESULT and not case.renders_tools:
            continue
        prompt, found = played.render(case, messages), opening(case, messages)
        if found is None:
            assert messages[-1] is RESULT  # the answer that called goes on
            continue
        token = current.set(SimpleNamespace(opening=found))
        try:
            own = of_answer(prompt)
        finally:
            current.reset(token)
        assert own and prompt[len(prompt) - len(own) :] == own
        text = case.tokenizer.decode(own, skip_special_tokens=False)
        before = case.tokenizer.decode(prompt[: len(prompt) - len(own)], skip_special_tokens=False)
        # All that comes after the message, but what of it has become one token with its end.
        told = played.rendered_text(case, messages)
        rest = told[told.rindex("</think>" if messages[-1] is RESULT else "then?") :]
        assert text.strip() in rest and len(own) >= len(found) - 1
        assert ("Two words." in before) is (ANSWER in messages)
        assert "</think>" not in text
        assert ("<think>" in text) == (name == "deepseek-v3")


@pytest.mark.parametrize("parser", ["deepseek_r1", "kimi_k2", "minimax_m2", "step3", "qwen3"])
def test_parsers_look_at_the_opening_alone(parser):
    """Whatever the answers before have sampled."""
    from vllm.parser import ParserManager

    case = templates.case("qwen3")
    tokenizer = case.tokenizer
    reasons = ParserManager.get_parser(reasoning_parser_name=parser)
    handler = SimpleNamespace(parser=reasons)
    assert hook_parsers(SimpleNamespace(_state={"handler": handler}))
    first = [ASKED]
    sampled = tokenizer.encode(ANSWER["content"] + "<|im_end|>\n", add_special_tokens=False)
    again = tokenizer.encode("<|im_start|>user\nAnd?<|im_end|>\n<|im_start|>assistant\n")
    prompt = [*played.render(case, first), *sampled, *again]
    found = opening(case, first)
    closed = [*prompt, *tokenizer.encode("<think>\n\n</think>\n\n", add_special_tokens=False)]
    closing = [*found, *closed[len(prompt) :]]
    for ids, known, ended in ((prompt, found, False), (closed, closing, True)):
        token = current.set(SimpleNamespace(opening=known))
        try:
            assert handler.parser(tokenizer).is_reasoning_end(ids) is ended
        finally:
            current.reset(token)
    assert not hook_parsers(SimpleNamespace(_state={"handler": SimpleNamespace(parser=None)}))


CALLS = '<tool_call>\n{"name": "f", "arguments": {}}\n</tool_call>'


@pytest.mark.parametrize("said", ["Two words.", CALLS])
@pytest.mark.parametrize("parser", ["deepseek_r1", "deepseek_v3", "step3", "minimax_m2", "qwen3"])
def test_a_stream_says_the_same_however_many_tokens_a_step_has(parser, said):
    from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest
    from vllm.parser import ParserManager

    tokenizer = templates.case("qwen3").tokenizer
    reasons = ParserManager.get_parser(
        reasoning_parser_name=parser, tool_parser_name="hermes", enable_auto_tools=True
    )
    handler = SimpleNamespace(parser=reasons)
    hook_parsers(SimpleNamespace(_state={"handler": handler}))
    opens = "" if parser in ("step3", "minimax_m2") else "<think>"
    ids = tokenizer.encode(f"{opens}Because of that</think>{said}", add_special_tokens=False)
    tool = {"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}
    request = ChatCompletionRequest(messages=[ASKED], tools=[tool], tool_choice="auto")
    options = {"chat_template_kwargs": {"thinking": True}}
    for size in (1, 2, 3, 4, 5, 7, len(ids)):
        one, told = handler.parser(tokenizer, request.tools, **options), []
        for at in range(0, len(ids), size):
            step = ids[at : at + size]
            told.append(
                one.parse_delta(
                    delta_text=tokenizer.decode(step),
                    delta_token_ids=step,
                    request=request,
                    prompt_token_ids=[1],
                    finished=at + size >= len(ids),
                )
            )
        told = [delta for delta in told if delta is not None]
        assert "".join(d.reasoning or "" for d in told) == "Because of that", size
        calls = [call.function for d in told for call in d.tool_calls]
        content = "".join(d.content or "" for d in told).strip()
        if said.startswith("<"):
            assert "".join(call.name or "" for call in calls) == "f", size
            assert "".join(call.arguments or "" for call in calls) == "{}", size
            assert not content
        else:
            assert content == said and not calls
