"""The token tree of one session: what an agent's calls showed a policy, and what it sampled.

A node is a run of tokens, all given to the policy or all sampled by it in one call; a path from the
root is a text that the policy saw or wrote. Prompts share nodes where their tokens are equal, so
each token of a conversation is stored once however many turns it has. What a call samples is a node
of its own, even where another call sampled the same.

The invariant: for each call, the tokens on the path to its node are its prompt, then what it
sampled. A split keeps it: the new node takes the beginning, and the old one, which is in
`TokenTree.calls`, stays the end.
"""

import itertools
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from rollout_server.trajectories.leading import shared

# Instead of minus infinity, which a softmax in low precision can give; vLLM has the same.
LOWEST_LOGPROB = -9999.0


class Span(NamedTuple):
    """Tokens `start`, ..., `end - 1`, sampled by one version of the policy."""

    version: int
    start: int
    end: int


@dataclass(eq=False, slots=True)
class Node:
    """A run of tokens.

    Attributes:
        ids: token ids; empty for the root and for a call that sampled nothing.
        sampled: whether the policy sampled them; else they were given to it.
        logprobs: log-probability (nats) of each of `ids` where sampled; else empty.
        versions: who sampled them: spans over `ids`, which they cover; empty where given.
        call: number of the call that sampled them, from 0; None where given.
        masked: whether `logprobs` are of a distribution that a grammar had masked.
        unmasked: the model's own log-probability (nats, temperature 1) of each of `ids`, without
            grammar, cut-offs and penalties; None where it wasn't asked for or can't be told.

    In the node where a call's answer ends, which `TokenTree.calls` has, and else as by default:
        finish_reason: why it ended.
        continues: number of the call whose answer the prompt went on from, which nothing had gone
            on from before; None where this call began a branch.
        messages: the request's messages that `base` doesn't have, then the answer's.
        base: the call that has the request's first `kept` messages.
    """

    ids: list[int]
    sampled: bool = False
    logprobs: list[float] = field(default_factory=list)
    versions: list[Span] = field(default_factory=list)
    parent: "Node | None" = None
    children: list["Node"] = field(default_factory=list)
    call: int | None = None
    masked: bool = False
    unmasked: list[float] | None = None
    finish_reason: str | None = None
    continues: int | None = None
    messages: list[dict[str, Any]] = field(default_factory=list)
    base: "Node | None" = None
    kept: int = 0

    def __repr__(self) -> str:  # the generated one would print the whole tree
        kind = "given" if self.call is None else f"sampled by call {self.call}"
        return f"<Node: {len(self.ids)} tokens {kind}, {len(self.children)} children>"


class _Newest(NamedTuple):
    """The latest call, whose tokens and messages the next one mostly begins with; before there is
    one, the root."""

    node: Node
    prompt_ids: list[int]
    ids: list[int]
    messages: list[dict[str, Any]]


