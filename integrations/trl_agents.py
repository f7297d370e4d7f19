"""What takes the place of TRL's `rollout_func`: an agent, run for each prompt of a step."""

import sys
import time
from typing import Any

from tqdm.auto import tqdm

from rollout_server.completion import prompt_list, text_tokenizer
from rollout_server.config import RolloutConfig
from rollout_server.errors import TrainerError
from rollout_server.rollouts.agents import Agent, Outcome, run_agents
from rollout_server.server import RolloutServer
from rollout_server.trajectories.export import Rollout, trl_rows

from .trl_generation import EngineGeneration


class AgentRollouts:
    """Stands in for TRL's `rollout_func`. agent: of the steps that come next."""

    def __init__(
        self,
        server: RolloutServer,
        config: RolloutConfig,
        agent: Agent,
        generation: EngineGeneration,
    ):
        self._server = server
        self._config = config
        self.agent = agent
        self._generation = generation
        self._succeeded = False
        self.examples: list[dict[str, Any]] = []  # of the prompts that come next

    def __call__(self, prompts: list[Any], trainer: Any) -> dict[str, list[Any]]:
        """A row for each of `prompts`, which are repeated already, in their order."""
        examples = self.examples or [{"prompt": prompt} for prompt in prompts]
        started, config = time.perf_counter(), self._config
        shown = config.progress and trainer.accelerator.is_main_process
        bar = tqdm(
            total=len(examples),
            desc="rollouts",
            unit="rollout",
            leave=False,
            disable=not (shown and _can_be_redrawn()),
        )
        turns = tokens = 0

        def done(outcome: Outcome) -> None:
            nonlocal turns, tokens
            turns += outcome.turns
            tokens += outcome.session.tree.sampled
            seconds = time.perf_counter() - started
            bar.set_postfix({"turns": turns, "tokens/s": f"{tokens / seconds:.0f}"})
            bar.update()

        with bar:
            outcomes = run_agents(
                self._server.session,
                self.agent,
                examples,
                done=done,
                concurrency=config.rollout_concurrency,
                timeout=config.rollout_timeout,
            )
        self._require_one(outcomes)
        log, seconds = self._generation.log, time.perf_counter() - started
        failed = sum(o.error is not None for o in outcomes)
        if shown and bar.disable:
            print(
                f"rollout_server: {len(outcomes)} rollouts: {seconds:.1f} s, {turns} turns, "
                f"{tokens / seconds:.0f} tokens/s, {failed} failed",
                file=sys.stderr,
                flush=True,
            )
        log("tokens_per_second", tokens / seconds)
        log("turns", turns / len(outcomes))
        log("failed", failed / len(outcomes))
        log("policy_version", self._server.policy_version)
        rows = [self._row(o, p, trainer) for o, p in zip(outcomes, prompts, strict=True)]
        self._generation.masked = [row.masked for row in rows]
        return trl_rows(rows)

    def _row(self, outcome: Outcome, prompt: Any, trainer: Any) -> Rollout:
        row = None if outcome.error is not None else outcome.session.rollout()
        if row is not None:
            return row
        # TRL needs a row: this one trains nothing, and has no reward.
        ids = prompt_list([prompt], trainer.processing_class)[0]
        tokenizer = text_tokenizer(trainer.processing_class)
        return Rollout(ids, [tokenizer.eos_token_id], [0.0], [0])

    def _require_one(self, outcomes: list[Outcome]) -> None:
        """An agent that has never worked is a mistake in the script, not bad luck."""
        errors = [o.error for o in outcomes if o.error is not None]
        self._succeeded = self._succeeded or len(errors) < len(outcomes)
        if not self._succeeded:
            raise TrainerError(
                f"each of the first {len(errors)} rollouts failed, the first with "
                f"{type(errors[0]).__name__}: {errors[0]}"
            ) from errors[0]


def _can_be_redrawn() -> bool:
    """Whether a bar stays one line: not in a file or a pipe."""
    in_notebook = any("notebook" in kind.__module__ for kind in tqdm.__mro__)
    return in_notebook or sys.stderr.isatty()
