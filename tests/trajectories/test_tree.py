"""The token tree of a session, without an engine."""

import random
from dataclasses import fields

import inside
import pytest
from trees import INF, NAN, call, say

from rollout_server.trajectories.export import (
    rows,
)
from rollout_server.trajectories.tree import LOWEST_LOGPROB, Span, TokenTree


def test_a_conversation_is_stored_once():
    tree = TokenTree()
    one = call(tree, [1, 2], [3, 4])
    two = call(tree, [1, 2, 3, 4, 5], [6])
    three = call(tree, [1, 2, 3, 4, 5, 6, 7], [8])
    assert tree.calls == [one, two, three] and tree.leaves() == [three]
    assert [n.ids for n in tree.path(three)] == [[], [1, 2], [3, 4], [5], [6], [7], [8]]
    assert [n.sampled for n in tree.path(three)] == [False, False, True, False, True, False, True]
    assert tree.ids(two) == [1, 2, 3, 4, 5, 6]
    assert tree.size == 8
    assert [n.continues for n in tree.calls] == [None, 0, 1]
    assert [n.call for n in tree.path(three)] == [None, None, 0, None, 1, None, 2]
    assert repr(two) == "<Node: 1 tokens sampled by call 1, 1 children>"


def shape(tree):
    """All that a tree is made of."""
    numbers = {id(node): number for number, node in enumerate(tree.calls)}

    def of(node):
        kept = [getattr(node, f.name) for f in fields(node) if f.name not in _LINKS]
        return kept, numbers.get(id(node.base)), [of(child) for child in node.children]

    return of(tree.root), tree.size, tree.sampled


_LINKS = ("parent", "children", "base")


@pytest.mark.parametrize("seed", range(50))
def test_what_is_known_of_the_latest_call_changes_nothing(seed):
    """A tree is the same whether prompts are looked for from the latest call on or not."""
    rng = random.Random(seed)
    quick, slow, texts, said = TokenTree(), TokenTree(), [[1]], [[]]
    for number in range(30):
        at = rng.choice([-1, -1, rng.randrange(len(texts))])  # mostly the latest
        end = rng.choice([None, None, rng.randint(1, len(texts[at]))])
        prompt = texts[at][:end] + [rng.randint(1, 2) for _ in range(rng.randint(0, 3))]
        ids = [rng.randint(1, 2) for _ in range(rng.randint(0, 3))]
        messages = [*said[at][: rng.choice([None, 1])], say("user", rng.choice("ab"))]
        answer = say("assistant", rng.choice("ab"))
        texts.append(prompt + ids)
        said.append([*messages, answer])
        inside.forget_latest(slow)
        for tree in (quick, slow):
            call(tree, prompt, ids, messages=[dict(m) for m in messages], answer=dict(answer))
        inside.forget_latest(slow)
        assert shape(quick) == shape(slow)
        for mine, other in zip(quick.calls, slow.calls, strict=True):
            assert quick.tokens(mine) == slow.tokens(other)
            assert quick.messages(mine) == slow.messages(other)
        assert quick.tokens(quick.calls[number]) == (prompt, ids)
        assert quick.messages(quick.calls[number]) == said[-1]


def test_a_split_of_sampled_tokens():
    tree = TokenTree()
    versions = [(4, 0, 1), (5, 1, 3), (6, 3, 4)]
    own = [-9.0, -8.0, -7.0, -INF]
    one = call(tree, [1, 2], [3, 4, 5, 6], versions=versions, masked=True, unmasked=own)
    two = call(tree, [1, 2, 3, 4, 9], [7])
    head, tail = one.parent, one
    assert (head.ids, head.logprobs, head.versions) == (
        [3, 4],
        [-1.0, -2.0],
        [Span(4, 0, 1), Span(5, 1, 2)],
    )
    assert (tail.ids, tail.logprobs, tail.versions) == (
        [5, 6],
        [-3.0, -4.0],
        [Span(5, 0, 1), Span(6, 1, 2)],
    )
    assert (head.unmasked, tail.unmasked) == ([-9.0, -8.0], [-7.0, LOWEST_LOGPROB])
    assert head.sampled and head.call == tail.call == 0 and head.masked and tail.masked
    assert (head.finish_reason, tail.finish_reason) == (None, "stop")
    assert two.continues is None and head.children == [tail, two.parent]
    assert tree.ids(one) == [1, 2, 3, 4, 5, 6] and tree.ids(two) == [1, 2, 3, 4, 9, 7]
    # The rest of it is still an answer to go on from; its beginning isn't.
    assert call(tree, [1, 2, 3, 4, 5, 6], [7]).continues == 0
    assert call(tree, [1, 2, 3, 4], [5]).continues is None
    assert tree.size == 10 and tree.sampled == 7
    # Where some of it isn't known, a row has none.
    assert [row.unmasked_logprobs for row in rows(tree)] == [None] * 3


