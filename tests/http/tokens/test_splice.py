"""Random conversations with real tokenizers and templates: prompts hold what was sampled."""

import copy
import random

import played
import pytest
import templates
from offline import Server

from rollout_server.http.tokens.splice import Known

CONVERSATIONS = 85  # for each template: 1,020 in all


@pytest.mark.parametrize("name", templates.NAMES)
def test_later_prompts_begin_with_what_was_sampled(name):
    case = templates.case(name)
    turns = fresh = 0
    for seed in range(CONVERSATIONS):
        server = Server(case)
        prompts = []

        def prompt(case, messages, server=server, prompts=prompts):
            prompts.append(server.prompt(case, messages))
            return prompts[-1]

        before = None
        for turn in played.play(random.Random(seed), case, prompt):
            if before is not None:
                turns += 1
                if not server.spliced:
                    fresh += 1
                else:
                    assert prompts[-1][: len(before)] == before
                    check_what_is_new(case, prompts[-1][len(before) :], before)
            server.answered(turn, prompts[-1])
            before = [*prompts[-1], *turn.ids]
        for call, given in zip(server.tree.calls, prompts, strict=True):
            prompt_ids, ids = server.tree.tokens(call)
            assert prompt_ids == given and server.tree.ids(call) == given + ids
    assert turns > CONVERSATIONS
    assert fresh == 0, f"{fresh} of {turns} turns weren't spliced"


def check_what_is_new(case, new, before):
    """The turn ends once, with what was sampled or else with what the template says."""
    ended = before[-1] in case.stop_ids
    text = case.tokenizer.decode(new, skip_special_tokens=False)
    # gpt-oss samples another token than its history has.
    end = "<|end|>" if case.name == "gpt-oss" else case.tokenizer.decode(case.terminator)
    if not ended and case.name != "glm4moe":
        assert end in text
    if ended and case.name != "glm4moe":
        assert not text.strip().startswith(end), (
            f"the turn ends twice: {case.tokenizer.decode(before[-6:])!r}, {text[:60]!r}"
        )


@pytest.mark.parametrize("name", templates.NAMES)
def test_tokens_that_a_client_sends_are_checked_against_its_messages(name):
    """The same without a session: honest clients are believed, edits are seen."""
    case = templates.case(name)
    honest = refused = edited = missed = 0
    for seed in range(12):
        rng, server = random.Random(seed), Server(case)
        given = []

        def prompt(case, messages, server=server, given=given):
            given.append(server.prompt(case, messages))
            return given[-1]

        for turn in played.play(rng, case, prompt):
            known = Known(len(turn.messages), given[-1], turn.ids)
            messages = [*turn.messages, turn.message]
            honest += 1
            believes = Server.wait(
                server.splicer.is_continuation(messages, known, server.render, case.name)
            )
            refused += not believes
            server.answered(turn, given[-1])
            for changed in edits(rng, messages):
                edited += 1
                at = len(changed) - 1
                known = Known(at, given[-1], turn.ids)
                missed += Server.wait(
                    server.splicer.is_continuation(changed, known, server.render, case.name)
                )
    print(f"{name}: {refused} of {honest} honest refused, {missed} of {edited} edits missed")
    assert missed == 0
    if name in ("smollm2", "llama2", "gemma", "deepseek-v3"):  # without tools
        assert refused <= 0.4 * honest, "nobody is believed"


def edits(rng, messages):
    """What agents do to a history whose last message has tokens."""
    changed = copy.deepcopy(messages)
    changed[0]["content"] = "Quite another beginning."
    yield changed
    if len(messages) > 3:
        yield (
            [messages[0], *copy.deepcopy(messages[3:])]
            if messages[0]["role"] == "system"
            else (copy.deepcopy(messages[2:]))
        )
    changed = copy.deepcopy(messages)
    if not changed[-1].get("tool_calls"):
        changed[-1]["content"] = (changed[-1].get("content") or "") + " and more"
        yield changed


@pytest.mark.parametrize("field", ["reasoning", "reasoning_content"])
def test_an_answer_that_was_cut_off_in_its_reasoning_is_believed(field):
    case = templates.case("qwen3")
    server, messages = Server(case), [{"role": "user", "content": "Well?"}]
    ids = case.tokenizer.encode("<think>\nBecause of", add_special_tokens=False)
    known = Known(1, played.render(case, messages), ids)
    for thought, believed in (("\nBecause of", True), ("\nOther", False)):
        answer = {"role": "assistant", "content": "", field: thought}
        told = [*messages, answer]
        assert (
            Server.wait(server.splicer.is_continuation(told, known, server.render, "x")) is believed
        )
