"""One request of a client: what it knows of earlier answers, and what the engine saw and sampled.

Which request a call of vLLM's methods belongs to (see taps.py) is told by a context variable.
"""

import contextlib
import itertools
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

from rollout_server import vllm_compat as compat
from rollout_server.engine.sampling import neutral, scoring_params, token_prompt
from rollout_server.http.tokens.options import Options
from rollout_server.http.tokens.parsed_messages import Earlier
from rollout_server.http.tokens.splice import Known, Message
from rollout_server.lifecycle.gate import Gate
from rollout_server.trajectories.tree import LOWEST_LOGPROB

_WRONG_VALUE = (
    TypeError, ValueError, LookupError, AttributeError, ArithmeticError, RecursionError,
    AssertionError, NotImplementedError,
)  # fmt: skip
current: ContextVar["Call | None"] = ContextVar("rollout_call", default=None)


@dataclass
class Sample:
    """One sampled answer: token ids, a log-probability (nats) each, versions as (version, start,
    end), and why it ended.

    unmasked: the model's own log-probabilities, where they were asked for and can be told.
    """

    ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    unmasked: list[float] | None = None
    versions: list[tuple[int, int, int]] = field(default_factory=list)
    finish_reason: str | None = None


@dataclass
class Generation:
    """One prompt that the engine was given, and its samples by index.

    masked: a grammar forbade tokens, so log-probabilities are those of what it left.
    """

    prompt_ids: list[int] = field(default_factory=list)
    masked: bool = False
    samples: dict[int, Sample] = field(default_factory=dict)


@dataclass(frozen=True)
class Start:
    """Starts what one request generates; `name` is added to its id.

    generate: vLLM's; length: its longest sequence in tokens; options: of the request, besides
    prompt and parameters.
    """

    generate: Callable[..., AsyncIterator[Any]]
    length: int
    request_id: str
    options: Mapping[str, Any]

    def __call__(self, prompt: Any, params: Any, name: str = "") -> AsyncIterator[Any]:
        return self.generate(prompt, params, self.request_id + name, **self.options)

    def scoring(self, ids: list[int]) -> AsyncIterator[Any] | None:
        """Has each of `ids` scored by the model alone. None if they fill the context: vLLM wants
        room for a token to sample."""
        if len(ids) >= self.length:
            return None
        adapter = {n: v for n, v in self.options.items() if n == "lora_request"}
        name = f"{self.request_id}-scoring"
        return self.generate(token_prompt(ids), scoring_params(), name, **adapter)


@dataclass
class Call:
    """What is known of a request on its way to the engine and back.

    known: finds the tokens of an earlier answer, given the messages as the template gets them and
    what else it gets; carried: whether they came from the client, which may have edited them.
    must_see: whether its prompt is a conversation that must be rendered where taps.py sees it;
    seen: whether it was.
    earlier: the first messages, as vLLM left them in an earlier request, which it isn't handed
    again; rendered: the messages that it is rendering.
    opening: token ids with which the template opens the answer, where a parser looks for reasoning
    in them; parser: that parser, vLLM's.
    own_length: it says how many tokens to sample at most.
    silent: what is sampled is shown to nobody, so it is none: vLLM samples a token where it was
    asked for the prompt alone.
    unshown: log-probabilities are recorded, and not in the answer.
    died: why the engine that had it won't answer.
    """

    version: Callable[[], int]
    known: Callable[[Sequence[Message], Any], Known | None]
    gate: Gate
    options: Options
    carried: bool = False
    with_logprobs: bool = False
    must_see: bool = False
    seen: bool = False
    silent: bool = False
    own_length: bool = True
    earlier: Earlier = field(default_factory=Earlier)
    rendered: Sequence[Message] = ()
    opening: list[int] | None = None
    parser: Any = None
    messages: list[Message] = field(default_factory=list)
    template: Any = None
    generations: list[Generation] = field(default_factory=list)
    unshown: bool = False
    died: str | None = None

    async def sampled(self, start: Start, prompt: Any, params: Any) -> AsyncIterator[Any]:
        """Pass the engine's outputs for `prompt` on, and keep what they hold."""
        generation = Generation(masked=params.structured_outputs is not None)
        self.generations.append(generation)
        whole = params.output_kind.name != "DELTA"
        restarts = self.options.on_sync == "restart"
        steps = self._restarted(start, prompt, params) if restarts else start(prompt, params)
        samples = generation.samples
        try:
            async with contextlib.aclosing(steps):
                async for step in steps:
                    if not generation.prompt_ids and step.prompt_token_ids is not None:
                        generation.prompt_ids = list(step.prompt_token_ids)
                    for output in step.outputs:
                        sample = samples.get(output.index)
                        if whole or sample is None:
                            sample = samples[output.index] = Sample()
                        self._take(sample, output)
                    if step.finished and self.options.unmasked_logprobs and _is_text(prompt):
                        for sample in samples.values():
                            await self._unmask(start, generation.prompt_ids, sample, params)
                    yield step
        except compat.engine_death() as error:
            self.died = str(error)
            raise

    async def _restarted(self, start: Start, prompt: Any, params: Any) -> AsyncIterator[Any]:
        """The steps of the first attempt during which the weights don't change, at its end."""
        for attempt in itertools.count():
            name = f"-attempt{attempt}" if attempt else ""
            steps = start(dict(prompt), params.clone(), name)  # vLLM may change what it is given
            if (steps := await self.gate.unless_renewed(_all(steps))) is not None:
                break
        for step in steps:
            yield step

    async def _unmask(
        self, start: Start, prompt_ids: list[int], sample: Sample, params: Any
    ) -> None:
        """Find the model's own log-probabilities, unless another version sampled the tokens."""
        version = self.version()
        if params.temperature not in (0, 1) or any(v != version for v, _, _ in sample.versions):
            return
        if neutral(params) or not sample.ids:
            sample.unmasked = sample.logprobs
            return
        scoring = start.scoring(prompt_ids + sample.ids)
        if scoring is not None and (steps := await self.gate.unless_renewed(_all(scoring))):
            told = steps[-1].prompt_logprobs[len(prompt_ids) :]
            sample.unmasked = [
                max(at[i].logprob, LOWEST_LOGPROB) for i, at in zip(sample.ids, told, strict=True)
            ]

    def _take(self, sample: Sample, output: Any) -> None:
        if self.silent:
            sample.finish_reason = output.finish_reason or sample.finish_reason
            return
        ids, start = output.token_ids, len(sample.ids)
        if output.logprobs is not None:
            sample.logprobs += [
                max(at[i].logprob, LOWEST_LOGPROB)
                for i, at in zip(ids, output.logprobs, strict=True)
            ]
        sample.ids += ids
        if output.finish_reason is not None:
            sample.finish_reason = output.finish_reason
            if spans := compat.weight_spans(output):  # of all its tokens; told at its end
                sample.versions = spans
                return
        if ids:
            version, versions = self.version(), sample.versions
            if versions and versions[-1][0] == version:
                start = versions.pop()[1]
            versions.append((version, start, len(sample.ids)))


async def _all(steps: AsyncIterator[Any]) -> list[Any]:
    return [step async for step in steps]


def _is_text(prompt: Any) -> bool:
    """Whether its token ids are all of it: no images."""
    return isinstance(prompt, Mapping) and prompt.get("type") == "token"


def is_request(error: BaseException) -> bool:
    """Whether an error is that of the request which is being answered."""
    call = current.get()
    sampled = call is not None and any(g.samples for g in call.generations)
    return not sampled and isinstance(error, (*_WRONG_VALUE, *compat.request_errors()))
