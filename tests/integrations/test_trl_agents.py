"""Agents in the place of TRL's rollout_func, without an engine."""

from types import SimpleNamespace

import pytest
from rollout_server.integrations.trl_agents import AgentRollouts

from rollout_server.config import RolloutConfig
from rollout_server.trajectories.session import Session

pytestmark = pytest.mark.slow


def test_a_step_of_rollouts_is_one_line_where_no_bar_can_be_drawn(tokenizer, capsys):
    def open_session(**metadata):
        return Session("http://127.0.0.1:9/v1", (None, None), lambda session: None, metadata)

    def agent(session, example):
        if example["prompt"] == "b":
            raise SystemExit("an agent's own")
        return 1.0

    logged = {}
    server = SimpleNamespace(session=open_session, policy_version=3)
    generation = SimpleNamespace(log=logged.__setitem__, masked=[])
    rollouts = AgentRollouts(server, RolloutConfig(), agent, generation)
    main = SimpleNamespace(is_main_process=True)
    trainer = SimpleNamespace(accelerator=main, processing_class=tokenizer)
    rows = rollouts(["a", "b", "c"], trainer)
    assert len(rows["completion_ids"]) == 3 and logged["failed"] == pytest.approx(1 / 3)
    told = capsys.readouterr().err
    lines = [line for line in told.splitlines() if line.startswith("rollout_server: 3 rollouts: ")]
    assert len(lines) == 1 and lines[0].endswith("1 failed") and "\r" not in told
    rollouts = AgentRollouts(server, RolloutConfig(progress=False), agent, generation)
    rollouts(["a"], trainer)
    assert "rollouts" not in capsys.readouterr().err