def test_a_split_of_given_tokens():
    tree = TokenTree()
    one = call(tree, [1, 2, 3], [4])
    two = call(tree, [1, 2], [3])  # its prompt ends inside the other's
    three = call(tree, [1, 8], [9])
    assert [n.ids for n in tree.path(one)] == [[], [1], [2], [3], [4]]
    assert [n.ids for n in tree.path(two)] == [[], [1], [2], [3]]
    assert [n.ids for n in tree.path(three)] == [[], [1], [8], [9]]
    assert tree.size == 7 and tree.leaves() == [one, two, three]


def test_equal_samples_are_two_nodes_and_the_one_that_was_gone_on_from_is_found():
    tree = TokenTree()
    one, two = call(tree, [1], [2, 3]), call(tree, [1], [2, 3])
    assert one is not two and one.parent is two.parent
    three = call(tree, [1, 2, 3, 4], [5])
    assert three.continues == 1  # the latest
    assert call(tree, [1], [2, 3]).continues is None
    four = call(tree, [1, 2, 3, 4, 5, 6], [7])
    assert tree.path(four)[2] is two and four.continues == 2
    assert len(tree.leaves()) == 3 and tree.size == 11
    # A whole answer comes before the beginning of a later one.
    tree = TokenTree()
    call(tree, [1], [2])
    call(tree, [1], [2, 3])
    assert call(tree, [1, 2, 4], [5]).continues == 0


def test_a_call_that_sampled_nothing():
    tree = TokenTree()
    one = call(tree, [1, 2], [])
    assert tree.ids(one) == [1, 2] and one.ids == [] and one.versions == []
    call(tree, [1, 2], [3], finish_reason="length")
    three = call(tree, [1, 2, 3, 4], [], finish_reason="abort")
    four = call(tree, [1, 2, 3], [])
    five = call(tree, [1, 2, 3], [5])
    assert [n.continues for n in tree.calls] == [None, None, 1, None, None]
    assert tree.leaves() == [one, three, four, five]
    # Given tokens at the end belong to the row; what trains nothing isn't one.
    found = rows(tree)
    assert [r.completion_ids for r in found] == [[3, 4], [3, 5]]
    assert [r.env_mask for r in found] == [[1, 0], [0, 1]]
    assert [r.finish_reason for r in found] == ["abort", "stop"]
    # An answer is gone on from even if a call in between came to nothing.
    tree = TokenTree()
    call(tree, [1], [2])
    call(tree, [1, 2], [])
    assert call(tree, [1, 2, 3], [4]).continues == 0


def test_messages_are_kept_once_and_come_back():
    tree = TokenTree()
    system, user = say("system", "s"), say("user", "u")
    tool, other = say("tool", "t"), say("user", "other")
    one = call(tree, [1, 2], [3], messages=[system, user], answer=say("assistant", "a"))
    # The client writes the answer in its own way.
    back = say("assistant", "a") | {"refusal": None}
    two = call(
        tree, [1, 2, 3, 4], [5], messages=[system, user, back, tool], answer=say("assistant", "b")
    )
    three = call(tree, [1, 2, 3, 4], [6], messages=[system, user, back, tool])
    four = call(tree, [1, 9], [6], messages=[system, other], answer=say("assistant", "c"))
    five = call(tree, [8], [6], messages=[other])
    assert tree.messages(one) == [system, user, say("assistant", "a")]
    assert tree.messages(two) == [system, user, back, tool, say("assistant", "b")]
    assert tree.messages(three) == [system, user, back, tool]
    assert tree.messages(four) == [system, other, say("assistant", "c")]
    assert tree.messages(five) == [other]
    assert [len(n.messages) for n in tree.calls] == [3, 3, 0, 2, 1]


