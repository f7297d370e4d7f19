"""Rows to train on, from token trees, and the forms that trainers take them in.

A row is one path of a tree, root to leaf: a prompt, which is what was given before anything was
sampled, and a completion, which is the rest, sampled and given tokens mixed. `env_mask` marks the
tokens of the completion to train. Over all rows of a tree each sampled token is marked exactly
once, in the first row that has it: leaves share tokens, and what counts twice in a loss weighs
double.
"""

import json
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Any, Literal

from rollout_server.errors import ConfigError
from rollout_server.trajectories.tree import Node, Span, TokenTree

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Rollout:
    """One row.

    Attributes:
        prompt_ids: token ids given before the first sampled one.
        completion_ids: the token ids after these.
        logprobs: log-probability (nats) of each of `completion_ids` under the distribution it was
            sampled from; 0.0 where it was given.
        env_mask: for each of `completion_ids`, 1 where it is to be trained in this row, else 0.
        versions: who sampled what: spans over `completion_ids`, none over given tokens.
        masked: (start, end) of runs in `completion_ids` whose `logprobs` are of a distribution that
            a grammar had masked; a trainer that computes them anew gets other values.
        unmasked_logprobs: the model's own log-probability (nats) of each of `completion_ids` at
            temperature 1, without grammar, cut-offs and penalties; 0.0 where it was given. None
            unless they are known of all that was sampled.
        reward: None where none was set.
        components: named parts of the reward.
        metadata: of the session.
        messages: of the row's last call: its request's, then the answer.
        finish_reason: of the row's last call.

    Raises `ConfigError` if lengths differ or a number isn't finite.
    """

    prompt_ids: list[int]
    completion_ids: list[int]
    logprobs: list[float]
    env_mask: list[int]
    versions: list[Span] = field(default_factory=list)
    masked: list[tuple[int, int]] = field(default_factory=list)
    unmasked_logprobs: list[float] | None = None
    reward: float | None = None
    components: dict[str, float] = field(default_factory=dict)
    metadata: dict[str, Any] = field(default_factory=dict)
    messages: list[dict[str, Any]] = field(default_factory=list)
    finish_reason: str | None = None

    def __post_init__(self) -> None:
        count = len(self.completion_ids)
        unmasked = [] if self.unmasked_logprobs is None else ["unmasked_logprobs"]
        for name in ("logprobs", "env_mask", *unmasked):
            if len(getattr(self, name)) != count:
                raise ConfigError(
                    f"{name} has {len(getattr(self, name))} values for {count} completion_ids; "
                    "give one for each"
                )
        for name in ("logprobs", *unmasked):
            for i, value in enumerate(getattr(self, name)):
                if not is_number(value):
                    raise ConfigError(f"{name}[{i}] is {value!r}; give a finite number")
        if not all(value in (0, 1) for value in self.env_mask):
            i = [value in (0, 1) for value in self.env_mask].index(False)
            raise ConfigError(f"env_mask[{i}] is {self.env_mask[i]!r}; give 0 or 1")
        _require_reward(self.reward, self.components)


def rows(
    tree: TokenTree,
    reward: float | None = None,
    components: Mapping[str, float] | None = None,
    metadata: Mapping[str, Any] | None = None,
) -> list[Rollout]:
    """A row for each leaf, in the order of the calls; each has the session's reward.

    Rows in which nothing would be trained are left out: those where nothing was sampled, and those
    of a call that sampled nothing after answers that earlier rows train. A session that sampled no
    token has none. Raises `ConfigError` if the reward or a component isn't a finite number.
    """
    _require_reward(reward, components or {})
    trained: set[Node] = set()
    found = [_row(tree, leaf, trained, reward, components, metadata) for leaf in tree.leaves()]
    return [row for row in found if row is not None and any(row.env_mask)]