class TokenTree:
    """The calls of one session. Not for several threads at once.

    Attributes:
        root: a node without tokens.
        calls: the node where each call's answer ends, in the order of the calls.
        size: number of tokens stored.
        sampled: how many of them were sampled.
    """

    def __init__(self) -> None:
        self.root = Node([])
        self.calls: list[Node] = []
        self.size = 0
        self.sampled = 0
        self._newest = _Newest(self.root, [], [], [])

    def add(
        self,
        prompt_ids: Sequence[int],
        ids: Sequence[int],
        logprobs: Sequence[float],
        *,
        versions: Iterable[tuple[int, int, int]],
        finish_reason: str | None,
        messages: Sequence[dict[str, Any]] = (),
        answer: dict[str, Any] | None = None,
        masked: bool = False,
        unmasked: Sequence[float] | None = None,
    ) -> Node:
        """Put a call into the tree.

        prompt_ids: token ids that the model saw; ids: those it sampled, maybe none; logprobs: of
        each of `ids` (nats; minus infinity becomes `LOWEST_LOGPROB`); versions: (version, start,
        end) of runs that cover `ids` in order; messages: all of the request's; answer: the message
        made of `ids`; masked, unmasked: see `Node`. Messages are kept, not copied, and compared by
        `==`.

        Returns the call's node. Raises `ValueError` and leaves the tree as it was if the arguments
        contradict each other or a log-probability isn't a number.
        """
        prompt_ids, ids, messages = list(prompt_ids), list(ids), list(messages)
        if not prompt_ids:
            raise ValueError("prompt_ids is empty; give the tokens that the model saw")
        logprobs = _logprobs("logprobs", logprobs, len(ids))
        if unmasked is not None:
            unmasked = _logprobs("unmasked", unmasked, len(ids))
        versions = _spans(versions, len(ids))

        node, inside, length = self._walk(prompt_ids)
        base, kept = self._shared(node, messages)
        if inside < len(node.ids):
            node = _split(node, inside)
        going_on = node.sampled and not any(child.ids for child in node.children)
        continues = node.call if going_on else None
        if length < len(prompt_ids):
            node = self._append(node, Node(prompt_ids[length:]))
        node = self._append(
            node,
            Node(
                ids,
                sampled=True,
                logprobs=logprobs,
                versions=versions,
                call=len(self.calls),
                masked=masked,
                unmasked=unmasked,
                finish_reason=finish_reason,
                continues=continues,
                messages=messages[kept:] + ([] if answer is None else [answer]),
                base=base,
                kept=kept,
            ),
        )
        self.calls.append(node)
        self.sampled += len(ids)
        said = messages if answer is None else [*messages, answer]
        self._newest = _Newest(node, prompt_ids, ids, said)
        return node

    def leaves(self) -> list[Node]:
        """The nodes that end a path, in the order of the calls that made them."""
        return [node for node in self.calls if not node.children]

    def path(self, node: Node) -> list[Node]:
        """From the root, which is included, to `node`."""
        nodes = [node]
        while nodes[-1].parent is not None:
            nodes.append(nodes[-1].parent)
        return nodes[::-1]

    def ids(self, node: Node) -> list[int]:
        """The tokens on the path to `node`, its own included."""
        return [i for n in self.path(node) for i in n.ids]

    def tokens(self, call: Node) -> tuple[list[int], list[int]]:
        """(the prompt, what was sampled) of a call, one of `calls`, which may have been split."""
        if call is self._newest.node:
            return list(self._newest.prompt_ids), list(self._newest.ids)
        first, ids = call, self.ids(call)
        while first.parent is not None and first.parent.call == call.call:
            first = first.parent
        at = len(self.ids(first)) - len(first.ids)
        return ids[:at], ids[at:]

    def messages(self, call: Node) -> list[dict[str, Any]]:
        """The messages of the request, then the answer's where it was given; call: of `calls`."""
        if call is self._newest.node:
            return list(self._newest.messages)
        parts, end = [], call.kept + len(call.messages)
        node: Node | None = call
        while node is not None:  # of its messages, `end` are wanted
            if end > node.kept:
                parts.append(node.messages[: end - node.kept])
                end = node.kept
            node = node.base
        return [message for part in reversed(parts) for message in part]

    def _append(self, parent: Node, node: Node) -> Node:
        node.parent = parent
        parent.children.append(node)
        self.size += len(node.ids)
        return node

    def _walk(self, prompt_ids: list[int]) -> tuple[Node, int, int]:
        """The longest match: the node it ends in, how many tokens of that node it has, and how many
        tokens in all.

        Samples with equal tokens lie side by side, and only one may have been gone on from, so
        every child that matches is followed. Of matches equally long, one at a node's end comes
        first, and then that of the latest call.
        """
        path, start = self._known(prompt_ids), 0
        stack: list[tuple[Node, int, Node | None]] = []
        for node, following in itertools.zip_longest(path, path[1:]):
            start += len(node.ids)
            if following is None or len(node.children) > 1:
                stack.append((node, start, following))
        last = path[-1]
        best, found = (start, True, -1 if last.call is None else last.call), (last, len(last.ids))
        while stack:
            node, start, following = stack.pop()
            for child in node.children:
                count = 0 if child is following else _common(child.ids, prompt_ids, start)
                if not count:
                    continue
                whole = count == len(child.ids)
                rank = (start + count, whole, -1 if child.call is None else child.call)
                if rank > best:
                    best, found = rank, (child, count)
                if whole:
                    stack.append((child, start + count, None))
        return *found, best[0]

    def _known(self, prompt_ids: list[int]) -> list[Node]:
        """The path to the latest call if the prompt goes on from it, else to the root."""
        newest = self._newest
        if not newest.ids:
            return [self.root]
        at, end = len(newest.prompt_ids), len(newest.prompt_ids) + len(newest.ids)
        goes_on = prompt_ids[at:end] == newest.ids and prompt_ids[:at] == newest.prompt_ids
        return self.path(newest.node) if goes_on else [self.root]

    def _shared(self, node: Node, messages: list[dict[str, Any]]) -> tuple[Node | None, int]:
        """(call, number of its first messages that `messages` begins with); (None, 0) if none.

        The call is the latest of the branch that the prompt comes from or leaves at `node`.
        Counting the messages of the nodes on the path wouldn't do: messages have no places among
        the tokens, and many templates render an old message otherwise than a new one.
        """
        while node.children:
            node = node.children[-1]
        if node is self.root:
            return None, 0
        kept = shared(self.messages(node), messages)
        return (node, kept) if kept else (None, 0)


