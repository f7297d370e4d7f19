"""Random conversations in a token tree, and the rows made of them."""

import random

import pytest
from trees import say

from rollout_server.trajectories.export import (
    from_json_line,
    json_lines,
    rows,
    single_row,
)
from rollout_server.trajectories.tree import TokenTree


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
