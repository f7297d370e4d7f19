"""NVIDIA NeMo Gym (0.7): its agents and environments, with the policy as their model.

NeMo Gym's servers run in an environment of their own and take a configuration; what they collect
is a file of results. This is both ends of that, and imports nothing of theirs. Its servers ask for
no key, and its head server shows the whole configuration, the policy's key included, to whoever
reaches its port.
"""

import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import yaml

Row = Mapping[str, Any]


def model_server_config(server: Any, name: str = "policy_model", **fields: Any) -> dict[str, Any]:
    """Configuration of NeMo Gym's `vllm_model` for a running server, or for a session of one.

    name: what agents call it; fields: more of its settings, such as
    `replace_developer_role_with_system=True` for a chat template that has no such role.
    """
    model = server.openai().models.list().data[0].id
    settings = {
        "entrypoint": "app.py",
        "base_url": list(getattr(server, "base_urls", [server.base_url])),
        "api_key": server.api_key,
        "model": model,
        "return_token_id_information": True,
        "request_prompt_and_generation_token_ids": True,  # else it asks /tokenize for the prompt's
        "uses_reasoning_parser": True,  # an answer without reasoning is fine with it
        **fields,
    }
    return {name: {"responses_api_models": {"vllm_model": settings}}}


def write_config(path: str | Path, config: Mapping[str, Any]) -> Path:
    """Write it as YAML that only this user can read, since it holds the key."""
    path = Path(path)
    with open(os.open(path, os.O_WRONLY | os.O_CREAT, 0o600), "w", encoding="utf-8") as file:
        os.fchmod(file.fileno(), 0o600)  # it may have been there
        file.truncate()
        yaml.safe_dump(dict(config), file, sort_keys=False)
    return path


def training_rows(lines: Iterable[str]) -> list[dict[str, Any]]:
    """What to train on, for each line of a result file in which the policy sampled something.

    Each row is the last turn's prompt and generation. `prompt_ids` ends where the policy first
    sampled; of `completion_ids`, the tokens that it sampled have a 1 in `env_mask` and their
    log-probability in `logprobs`, the environment's have 0 and 0.0. A turn that the last one
    doesn't go on from, token by token, isn't marked: see `violations`. `reward` is the rollout's,
    `task` the number of its task.
    """
    return [_training_row(row) for row in map(json.loads, lines) if turns(row)]


def violations(row: Row) -> list[str]:
    """Where a result row's turns aren't one sequence of tokens; empty as it should be."""
    found: list[str] = []
    seen: list[int] = []
    for number, turn in enumerate(turns(row), 1):
        prompt, ids = turn["prompt_token_ids"], turn["generation_token_ids"]
        if prompt[: len(seen)] != seen:
            at = _shared(prompt, seen)
            found.append(
                f"turn {number}: its prompt leaves the tokens of turn {number - 1} at {at} of "
                f"{len(seen)}"
            )
        if len(turn["generation_log_probs"]) != len(ids):
            found.append(
                f"turn {number}: {len(ids)} tokens with {len(turn['generation_log_probs'])} "
                "log-probabilities"
            )
        seen = [*prompt, *ids]
    return found


def turns(row: Row) -> list[Row]:
    """The output items that hold a turn's tokens: the last item of each answer of the policy."""
    output = (row.get("response") or {}).get("output") or []
    return [item for item in output if item.get("generation_token_ids")]


def _training_row(row: Row) -> dict[str, Any]:
    whole = _tokens(turns(row)[-1])
    mask, logprobs = [0] * len(whole), [0.0] * len(whole)
    for turn in turns(row):
        start, end = len(turn["prompt_token_ids"]), len(_tokens(turn))
        if whole[:end] == _tokens(turn):
            mask[start:end] = [1] * (end - start)
            logprobs[start:end] = turn["generation_log_probs"]
    first = mask.index(1)
    return {
        "prompt_ids": whole[:first],
        "completion_ids": whole[first:],
        "logprobs": logprobs[first:],
        "env_mask": mask[first:],
        "reward": row["reward"],
        "task": row.get("_ng_task_index"),
    }


def _shared(a: list[int], b: list[int]) -> int:
    pairs = zip(a, b, strict=False)
    return next((at for at, (x, y) in enumerate(pairs) if x != y), min(len(a), len(b)))


def _tokens(turn: Row) -> list[int]:
    return [*turn["prompt_token_ids"], *turn["generation_token_ids"]]