def single_row(
    tree: TokenTree,
    reward: float | None = None,
    components: Mapping[str, float] | None = None,
    metadata: Mapping[str, Any] | None = None,
    *,
    choose: Literal["last", "most"] = "last",
) -> Rollout | None:
    """One row for the whole session, for trainers that take one for each prompt.

    It trains every sampled token on its path; those on other paths alone are lost. choose: "last"
    takes the path of the latest call that has a sampled token on it, which is the conversation as
    it ended; "most" takes the path with the most sampled tokens, the later of equal ones.

    None if the session sampled no token. Raises `ConfigError` as `rows` does.
    """
    if choose not in ("last", "most"):
        raise ConfigError(f'choose={choose!r}: give "last" or "most"')
    _require_reward(reward, components or {})
    best = None
    for leaf in reversed(tree.leaves()):
        row = _row(tree, leaf, set(), reward, components, metadata)
        if row is not None and choose == "last":
            return row
        if row is not None and (best is None or sum(row.env_mask) > sum(best.env_mask)):
            best = row
    return best


def trl_rows(rows: Sequence[Rollout | None]) -> dict[str, list[Any]]:
    """What a `rollout_func` of TRL's trainers returns, a value per row under each key.

    rows: one for each of the prompts that TRL gave, in their order; see `single_row`. Besides
    TRL's `prompt_ids`, `completion_ids`, `logprobs` and `env_mask`, there are `reward`,
    `components` and the other attributes of `Rollout`; TRL hands these to its reward functions, in
    place of columns of the data set with such names. A reward function that returns `reward` trains
    on what the sessions were given; TRL leaves None out.

    TRL 1.16 doesn't shorten what it gets: `max_completion_length` is for the caller to keep. It
    takes a completion whose last token doesn't end a sequence for one that was cut off.

    Raises `ConfigError` for a row that is None or has no completion, which TRL can't do without.
    """
    for i, row in enumerate(rows):
        if row is None or not row.completion_ids:
            raise ConfigError(
                f"rows[{i}]: nothing was sampled in this session, and TRL needs a row for each "
                "prompt; put in one that trains nothing: "
                "Rollout(prompt_ids, [eos_token_id], [0.0], [0])"
            )
    return {f.name: [getattr(row, f.name) for row in rows] for f in fields(Rollout)}


def verl_tensors(
    rows: Sequence[Rollout],
    *,
    pad_token_id: int,
    prompt_length: int | None = None,
    response_length: int | None = None,
) -> "dict[str, torch.Tensor]":
    """The tensors of verl's batches of rollouts (its `DataProto.batch`), on the CPU.

    prompt_length, response_length: P and R, the lengths to pad to; by default the longest of the
    rows. B is the number of rows. Prompts are padded on the left, responses on the right.

    prompts (B, P), responses (B, R), input_ids (B, P + R), attention_mask (B, P + R: 0 at padding),
    position_ids (B, P + R: of each token in its row, from 0) and response_mask (B, R: 1 where
    trained) are int64; rollout_log_probs (B, R: nats, 0 at given tokens and padding) is float32.

    Nothing is cut off: raises `ConfigError` for a row that is longer than the lengths given.
    """
    import torch

    size_p = _length(rows, "prompt_ids", "prompt_length", prompt_length)
    size_r = _length(rows, "completion_ids", "response_length", response_length)
    ids = torch.full((len(rows), size_p + size_r), pad_token_id, dtype=torch.int64)
    attention = torch.zeros_like(ids)
    trained = torch.zeros((len(rows), size_r), dtype=torch.int64)
    logprobs = torch.zeros((len(rows), size_r), dtype=torch.float32)
    for i, row in enumerate(rows):
        count = len(row.completion_ids)
        here = slice(size_p - len(row.prompt_ids), size_p + count)
        ids[i, here] = torch.tensor(row.prompt_ids + row.completion_ids, dtype=torch.int64)
        attention[i, here] = 1
        trained[i, :count] = torch.tensor(row.env_mask, dtype=torch.int64)
        logprobs[i, :count] = torch.tensor(row.logprobs, dtype=torch.float32)
    return {
        "prompts": ids[:, :size_p].clone(),
        "responses": ids[:, size_p:].clone(),
        "input_ids": ids,
        "attention_mask": attention,
        "position_ids": (attention.cumsum(-1) - 1).clamp(min=0),
        "response_mask": trained,
        "rollout_log_probs": logprobs,
    }