def _common(ids: list[int], prompt_ids: list[int], start: int) -> int:
    """How many of the first `ids` are equal to those of the prompt from `start` on."""
    end = min(len(ids), len(prompt_ids) - start)
    if end <= 0 or ids[0] != prompt_ids[start]:
        return 0
    if ids[:end] == prompt_ids[start : start + end]:
        return end
    low, high = 1, end  # the first `low` are equal, the first `high` aren't
    while high - low > 1:
        middle = (low + high) // 2
        if ids[low:middle] == prompt_ids[start + low : start + middle]:
            low = middle
        else:
            high = middle
    return low


def _split(node: Node, at: int) -> Node:
    """Give the first `at` tokens of `node` to a new parent, and return that."""
    head = Node(
        node.ids[:at],
        sampled=node.sampled,
        logprobs=node.logprobs[:at],
        versions=[Span(v, s, min(e, at)) for v, s, e in node.versions if s < at],
        parent=node.parent,
        children=[node],
        call=node.call,
        masked=node.masked,
        unmasked=None if node.unmasked is None else node.unmasked[:at],
    )
    assert node.parent is not None  # the root has no tokens
    siblings = node.parent.children
    siblings[siblings.index(node)] = head
    node.parent = head
    node.ids = node.ids[at:]
    node.logprobs = node.logprobs[at:]
    if node.unmasked is not None:
        node.unmasked = node.unmasked[at:]
    node.versions = [Span(v, max(s, at) - at, e - at) for v, s, e in node.versions if e > at]
    return head


def _logprobs(name: str, logprobs: Sequence[float], count: int) -> list[float]:
    if len(logprobs) != count:
        raise ValueError(
            f"{name} has {len(logprobs)} values for {count} ids; give one for each token sampled"
        )
    values = list(logprobs)
    floats = set(map(type, values)) == {float}
    if floats and math.isfinite(sum(values)) and min(values) >= LOWEST_LOGPROB:
        return values  # as nearly all are
    values = []
    for i, value in enumerate(logprobs):
        if not isinstance(value, (int, float)) or math.isnan(value) or value == math.inf:
            raise ValueError(f"{name}[{i}] is {value!r}; give a finite number or minus infinity")
        values.append(max(float(value), LOWEST_LOGPROB))
    return values


def _spans(versions: Iterable[tuple[int, int, int]], count: int) -> list[Span]:
    """Checked, and without those of no tokens."""
    spans, end = [Span(*span) for span in versions], 0
    for i, span in enumerate(spans):
        if span.start != end or span.end < end:
            raise ValueError(
                f"versions[{i}] is {tuple(span)}; it must start at {end}, where the one before it "
                "ends, and not end before"
            )
        end = span.end
    if end != count:
        raise ValueError(f"versions end at {end}; they must cover all {count} ids")
    return [span for span in spans if span.start < span.end]
