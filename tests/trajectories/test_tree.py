"""The token tree of a session and the rows made of it, without an engine."""

import json
import random
from dataclasses import fields

import pytest
import torch

from rollout_server.errors import ConfigError
from rollout_server.trajectories.export import (
    Rollout,
    from_json_line,
    json_lines,
    rows,
    single_row,
    trl_rows,
    verl_tensors,
)
from rollout_server.trajectories.tree import LOWEST_LOGPROB, Span, TokenTree

NAN, INF = float("nan"), float("inf")


def call(tree, prompt, ids, logprob=-1.0, versions=None, finish_reason="stop", **more):
    """Add a call whose log-probabilities are logprob, logprob - 1, ..."""
    logprobs = [logprob - i for i in range(len(ids))]
    versions = [(0, 0, len(ids))] if versions is None else versions
    return tree.add(prompt, ids, logprobs, versions=versions, finish_reason=finish_reason, **more)


def say(role, content):
    return {"role": role, "content": content}


# -- the tree ---------------------------------------------------------------------------------


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
        slow._newest = TokenTree()._newest
        for tree in (quick, slow):
            call(tree, prompt, ids, messages=[dict(m) for m in messages], answer=dict(answer))
        slow._newest = TokenTree()._newest
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


def test_unmasked_logprobs_are_a_rows():
    tree = TokenTree()
    call(tree, [1], [2, 3], unmasked=[-5.0, -6.0])
    call(tree, [1, 2, 3, 4], [5], unmasked=[-7.0])
    (row,) = rows(tree)
    assert row.unmasked_logprobs == [-5.0, -6.0, 0.0, -7.0]
    assert from_json_line(next(json_lines([row]))) == row
    for bad in ([-5.0], [-5.0, NAN]):
        with pytest.raises(ValueError, match="unmasked"):
            call(tree, [1], [2, 3], unmasked=bad)
    with pytest.raises(ConfigError, match=r"unmasked_logprobs\[0\] is nan"):
        Rollout([1], [2], [-1.0], [1], unmasked_logprobs=[NAN])
    with pytest.raises(ConfigError, match="unmasked_logprobs has 2 values"):
        Rollout([1], [2], [-1.0], [1], unmasked_logprobs=[-1.0, -1.0])


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


# -- random conversations -----------------------------------------------------------------------


def conversation(seed):
    """(tree, [(prompt, ids, logprobs, version of each, messages)]) of a random agent."""
    draw = random.Random(seed)
    vocabulary = draw.choice([2, 3, 50])  # small ones make for equal tokens by chance

    def some(least, most):
        return [draw.randrange(vocabulary) for _ in range(draw.randint(least, most))]

    kinds = ["extend"] * 5 + ["older", "edit", "compact", "repeat", "new", "resample"]
    tree, calls = TokenTree(), []
    for counter in range(draw.randint(1, 14)):
        kind = draw.choice(kinds)
        if not calls or kind == "new":
            prompt, said = some(1, 6), [say("user", counter)]
        else:
            last = calls[-1] if kind in ("extend", "compact") else draw.choice(calls)
            text, said = last[0] + last[1], last[4]
            if kind in ("extend", "older"):
                prompt, said = text + some(0, 5), [*said, say("tool", counter)]
            elif kind == "edit":
                at = draw.randrange(len(text))
                prompt = text[:at] + some(1, 3) + text[at + draw.randint(0, 2) :]
                said = [*said[: draw.randrange(len(said) + 1)], say("user", counter)]
            elif kind == "compact":
                prompt, said = text[: draw.randint(1, len(text))] + some(0, 2), said[:1]
            else:
                prompt = last[0]
        ids = last[1] if calls and kind == "resample" else some(0, 6)
        logprobs = [-(counter + i / 64) for i in range(len(ids))]
        by = sorted(draw.randrange(3) for _ in ids)
        ends = [i for i in range(1, len(ids)) if by[i] != by[i - 1]] + [len(ids)] * bool(ids)
        spans = [(by[e - 1], s, e) for s, e in zip([0, *ends], ends, strict=False)]
        answer = draw.choice([None, say("assistant", counter)])
        node = tree.add(
            tuple(prompt),
            tuple(ids),
            logprobs,
            versions=spans,
            finish_reason=str(counter),
            messages=said,
            answer=answer,
            masked=draw.random() < 0.3,
        )
        calls.append((prompt, ids, logprobs, by, said + [answer] * (answer is not None)))
        assert node is tree.calls[-1]
    return tree, calls


def nodes_of(tree):
    found, stack = [], [tree.root]
    while stack:
        node = stack.pop()
        assert all(child.parent is node for child in node.children)
        found.append(node)
        stack += node.children
    return found


