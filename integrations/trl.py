"""TRL's online trainers (GRPO, RLOO; TRL 1.0 and later) with their rollouts from the engine.

TRL asks `trainer.vllm_generation` for its completions. An object of ours takes that place, so the
trainer's own code for vLLM (when to sync, importance sampling, metrics) runs as it is. Nothing here
calls a collective: ranks may generate unequally often.
"""

import functools
import inspect
import itertools
import time
import warnings
from collections.abc import Iterable, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from tqdm.auto import tqdm
from transformers import TrainerCallback

from rollout_server.agents import Agent, Outcome, run_agents
from rollout_server.attach import refuse_second, serve
from rollout_server.completion import prompt_list, text_tokenizer
from rollout_server.config import RolloutConfig
from rollout_server.errors import NotAvailableError, TrainerError
from rollout_server.policy import Policy
from rollout_server.server import RolloutServer
from rollout_server.state import State
from rollout_server.trajectories.export import Rollout, trl_rows


def recognises(thing: Any) -> bool:
    """Whether `thing` is a trainer of TRL, or of a class derived from one."""
    return any(c.__module__.split(".")[0] == "trl" for c in type(thing).__mro__) and hasattr(
        thing, "accelerator"
    )


def attach(trainer: Any, config: RolloutConfig, rollout: Agent | None = None) -> RolloutServer:
    """Start a server for the trainer's policy and make it the source of its completions, or of
    the rollouts of an agent."""
    refuse_second(trainer)
    _check(trainer, config)
    if rollout is not None:
        _check_rollout(trainer, config)
    args = trainer.args
    policy = Policy(
        model=lambda: trainer.model,  # looked up each time: FSDP rebinds it
        tokenizer=trainer.processing_class,
        owner=trainer,
        compute_dtype="bfloat16" if args.bf16 else "float16" if args.fp16 else None,
        sampling=_sampling(trainer),
        seed=args.seed + trainer.accelerator.process_index,
        optimizer=lambda: trainer.optimizer,  # made when training begins
    )
    server = serve(policy, config)
    _bind(trainer, server, config, rollout)
    return server


def session_reward(reward: list[float | None], **_: Any) -> list[float | None]:
    """A reward function for GRPOTrainer: what each agent returned or set on its session. None,
    where a rollout failed, is left out of its group by TRL."""
    return reward


Runs = Sequence[tuple[int, int | None]]  # (start, end), or to the end


class EngineGeneration:
    """Stands in for TRL's `VLLMGeneration`."""

    def __init__(self, trainer: Any, server: RolloutServer):
        self._trainer = trainer
        self._server = server
        self._fields = _generation_fields(trainer)
        self.sampled: list[list[float]] = []
        # Of each row, runs of tokens that were sampled under a grammar (`Rollout.masked`).
        grammar = self._fields.get("structured_outputs") is not None
        self.masked: Iterable[Runs] = itertools.repeat([(0, None)] if grammar else [])

    def sync_weights(self) -> None:
        """Give the engine the policy's weights; wakes it."""
        report = self._server.sync_weights()
        self.log("seconds_sync", report.seconds - report.wake_seconds)
        self.log("seconds_wake", report.wake_seconds)

    def generate(
        self,
        prompts: list[list[int]],
        images: list | None = None,
        num_generations: int = 1,
        profiler: Any = None,
    ) -> tuple[list, list, list, list]:
        """One completion for each of `prompts`, in their order.

        prompts: token ids; repeated already, so `num_generations` isn't needed here.

        Returns (prompt_ids, completion_ids, logprobs, logprob_token_ids), each a list with an
        entry per prompt; of the last two, each entry is a list per token with one value.
        """
        if images is not None and any(images):
            raise NotAvailableError(
                "the prompts hold images, which this version can't generate from; train on text"
            )
        if self._server.state is State.ASLEEP:  # asked again without a new optimizer step
            self.sync_weights()
        started = time.perf_counter()
        with profiler or nullcontext():
            completions = self._server.generate(prompts, self._fields)
        seconds = time.perf_counter() - started
        self.log("tokens_per_second", sum(len(c.ids) for c in completions) / seconds)
        self.log("policy_version", self._server.policy_version)
        self.log("kv_cache_usage", self._server.take_kv_cache_peak())
        self.sampled = [c.logprobs for c in completions]
        return (
            [c.prompt_ids for c in completions],
            [c.ids for c in completions],
            [[[p] for p in c.logprobs] for c in completions],
            [[[i] for i in c.ids] for c in completions],
        )

    def sleep(self) -> None:
        """Give the engine's memory back to the trainer."""
        if self._server.state not in (State.ASLEEP, State.BROKEN, State.CLOSED):
            started = time.perf_counter()
            self._server.sleep()
            if self._server.state is State.ASLEEP:
                self.log("seconds_sleep", time.perf_counter() - started)

    def log_difference(self, batch: dict[str, Any]) -> None:
        """Log how far the engine's log-probabilities are from the trainer's, per token; apart from
        the others, tokens sampled under a grammar, of which the trainer knows nothing."""
        for name, grammar in (("logp_difference", False), ("logp_difference_masked", True)):
            difference = logp_difference(batch, self.sampled, self.masked, grammar)
            if difference is not None:
                self.log(name, difference)
                self._server.note_logprob_difference(difference, grammar=grammar)

    def log(self, name: str, value: float) -> None:
        """Put a number into the trainer's log, as `rollout/name`."""
        mode = "train" if self._trainer.model.training else "eval"
        self._trainer._metrics[mode][f"rollout/{name}"].append(value)


