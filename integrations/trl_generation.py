"""What takes the place of TRL's `VLLMGeneration`: completions from the engine."""

import itertools
import time
from collections.abc import Iterable
from contextlib import nullcontext
from typing import Any

from rollout_server.completion import Completion
from rollout_server.engine.sampling import structured_outputs
from rollout_server.errors import NotAvailableError
from rollout_server.lifecycle.state import State
from rollout_server.server import RolloutServer

from .trl_measures import Runs, logp_difference, truncated_mass


class EngineGeneration:
    """Stands in for TRL's `VLLMGeneration`."""

    def __init__(self, trainer: Any, server: RolloutServer):
        self._trainer = trainer
        self._server = server
        self._fields = generation_fields(trainer)
        self._asked_again = False  # since `begin`: by a tool loop, with what came before
        self.sampled: list[list[float]] = []
        # Of each row, runs of tokens that were sampled under a grammar (`Rollout.masked`).
        grammar = self._fields.get("structured_outputs") is not None
        self.masked: Iterable[Runs] = itertools.repeat([(0, None)] if grammar else [])

    def begin(self) -> None:
        """A rollout begins: the next prompts are the data set's own."""
        self._asked_again = False

    def sync_weights(self) -> None:
        """Give the engine the policy's weights; wakes it."""
        report = self._server.sync_weights()
        self.log("seconds_sync", report.seconds - report.wake_seconds)
        self.log("seconds_wake", report.wake_seconds)

    def generate(
        self,
        prompts: list[list[int]],
        images: list[Any] | None = None,
        num_generations: int = 1,
        profiler: Any = None,
    ) -> tuple[list[list[int]], list[list[int]], list[list[list[float]]], list[list[list[int]]]]:
        """One completion for each of `prompts`, in their order.

        prompts: token ids; repeated already, so `num_generations` isn't needed here. One that a
            tool's result has made longer than the engine's context is completed by nothing, which
            ends TRL's tool loop; one of the data set's is refused.
        images: of each prompt a list of PIL images, whose tokens are all in the prompt; or None.

        Returns (prompt_ids, completion_ids, logprobs, logprob_token_ids), each a list with an
        entry per prompt; of the last two, each entry is a list per token with one value.
        """
        if images is not None and any(images) and brings_tools(self._trainer):
            raise NotAvailableError(
                "the prompts hold images, beside which the trainer's tools and environments aren't "
                "available in this version; leave either out"
            )
        if self._asleep:  # asked again without a new optimizer step
            self.sync_weights()
        started = time.perf_counter()
        with profiler or nullcontext():
            completions = self._complete(prompts, images or [None] * len(prompts))
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

    def _complete(self, prompts: list[list[int]], images: list[Any]) -> list[Completion]:
        room = self._server.max_model_len if self._asked_again else float("inf")
        self._asked_again = True
        seen = [of_one for p, of_one in zip(prompts, images, strict=True) if len(p) < room]
        fit = [p for p in prompts if len(p) < room]
        sampled = iter(self._server.generate(fit, self._fields, images=seen))
        return [next(sampled) if len(p) < room else self._nothing(p) for p in prompts]

    def _nothing(self, prompt: list[int]) -> Completion:
        return Completion(prompt, [], "", [], "length", self._server.policy_version, [])

    def sleep(self) -> None:
        """Give the engine's memory back to the trainer."""
        if self._server.state not in (State.ASLEEP, State.BROKEN, State.CLOSED):
            started = time.perf_counter()
            self._server.sleep()
            if self._asleep:
                self.log("seconds_sleep", time.perf_counter() - started)

    @property
    def _asleep(self) -> bool:
        return self._server.state is State.ASLEEP

    def log_difference(self, batch: dict[str, Any]) -> None:
        """Log how far the engine's log-probabilities are from the trainer's, per token; apart from
        the others, tokens sampled under a grammar, of which the trainer knows nothing."""
        for name, grammar in (("logp_difference", False), ("logp_difference_masked", True)):
            difference = logp_difference(batch, self.sampled, self.masked, grammar)
            if difference is not None:
                self.log(name, difference)
                self._server.note_logprob_difference(difference, grammar=grammar)
        if (cut_off := truncated_mass(batch, self.masked)) is not None:
            self.log("truncated_mass", cut_off)

    def log(self, name: str, value: float) -> None:
        """Put a number into the trainer's log, as `rollout/name`."""
        mode = "train" if self._trainer.model.training else "eval"
        self._trainer._metrics[mode][f"rollout/{name}"].append(value)


def sampling_of(trainer: Any) -> dict[str, Any]:
    fields = {
        "temperature": trainer.temperature,
        "top_p": trainer.top_p,
        "top_k": trainer.top_k or 0,
        "min_p": trainer.min_p or 0.0,
        "repetition_penalty": trainer.repetition_penalty,
        "max_tokens": trainer.max_completion_length,
    }
    return {name: value for name, value in fields.items() if value is not None}


def sees_images(trainer: Any) -> bool:
    return hasattr(trainer.processing_class, "image_processor")


def brings_tools(trainer: Any) -> bool:
    """Whether more comes into a conversation while its completion is made."""
    names = ("tools", "environment_factories", "environments")
    return any(getattr(trainer, name, None) for name in names)


def generation_fields(trainer: Any) -> dict[str, Any]:
    """The fields of the trainer's own rollouts, over the server's defaults."""
    fields = sampling_of(trainer) | dict(trainer.args.generation_kwargs or {})
    regex = getattr(trainer.args, "vllm_structured_outputs_regex", None)
    if regex is not None:
        fields["structured_outputs"] = structured_outputs(regex=regex)
    elif isinstance(fields.get("structured_outputs"), dict):
        fields["structured_outputs"] = structured_outputs(**fields["structured_outputs"])
    if sees_images(trainer):
        # A token that stands for an image and has none: transformers refuses the completion. TRL
        # has them suppressed where transformers generates.
        config = trainer.model.config
        tokens = (getattr(config, name, None) for name in ("image_token_id", "image_token_index"))
        never = {token: -100.0 for token in tokens if isinstance(token, int)}
        fields["logit_bias"] = never | dict(fields.get("logit_bias") or {})
    return fields
