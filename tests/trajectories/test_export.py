"""The rows made of a token tree, and their forms for trainers."""

import json
from dataclasses import fields

import pytest
import torch
from trees import INF, NAN, call, say

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