def unrolled(node):
    """(id, logprob, version, call) of each token of a node; None thrice where it was given."""
    if not node.sampled:
        assert not node.logprobs and not node.versions and node.call is None
        return [(i, None, None, None) for i in node.ids]
    by = [v for v, start, end in node.versions for _ in range(start, end)]
    return list(zip(node.ids, node.logprobs, by, [node.call] * len(by), strict=True))


@pytest.mark.parametrize("part", range(15))
def test_random_conversations(part):
    for seed in range(part * 100, part * 100 + 100):
        check_conversation(*conversation(seed))


def check_conversation(tree, calls):
    nodes = nodes_of(tree)
    assert tree.size == sum(len(n.ids) for n in nodes)
    stored = len({i for n in nodes for i in map(id, n.children)}) + 1
    assert stored == len(nodes) <= 3 * len(calls) + 1
    assert len(tree.calls) == len(calls)
    sampled = sum(len(ids) for _, ids, *_ in calls)
    assert sum(len(n.ids) for n in nodes if n.sampled) == sampled == tree.sampled
    shared = 0
    for number, (prompt, ids, logprobs, by, said) in enumerate(calls):
        node = tree.calls[number]
        assert tree.ids(node) == prompt + ids and tree.tokens(node) == (prompt, ids)
        assert tree.messages(node) == said
        assert node.call == number and node.finish_reason == str(number)
        tokens = [t for n in tree.path(node) for t in unrolled(n)]
        expected = zip(ids, logprobs, by, [number] * len(ids), strict=True)
        assert tokens[len(prompt) :] == list(expected)
        # Only the longest prefix that was there before is shared, and all of it.
        known = max((common(prompt, p + i) for p, i, *_ in calls[:number]), default=0)
        shared += len(prompt) - known
        if node.continues is not None:
            before = calls[node.continues]
            assert prompt[: len(before[0] + before[1])] == before[0] + before[1]
    assert tree.size == shared + sampled

    places = {lp: (number, i) for number, c in enumerate(calls) for i, lp in enumerate(c[2])}
    trained = []
    found = rows(tree, reward=0.5)
    for row in found:
        assert 1 in row.env_mask and len(row.logprobs) == len(row.env_mask)
        by = {i: v for v, start, end in row.versions for i in range(start, end)}
        assert 0 in by  # a completion begins with a sampled token
        for i, (logprob, mask) in enumerate(zip(row.logprobs, row.env_mask, strict=True)):
            if i not in by:
                assert logprob == 0.0 and mask == 0
                continue
            number, place = places[logprob]
            prompt, ids, logprobs, versions, _ = calls[number]
            # Where a sampled token is in a row, it is where it was sampled.
            assert row.prompt_ids + row.completion_ids[: i + 1] == prompt + ids[: place + 1]
            assert (logprobs[place], versions[place]) == (logprob, by[i])
            if mask:
                trained.append((number, place))
        for start, end in row.masked:
            assert all(i in by for i in range(start, end))
    assert len(trained) == len(set(trained)) == sampled
    if sampled:
        for choose in ("last", "most"):
            row = single_row(tree, choose=choose)
            assert sum(row.env_mask) == sum(e - s for _, s, e in row.versions) > 0
        if calls[-1][1]:
            row = single_row(tree)
            assert row.prompt_ids + row.completion_ids == calls[-1][0] + calls[-1][1]
    else:
        assert not found and single_row(tree) is None
    assert [from_json_line(line) for line in json_lines(found)] == found


def common(a, b):
    pairs = enumerate(zip(a, b, strict=False))
    return next((i for i, (x, y) in pairs if x != y), min(len(a), len(b)))


def test_the_random_conversations_have_all_kinds():
    trees = [conversation(seed)[0] for seed in range(200)]
    calls = [n for tree in trees for n in tree.calls]
    assert any(not n.ids for n in calls) and any(n.masked for n in calls)
    assert any(n.parent.sampled and n.parent.call == n.call for n in calls)  # was split
    assert any(len(n.versions) > 1 for n in calls)
    again = [
        [c.ids for c in node.children if c.sampled and c.ids] for t in trees for node in nodes_of(t)
    ]
    assert any(ids.count(i) > 1 for ids in again for i in ids)
    kinds = [n.continues for n in calls]
    assert kinds.count(None) > 200 and len(kinds) - kinds.count(None) > 200


# -- rows ---------------------------------------------------------------------------------------