def logp_difference(
    batch: dict[str, Any],
    sampled: list[list[float]],
    masked: Iterable[Runs] = (),
    of_masked: bool = False,
) -> float | None:
    """Mean absolute difference, per token, of the trainer's log-probabilities from the sampled.

    batch: what a trainer scored; GRPO has log-probabilities of shape (B, T), RLOO sums of
    shape (B,), from which the difference of a sequence is spread over its tokens.
    sampled: log-probabilities of one generation, B lists; masked: of each sequence, the runs
    sampled under a grammar; of_masked: whether to count the tokens of these, or the others.
    None if there are none to count, or batch and sampled don't fit together.
    """
    mask = batch.get("completion_mask")
    if mask is None:
        return None
    mask = mask.detach().cpu().bool()
    if "tool_mask" in batch and batch["tool_mask"] is not None:
        mask &= batch["tool_mask"].detach().cpu().bool()
    under_grammar = torch.zeros_like(mask)
    for row, runs in zip(under_grammar, masked, strict=False):
        for start, end in runs:
            row[start:end] = True
    counted = mask & (under_grammar if of_masked else ~under_grammar)
    trained, by_trl = batch.get("old_per_token_logps"), batch.get("sampling_per_token_logps")
    if trained is not None and by_trl is not None:
        gap = (trained - by_trl).detach().float().cpu().abs()
        gap = gap[counted & ~gap.isnan()]
        return gap.mean().item() if gap.numel() else None
    sums = batch.get("old_logps")
    if sums is None or mask.sum(1).tolist() != [len(s) for s in sampled]:
        return None
    sampled_sums = torch.tensor([sum(s) for s in sampled])
    gap = (sums.detach().float().cpu() - sampled_sums).abs() / mask.sum(1).clamp(min=1)
    gap = gap[(under_grammar & mask).any(1) == of_masked]
    return gap.mean().item() if gap.numel() else None


class _WakeAtTheEnd(TrainerCallback):
    """After training, and after an evaluation outside of it, the endpoint serves the policy."""

    def __init__(self, server: RolloutServer):
        self._server = server
        self._training = False

    def on_train_begin(self, args, state, control, **kwargs):
        self._training = True

    def on_train_end(self, args, state, control, **kwargs):
        self._training = False
        if self._server.state not in (State.BROKEN, State.CLOSED):
            self._server.sync_weights()

    def on_evaluate(self, args, state, control, **kwargs):
        if not self._training and self._server.state is State.ASLEEP:
            self._server.wake()


class AgentRollouts:
    """Stands in for TRL's `rollout_func`."""

    def __init__(
        self, server: RolloutServer, config: RolloutConfig, agent: Agent,
        generation: EngineGeneration,
    ):  # fmt: skip
        self._server = server
        self._config = config
        self._agent = agent
        self._generation = generation
        self._succeeded = False
        self.examples: list[dict[str, Any]] = []  # of the prompts that come next

    def __call__(self, prompts: list[Any], trainer: Any) -> dict[str, list[Any]]:
        """A row for each of `prompts`, which are repeated already, in their order."""
        examples = self.examples or [{"prompt": prompt} for prompt in prompts]
        started, config = time.perf_counter(), self._config
        bar = tqdm(
            total=len(examples), desc="rollouts", unit="rollout", leave=False,
            disable=not (config.progress and trainer.accelerator.is_main_process),
        )  # fmt: skip
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
                self._server.session, self._agent, examples, done=done,
                concurrency=config.rollout_concurrency, timeout=config.rollout_timeout,
            )  # fmt: skip
        self._require_one(outcomes)
        log = self._generation.log
        log("tokens_per_second", tokens / (time.perf_counter() - started))
        log("turns", turns / len(outcomes))
        log("failed", sum(o.error is not None for o in outcomes) / len(outcomes))
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