def test_templates_that_render_old_answers_anew_cost_no_more():
    """The prompt ends with a token that isn't in the history, so each turn splits the last one."""
    tree, text, said = TokenTree(), [1], []
    for turn in range(200):
        text, said = [*text, 1000 + turn], [*said, say("user", f"u{turn}")]
        call(tree, [*text, 7], [8, 2000 + turn], messages=said, answer=say("assistant", f"a{turn}"))
        text, said = [*text, 2000 + turn], [*said, say("assistant", f"a{turn}")]
    assert [tree.messages(n)[-1] for n in tree.calls] == said[1::2]
    assert tree.messages(tree.calls[-1]) == said
    assert sum(len(n.messages) for n in tree.calls) == 400
    assert tree.size <= 5 * 200 + 1
    assert len(rows(tree)) == 200


def test_long_conversations_are_deep():
    """Deeper than Python's stack, stored in as much memory as they have tokens."""
    tree, text, said = TokenTree(), [], []
    for turn in range(700):
        text, said = [*text, turn, 5], [*said, say("user", str(turn))]
        node = call(tree, text, [6, 7], messages=said, answer=say("assistant", "x"))
        assert node.continues == (turn - 1 if turn else None)
        text, said = [*text, 6, 7], [*said, say("assistant", "x")]
    assert tree.ids(node) == text and tree.messages(node) == said
    assert tree.size == len(text)
    assert sum(len(n.messages) for n in tree.calls) == len(said)
    (row,) = rows(tree)
    assert sum(row.env_mask) == 1400


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (([], [1], [-1.0]), "prompt_ids is empty"),
        (([1], [2, 3], [-1.0]), "logprobs has 1 values for 2 ids"),
        (([1], [2, 3], [-1.0, NAN]), r"logprobs\[1\] is nan"),
        (([1], [2, 3], [INF, -1.0]), r"logprobs\[0\] is inf"),
        (([1], [2], [None]), r"logprobs\[0\] is None"),
        (([1], [2, 3], [-1.0, -1.0], [(0, 0, 1)]), "versions end at 1; they must cover all 2"),
        (([1], [2], [-1.0], []), "versions end at 0"),
        (([1], [2], [-1.0], [(0, 0, 2)]), "versions end at 2"),
        (([1], [2, 3], [-1.0, -1.0], [(0, 1, 2)]), r"versions\[0\] is \(0, 1, 2\)"),
        (([1], [2, 3], [-1.0] * 2, [(0, 0, 2), (1, 2, 1)]), r"versions\[1\] .* start at 2"),
    ],
)
def test_bad_calls_are_refused_and_change_nothing(arguments, message):
    tree = TokenTree()
    call(tree, [1, 5], [2])
    prompt, ids, logprobs, *versions = arguments
    versions = versions[0] if versions else [(0, 0, len(ids))]
    with pytest.raises(ValueError, match=message):
        tree.add(prompt, ids, logprobs, versions=versions, finish_reason="stop")
    assert tree.size == 3 and len(tree.calls) == 1
    assert [n.ids for n in tree.path(tree.calls[0])] == [[], [1, 5], [2]]


def test_minus_infinity_has_a_floor_and_empty_spans_are_dropped():
    tree = TokenTree()
    node = tree.add(
        [1], [2, 3], [-INF, -0.5], versions=[(3, 0, 0), (4, 0, 2), (5, 2, 2)], finish_reason=None
    )
    assert node.logprobs == [LOWEST_LOGPROB, -0.5] and node.versions == [(4, 0, 2)]