@pytest.fixture
def branched():
    """Two answers after a shared one; the second branch leaves that one early."""
    tree = TokenTree()
    call(tree, [1, 2], [3, 4, 5], -1.0, [(0, 0, 2), (1, 2, 3)], messages=[say("user", "u")])
    call(tree, [1, 2, 3, 4, 5, 6], [7], -10.0, [(1, 0, 1)], "length", masked=True)
    call(tree, [1, 2, 3, 8], [9, 9], -20.0, [(2, 0, 2)], messages=[say("user", "v")])
    return tree


def test_rows_train_what_is_shared_once(branched):
    assert rows(branched, 0.5, {"form": 1, "sum": -0.5}) == [
        Rollout(
            prompt_ids=[1, 2],
            completion_ids=[3, 4, 5, 6, 7],
            logprobs=[-1.0, -2.0, -3.0, 0.0, -10.0],
            env_mask=[1, 1, 1, 0, 1],
            versions=[Span(0, 0, 2), Span(1, 2, 3), Span(1, 4, 5)],
            masked=[(4, 5)],
            reward=0.5,
            components={"form": 1, "sum": -0.5},
            messages=[],
            finish_reason="length",
        ),
        Rollout(
            prompt_ids=[1, 2],
            completion_ids=[3, 8, 9, 9],
            logprobs=[-1.0, 0.0, -20.0, -21.0],
            env_mask=[0, 0, 1, 1],
            versions=[Span(0, 0, 1), Span(2, 2, 4)],
            reward=0.5,
            components={"form": 1, "sum": -0.5},
            messages=[say("user", "v")],
            finish_reason="stop",
        ),
    ]


def test_a_single_row_trains_its_whole_path(branched):
    row = single_row(branched, reward=1)
    assert (row.completion_ids, row.env_mask, row.reward) == ([3, 8, 9, 9], [1, 0, 1, 1], 1)
    row = single_row(branched, choose="most")
    assert (row.completion_ids, row.env_mask) == ([3, 4, 5, 6, 7], [1, 1, 1, 0, 1])
    with pytest.raises(ConfigError, match="choose='first'"):
        single_row(branched, choose="first")
    # A last call that began anew and came to nothing.
    call(branched, [5], [])
    assert single_row(branched).completion_ids == [3, 8, 9, 9]


def test_a_session_that_sampled_nothing_has_no_rows():
    for tree in (TokenTree(), TokenTree()):
        assert rows(tree) == [] and single_row(tree) is None
        call(tree, [1], [])
        assert rows(tree) == [] and single_row(tree) is None


@pytest.mark.parametrize("reward", [NAN, INF, True, "1", 10**400, torch.tensor(1.0)])
def test_rewards_are_finite_numbers(branched, reward):
    for make in (rows, single_row):
        with pytest.raises(ConfigError, match=r"reward is .*; give a finite int or float"):
            make(branched, reward)
        with pytest.raises(ConfigError, match=r"components\['form'\] is "):
            make(branched, 1.0, {"form": reward})
        with pytest.raises(ConfigError, match="reward is"):
            make(TokenTree(), reward)
    with pytest.raises(ConfigError, match=r"components\[1\]"):
        rows(branched, 1.0, {1: 1.0})


def test_rows_of_ones_own_are_checked():
    with pytest.raises(ConfigError, match="env_mask has 1 values for 2 completion_ids"):
        Rollout([1], [2, 3], [-1.0, -1.0], [1])
    with pytest.raises(ConfigError, match=r"logprobs\[1\] is nan"):
        Rollout([1], [2, 3], [-1.0, NAN], [1, 1])
    with pytest.raises(ConfigError, match=r"env_mask\[0\] is 2"):
        Rollout([1], [2, 3], [-1.0, -1.0], [2, 1])


# -- trainers' forms ----------------------------------------------------------------------------


def test_trl(branched):
    output = trl_rows([single_row(branched, 2.0, {"form": 1.0}), rows(branched)[0]])
    assert set(output) == {f.name for f in fields(Rollout)}
    assert {len(values) for values in output.values()} == {2}
    assert output["prompt_ids"] == [[1, 2], [1, 2]]
    assert output["completion_ids"] == [[3, 8, 9, 9], [3, 4, 5, 6, 7]]
    assert output["logprobs"][0] == [-1.0, 0.0, -20.0, -21.0]
    assert output["env_mask"] == [[1, 0, 1, 1], [1, 1, 1, 0, 1]]
    assert output["reward"] == [2.0, None] and output["components"] == [{"form": 1.0}, {}]
    # As its trainer makes tensors of them.
    for key in ("prompt_ids", "completion_ids", "env_mask"):
        assert all(torch.tensor(values).dtype == torch.int64 for values in output[key])
    assert all(torch.tensor(values).dim() == 1 for values in output["logprobs"])
    with pytest.raises(ConfigError, match=r"rows\[1\]: nothing was sampled"):
        trl_rows([single_row(branched), None])
    assert trl_rows([Rollout([1], [0], [0.0], [0])])["env_mask"] == [[0]]
    assert trl_rows([])["prompt_ids"] == []