def _bind(
    trainer: Any, server: RolloutServer, config: RolloutConfig, rollout: Agent | None
) -> None:
    """Put an `EngineGeneration` where TRL looks for its own, until the server is closed."""
    generation, wake_at_the_end = EngineGeneration(trainer, server), _WakeAtTheEnd(server)
    generate, score = trainer._generate, trainer._generate_and_score_completions
    mode = trainer.vllm_mode

    @functools.wraps(generate)
    def generate_then_sleep(*args, **kwargs):
        # Around the whole rollout: a tool loop asks for completions many times.
        if server.state is State.ASLEEP:
            trainer._last_loaded_step = -1  # has no weights now: let TRL sync
        try:
            return generate(*args, **kwargs)
        finally:
            generation.sleep()

    agents = None if rollout is None else AgentRollouts(server, config, rollout, generation)

    @functools.wraps(score)
    def score_and_compare(inputs, *args, **kwargs):
        if agents is not None:
            agents.examples = inputs
        batch = score(inputs, *args, **kwargs)
        generation.log_difference(batch)
        return batch

    def unbind():
        trainer.use_vllm, trainer.vllm_mode = False, mode
        del trainer.vllm_generation, trainer._generate, trainer._generate_and_score_completions
        trainer.remove_callback(wake_at_the_end)
        if agents is not None:
            trainer.rollout_func = None

    if agents is not None:
        trainer.rollout_func = agents
    trainer.vllm_generation = generation
    trainer.use_vllm = True
    trainer.vllm_mode = "server"  # the branch that assumes nothing of where vLLM is
    trainer._last_loaded_step = -1
    trainer._generate = generate_then_sleep
    trainer._generate_and_score_completions = score_and_compare
    trainer.add_callback(wake_at_the_end)
    server.call_on_close(unbind)


def _sampling(trainer: Any) -> dict[str, Any]:
    fields = {
        "temperature": trainer.temperature,
        "top_p": trainer.top_p,
        "top_k": trainer.top_k or 0,
        "min_p": trainer.min_p or 0.0,
        "repetition_penalty": trainer.repetition_penalty,
        "max_tokens": trainer.max_completion_length,
    }
    return {name: value for name, value in fields.items() if value is not None}


def _generation_fields(trainer: Any) -> dict[str, Any]:
    """The fields of the trainer's own rollouts, over the server's defaults."""
    from vllm.sampling_params import StructuredOutputsParams

    fields = _sampling(trainer) | dict(trainer.args.generation_kwargs or {})
    regex = getattr(trainer.args, "vllm_structured_outputs_regex", None)
    if regex is not None:
        fields["structured_outputs"] = StructuredOutputsParams(regex=regex)
    elif isinstance(fields.get("structured_outputs"), dict):
        fields["structured_outputs"] = StructuredOutputsParams(**fields["structured_outputs"])
    return fields


def _check(trainer: Any, config: RolloutConfig) -> None:
    kind = type(trainer).__name__
    if not hasattr(trainer, "_generate_single_turn") or not hasattr(trainer, "use_vllm"):
        raise TrainerError(
            f"{kind} doesn't generate while it trains; attach a GRPOTrainer or RLOOTrainer"
        )
    if trainer.use_vllm:
        raise TrainerError(
            f"the {kind} was made with use_vllm=True and has an engine already; set "
            "use_vllm=False in its config: attach() gives it one"
        )
    for name in ("use_transformers_continuous_batching", "use_transformers_paged"):
        if getattr(trainer, name, None) or getattr(trainer.args, name, None):
            raise TrainerError(
                f"{name}=True in the {kind}'s config asks for another generator; set it to False"
            )
    for method in ("_generate", "_generate_and_score_completions"):
        if not inspect.ismethod(getattr(trainer, method, None)):
            raise TrainerError(f"{kind} has no {method}(); TRL 1.0 or later is needed")
    if getattr(trainer, "vllm_importance_sampling_correction", False):
        _check_importance_sampling(trainer, config)


def _check_rollout(trainer: Any, config: RolloutConfig) -> None:
    kind = type(trainer).__name__
    if not hasattr(trainer, "rollout_func"):
        raise TrainerError(f"rollout=: a {kind} takes no rollouts of agents; use a GRPOTrainer")
    if trainer.rollout_func is not None or getattr(trainer, "tools", None):
        raise TrainerError(
            f"rollout=: the {kind} has rollouts of its own (rollout_func or tools); leave them out"
        )
    if config.tensor_parallel > 1:
        raise NotAvailableError(
            "rollout= with engine_args['tensor_parallel_size'] above 1 isn't available in this "
            "version; leave that out"
        )


def _check_importance_sampling(trainer: Any, config: RolloutConfig) -> None:
    """What TRL's constructor checks where it is told that it has vLLM."""
    mode = trainer.vllm_importance_sampling_mode
    allowed = ("token_truncate", "token_mask", "sequence_truncate", "sequence_mask")
    if mode not in allowed:
        raise TrainerError(
            f"vllm_importance_sampling_mode={mode!r}: give one of {', '.join(map(repr, allowed))}"
        )
    if getattr(trainer, "loss_type", None) == "vespo" and not mode.startswith("token_"):
        raise TrainerError(
            f"vllm_importance_sampling_mode={mode!r}: loss_type='vespo' needs 'token_truncate' or "
            "'token_mask'"
        )
    reported = config.engine_args.get("logprobs_mode", "processed_logprobs")
    if reported != "processed_logprobs":
        warnings.warn(
            f"engine_args sets logprobs_mode={reported!r}, which biases the importance sampling "
            "correction; leave it out, or set vllm_importance_sampling_correction=False",
            stacklevel=3,
        )
