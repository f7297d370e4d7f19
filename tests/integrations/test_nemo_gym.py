"""NeMo Gym: its configuration, its results as training rows, and the recipe with the real one."""

import copy
import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml
from rollout_server.integrations.nemo_gym import (
    model_server_config,
    training_rows,
    turns,
    violations,
    write_config,
)

ROOT = Path(__file__).parents[2]
VENV = Path(os.environ.get("NEMO_GYM_VENV", ROOT / ".venv-nemo-gym"))
CALL = "chatcmpl-tool-b408a48be4eb6a3a"
# As NeMo Gym 0.7.0 wrote it, with fewer tokens and without fields of no interest.
ROW = {
    "response": {
        "id": "resp_6bfcea0f875649fa9a57c79c66ad136f",
        "incomplete_details": {"reason": "max_output_tokens"},
        "output": [
            {
                "prompt_token_ids": [520, 9531, 198],
                "generation_token_ids": [44, 100, 2],
                "generation_log_probs": [0.0, -2.9516, 0.0],
                "routed_experts": None,
                "arguments": "[{}]",
                "call_id": CALL,
                "name": "get_weather",
                "type": "function_call",
            },
            {"call_id": CALL, "output": '{"detail":[]}', "type": "function_call_output"},
            {
                "prompt_token_ids": [520, 9531, 198, 44, 100, 2, 520, 9531, 198],
                "generation_token_ids": [44, 100, 375],
                "generation_log_probs": [0.0, -0.1024, -5.8038],
                "routed_experts": None,
                "content": [{"annotations": [], "text": "<tool_call>", "type": "output_text"}],
                "role": "assistant",
                "type": "message",
            },
        ],
        "status": "incomplete",
    },
    "reward": 1.0,
    "mask_sample": False,
    "failure_kind": None,
    "_ng_task_index": 1,
    "_ng_rollout_index": 0,
}


@pytest.fixture
def row():
    return copy.deepcopy(ROW)


def test_a_training_row(row):
    assert violations(row) == []
    assert training_rows([json.dumps(row)]) == [
        {
            "prompt_ids": [520, 9531, 198],
            "completion_ids": [44, 100, 2, 520, 9531, 198, 44, 100, 375],
            "logprobs": [0.0, -2.9516, 0.0, 0.0, 0.0, 0.0, 0.0, -0.1024, -5.8038],
            "env_mask": [1, 1, 1, 0, 0, 0, 1, 1, 1],
            "reward": 1.0,
            "task": 1,
        }
    ]


def test_tokens_that_were_not_sampled_as_they_stand_are_not_marked(row):
    turns(row)[1]["prompt_token_ids"][4] = 19324  # what its text is tokenised to
    assert violations(row) == ["turn 2: its prompt leaves the tokens of turn 1 at 4 of 6"]
    (trained,) = training_rows([json.dumps(row)])
    assert trained["prompt_ids"] == [520, 9531, 198, 44, 19324, 2, 520, 9531, 198]
    assert trained["completion_ids"] == [44, 100, 375]
    assert trained["env_mask"] == [1, 1, 1]


def test_a_prompt_that_forgets_is_told(row):
    turns(row)[1]["prompt_token_ids"][5:] = []
    assert violations(row) == ["turn 2: its prompt leaves the tokens of turn 1 at 5 of 6"]


def test_a_missing_log_probability_is_told(row):
    turns(row)[0]["generation_log_probs"].pop()
    assert violations(row) == ["turn 1: 3 tokens with 2 log-probabilities"]


def test_an_answer_without_tokens_is_no_turn(row):
    """NeMo Gym makes one up when a prompt has become too long."""
    row["response"]["output"].append({"type": "message", "role": "assistant", "content": []})
    assert len(turns(row)) == 2
    row["response"]["output"] = row["response"]["output"][-1:]
    assert turns(row) == violations(row) == training_rows([json.dumps(row)]) == []


def test_the_configuration(tmp_path):
    models = SimpleNamespace(data=[SimpleNamespace(id="policy"), SimpleNamespace(id="base")])
    client = SimpleNamespace(models=SimpleNamespace(list=lambda: models))
    urls = ["http://127.0.0.1:1/v1", "http://127.0.0.1:2/v1"]
    server = SimpleNamespace(
        base_url=urls[0], base_urls=urls, api_key="secret", openai=lambda: client
    )
    path = tmp_path / "config.yaml"
    path.write_text("what was here before is longer\n" * 100)
    path.chmod(0o644)
    config = model_server_config(server, "my_model", uses_reasoning_parser=False)
    assert write_config(path, config) == path
    assert path.stat().st_mode & 0o777 == 0o600
    assert yaml.safe_load(path.read_text()) == {
        "my_model": {
            "responses_api_models": {
                "vllm_model": {
                    "entrypoint": "app.py",
                    "base_url": urls,
                    "api_key": "secret",
                    "model": "policy",
                    "return_token_id_information": True,
                    "request_prompt_and_generation_token_ids": True,
                    "uses_reasoning_parser": False,
                }
            }
        }
    }
    del server.base_urls  # a session has one
    (model,) = model_server_config(server).values()
    assert model["responses_api_models"]["vllm_model"]["base_url"] == urls[:1]


@pytest.mark.slow
@pytest.mark.timeout(700)
@pytest.mark.skipif(
    not (VENV / "bin" / "gym").exists(),
    reason=f"no NeMo Gym in {VENV} (NEMO_GYM_VENV): recipes/nemo_gym/setup.sh makes it",
)
def test_the_recipe(tmp_path):
    """Rollouts of the real one, whose turns go on from each other's tokens."""
    script = ROOT / "recipes/nemo_gym/run.py"
    run = subprocess.run(
        [sys.executable, script, "--repeats", "2", "--venv", VENV, "--output", tmp_path],
        capture_output=True,
        text=True,
        timeout=650,
    )
    assert run.returncode == 0, run.stderr[-2000:]
    lines = (tmp_path / "rollouts.jsonl").read_text().splitlines()
    results = [json.loads(line) for line in lines]
    assert len(results) == 8
    assert max(len(turns(result)) for result in results) == 3
    assert [violations(result) for result in results] == [[]] * 8
    rows = [json.loads(line) for line in (tmp_path / "training.jsonl").read_text().splitlines()]
    assert rows == training_rows(lines)
    sampled = [sum(len(turn["generation_token_ids"]) for turn in turns(r)) for r in results]
    assert [sum(row["env_mask"]) for row in rows] == sampled