def test_verl(branched):
    short = Rollout([1], [2], [-0.5], [1])
    tensors = verl_tensors([*rows(branched), short], pad_token_id=99, prompt_length=3)
    expected = {
        "prompts": [[99, 1, 2], [99, 1, 2], [99, 99, 1]],
        "responses": [[3, 4, 5, 6, 7], [3, 8, 9, 9, 99], [2, 99, 99, 99, 99]],
        "input_ids": [
            [99, 1, 2, 3, 4, 5, 6, 7],
            [99, 1, 2, 3, 8, 9, 9, 99],
            [99, 99, 1, 2, 99, 99, 99, 99],
        ],
        "attention_mask": [
            [0, 1, 1, 1, 1, 1, 1, 1],
            [0, 1, 1, 1, 1, 1, 1, 0],
            [0, 0, 1, 1, 0, 0, 0, 0],
        ],
        "position_ids": [
            [0, 0, 1, 2, 3, 4, 5, 6],
            [0, 0, 1, 2, 3, 4, 5, 5],
            [0, 0, 0, 1, 1, 1, 1, 1],
        ],
        "response_mask": [[1, 1, 1, 0, 1], [0, 0, 1, 1, 0], [1, 0, 0, 0, 0]],
    }
    assert tensors.keys() == {*expected, "rollout_log_probs"}
    for name, values in expected.items():
        assert torch.equal(tensors[name], torch.tensor(values, dtype=torch.int64)), name
        assert tensors[name].dtype == torch.int64, name
    logprobs = torch.tensor([[-1.0, -2, -3, 0, -10], [-1, 0, -20, -21, 0], [-0.5, 0, 0, 0, 0]])
    assert torch.equal(tensors["rollout_log_probs"], logprobs)
    assert tensors["rollout_log_probs"].dtype == torch.float32


def test_verl_lengths(branched):
    tensors = verl_tensors(rows(branched), pad_token_id=0)
    assert tensors["prompts"].shape == (2, 2) and tensors["responses"].shape == (2, 5)
    tensors = verl_tensors(rows(branched), pad_token_id=0, prompt_length=7, response_length=9)
    assert {t.shape[1] for t in tensors.values()} == {7, 9, 16}
    for option, size, message in [
        ("prompt_length", 1, r"prompt_length=1: prompt_ids of rows\[0\] has 2 tokens"),
        ("response_length", 4, r"response_length=4: completion_ids of rows\[0\] has 5 tokens"),
    ]:
        with pytest.raises(ConfigError, match=message):
            verl_tensors(rows(branched), pad_token_id=0, **{option: size})
    empty = verl_tensors([], pad_token_id=0, prompt_length=2, response_length=3)
    assert empty["input_ids"].shape == (0, 5)


def test_json_lines(branched):
    odd = Rollout(
        [1],
        [2, 3],
        [-0.1, LOWEST_LOGPROB],
        [1, 0],
        reward=1e-17,
        messages=[say("user", "a\nb\u2028ü\ud800")],
    )
    written = [*rows(branched, 1 / 3), odd]
    lines = list(json_lines(written))
    assert all(len(line.splitlines()) == 1 and line.encode() for line in lines)
    read = [from_json_line(line) for line in lines]
    assert read == written
    assert isinstance(read[0].versions[0], Span) and isinstance(read[0].masked[0], tuple)
    for value in (NAN, object()):
        bad = Rollout([1], [2], [-1.0], [1], messages=[{"content": value}])
        with pytest.raises(ConfigError, match=r"rows\[1\] can't be written as JSON"):
            list(json_lines([odd, bad]))


def test_bad_lines_are_refused(branched):
    (line,) = json_lines(rows(branched)[:1])
    data = json.loads(line)
    for text, message in [
        (line[:-1], "isn't a line of JSON"),
        ("[1]", "this line has list"),
        (json.dumps({"prompt_ids": [1]}), "prompt_ids"),
        (json.dumps(data | {"other": 1}), "other"),
        (json.dumps(data | {"logprobs": [NAN] * 5}), r"logprobs\[0\] is nan"),
        (json.dumps(data | {"reward": NAN}), "reward is nan"),
        (json.dumps(data | {"env_mask": [1]}), "env_mask has 1 values for 5"),
    ]:
        with pytest.raises(ConfigError, match=message):
            from_json_line(text)