def json_lines(rows: Iterable[Rollout]) -> Iterator[str]:
    """A JSON object per row, without a line break; its keys are `Rollout`'s attributes.

    Numbers come back as they were. Raises `ConfigError` if a row's messages or metadata
    hold what JSON can't.
    """
    for i, row in enumerate(rows):
        try:
            yield json.dumps({f.name: getattr(row, f.name) for f in fields(row)}, allow_nan=False)
        except (TypeError, ValueError) as error:
            raise ConfigError(f"rows[{i}] can't be written as JSON: {error}") from error


def from_json_line(line: str) -> Rollout:
    """A row as `json_lines` wrote it; raises `ConfigError` for anything else."""
    try:
        data = json.loads(line)
    except ValueError as error:
        raise ConfigError(f"{line[:80]!r} isn't a line of JSON: {error}") from error
    names = {f.name for f in fields(Rollout)}
    if not isinstance(data, dict) or data.keys() != names:
        have = sorted(data) if isinstance(data, dict) else type(data).__name__
        raise ConfigError(f"a row is a JSON object with {sorted(names)}; this line has {have}")
    data["versions"] = [Span(*span) for span in data["versions"]]
    data["masked"] = [tuple(run) for run in data["masked"]]
    return Rollout(**data)


def _row(
    tree: TokenTree,
    leaf: Node,
    trained: set[Node],
    reward: float | None,
    components: Mapping[str, float] | None,
    metadata: Mapping[str, Any] | None,
) -> Rollout | None:
    """The row of a leaf; None if its path has nothing sampled.

    trained: the nodes that aren't to be trained any more; those of this row join them.
    """
    path = tree.path(leaf)
    first = next((i for i, node in enumerate(path) if node.sampled and node.ids), None)
    if first is None:
        return None
    ids: list[int] = []
    logprobs: list[float] = []
    unmasked: list[float] | None = []
    mask: list[int] = []
    versions: list[Span] = []
    masked: list[Span] = []
    for node in path[first:]:
        start, count = len(ids), len(node.ids)
        ids += node.ids
        logprobs += node.logprobs if node.sampled else [0.0] * count
        added = node.unmasked if node.sampled else [0.0] * count
        if added is None:
            unmasked = None
        elif unmasked is not None:
            unmasked += added
        mask += [int(node.sampled and node not in trained)] * count
        for span in node.versions:
            _join(versions, span.version, start + span.start, start + span.end)
            if node.masked:
                _join(masked, 0, start + span.start, start + span.end)
        if node.sampled:
            trained.add(node)
    return Rollout(
        prompt_ids=[i for node in path[:first] for i in node.ids],
        completion_ids=ids,
        logprobs=logprobs,
        env_mask=mask,
        versions=versions,
        masked=[(start, end) for _, start, end in masked],
        unmasked_logprobs=unmasked,
        reward=reward,
        components=dict(components or {}),
        metadata=dict(metadata or {}),
        messages=tree.messages(leaf),
        finish_reason=leaf.finish_reason,
    )


def _join(spans: list[Span], version: int, start: int, end: int) -> None:
    """Append a span, to the last one where it goes on from that."""
    if spans and spans[-1].version == version and spans[-1].end == start:
        start = spans.pop().start
    spans.append(Span(version, start, end))


def _length(rows: Sequence[Rollout], name: str, option: str, length: int | None) -> int:
    longest = max((len(getattr(row, name)) for row in rows), default=0)
    if length is None:
        return longest
    for i, row in enumerate(rows):
        if len(getattr(row, name)) > length:
            raise ConfigError(
                f"{option}={length}: {name} of rows[{i}] has {len(getattr(row, name))} tokens, the "
                f"longest row {longest}; raise {option}, or leave out rows that are longer"
            )
    return length


def _require_reward(reward: Any, components: Mapping[str, Any]) -> None:
    if reward is not None and not is_number(reward):
        raise ConfigError(f"reward is {reward!r}; give a finite int or float, or None")
    for name, value in components.items():
        if not isinstance(name, str) or not is_number(value):
            raise ConfigError(
                f"components[{name!r}] is {value!r}; give a finite int or float, by a name"
            )


def is_number(value: Any) -> bool:
    """Whether it is an int or a float, and finite as a float."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return False
    return -sys.float_info.max <= value <= sys.float_info.max
