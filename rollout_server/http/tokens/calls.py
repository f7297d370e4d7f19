"""One request of a client: what it knows of earlier answers, and what the engine saw and sampled.

Which request a call of vLLM's methods belongs to (see vllm_hooks.py) is told by a context variable.
"""

import contextlib
import hashlib
import itertools
from array import array
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any, Protocol

from rollout_server import vllm_compat as compat
from rollout_server.engine.images import KnownIds
from rollout_server.engine.sampling import neutral, scoring_params, token_prompt
from rollout_server.http.responses import BadRequest
from rollout_server.http.tokens.history import History
from rollout_server.http.tokens.options import Options
from rollout_server.http.tokens.parsed_messages import CachedPrefix
from rollout_server.http.tokens.splice import Known, Message
from rollout_server.lifecycle.gate import Gate
from rollout_server.trajectories.tree import LOWEST_LOGPROB

_WRONG_VALUE = (
    TypeError,
    ValueError,
    LookupError,
    AttributeError,
    ArithmeticError,
    RecursionError,
    AssertionError,
    NotImplementedError,
)
_CHANGED = (
    "vLLM cuts the prompt, or changes its tokens where it puts images in their places, so it "
    "doesn't begin with those of earlier turns; leave truncate_prompt_tokens out, or send the "
    "conversation without a session and without token ids"
)
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
class GenerationRequest:
    """Starts what one request generates; `name` is added to its id.

    generate: vLLM's; model: vLLM's config of it; options: of the request, besides prompt and
    parameters.
    """

    generate: Callable[..., AsyncGenerator[Any]]
    model: Any
    request_id: str
    options: dict[str, Any]

    def __call__(self, prompt: Any, params: Any, name: str = "") -> AsyncGenerator[Any]:
        return self.generate(prompt, params, self.request_id + name, **self.options)

    def scoring(self, ids: list[int]) -> AsyncGenerator[Any] | None:
        """Has each of `ids` scored by the model alone. None if they fill the context: vLLM wants
        room for a token to sample."""
        if len(ids) >= self.model.max_model_len:
            return None
        adapter = {n: v for n, v in self.options.items() if n == "lora_request"}
        name = f"{self.request_id}-scoring"
        return self.generate(token_prompt(ids), scoring_params(), name, **adapter)

    def unseen(self) -> str:
        """Why a conversation that vLLM renders in another way can't be token-exact."""
        kind = getattr(self.model.hf_config, "model_type", "this model")
        return (
            f"vLLM renders conversations of {kind} in a way of its own, in which tokens of earlier "
            "answers have no place: sessions, and token ids in messages, can't be exact. Use "
            "/v1/completions or /generate with token ids, or this route with neither"
        )


class Conversation(Protocol):
    """What is remembered of a session's answers."""

    def known(self, messages: Sequence[Message], template: Any) -> Known | None:
        """The tokens of the latest answer in `messages` that was given to those before it."""


@dataclass
class Call:
    """A request from its first token to its last.

    What it goes on from, what the engine was given for it and what it sampled. Whoever takes it a
    step further calls the step's method; in order:

    - `going_on_from`: messages of an earlier request that vLLM isn't handed again;
    - `whole`: all messages, where vLLM was handed the others alone;
    - `rendering`: the messages as the template gets them; gives the tokens to go on from;
    - `generate`: the engine's outputs, which are kept on their way.

    conversation: the session's, None without one; told: tokens that the client sent along;
    answered: what was answered outside of sessions, with which those are compared.
    with_logprobs: a log-probability is kept of each token, whether or not the client asked for it.
    own_length: it says how many tokens to sample at most.
    silent: what is sampled is shown to nobody, so it is none: vLLM samples a token where it was
    asked for the prompt alone.
    must_see: its prompt is a conversation, which must be rendered where vllm_hooks.py sees it.

    earlier: those messages, as vLLM left them; messages, template: what was rendered, of the whole
    request, and with what besides (a key); edited: the tokens to go on from came from the client,
    which may have edited the messages; known_ids: the prompt's with those of an earlier turn, where
    it holds images; opening: token ids with which the template opens the answer, where a parser
    looks for reasoning in them; parser: that parser, vLLM's.
    generations: what the engine was given and sampled; unshown: log-probabilities are recorded, and
    not in the answer; died: why the engine that had it won't answer.
    """

    version: Callable[[], int]
    gate: Gate
    options: Options = field(default_factory=Options)
    conversation: Conversation | None = None
    told: Known | None = None
    answered: History | None = None
    with_logprobs: bool = False
    own_length: bool = True
    silent: bool = False
    must_see: bool = False

    earlier: CachedPrefix = field(default_factory=CachedPrefix)
    messages: list[Message] = field(default_factory=list)
    template: Any = None
    edited: bool = False
    known_ids: KnownIds | None = None
    opening: list[int] | None = None
    parser: Any = None
    generations: list[Generation] = field(default_factory=list)
    unshown: bool = False
    died: str | None = None
    _seen: bool = False

    # -- its prompt ---------------------------------------------------------------------------

    def going_on_from(self, earlier: CachedPrefix) -> None:
        self.earlier = earlier

    def whole(self, messages: Sequence[Message]) -> list[Message]:
        """All messages of the request, of which vLLM has `messages`."""
        return [*self.earlier.messages, *messages]

    @property
    def remembers(self) -> bool:
        """Whether it goes on from an earlier answer, or another may go on from its own."""
        return self.conversation is not None or self.told is not None or self.with_logprobs

    def rendering(self, messages: list[Message], template: bytes) -> Known | None:
        """The tokens that the prompt goes on from, if they are known.

        messages: all, as the template gets them; template: names what else it gets.
        """
        self._seen, self.messages, self.template = True, messages, template
        if self.conversation is not None:
            known = self.conversation.known(messages, template)
            if known is not None:
                return known
        told = self.told
        if told is not None and self.answered is not None:
            ours = self.answered.find(template, messages)
            self.edited = ours != (told.at, digest([*told.prompt_ids, *told.ids]))
        return told

    # -- its answer ---------------------------------------------------------------------------

    def generate(self, start: GenerationRequest, prompt: Any, params: Any) -> AsyncGenerator[Any]:
        """The engine's outputs for `prompt`, kept on their way. Raises `BadRequest` before there is
        any, for then an answer hasn't begun, which an error couldn't take back."""
        if self.must_see and not self._seen:
            raise BadRequest(start.unseen())
        if self.known_ids is not None and not self.known_ids.kept_in(prompt["prompt_token_ids"]):
            raise BadRequest(_CHANGED)
        if self.with_logprobs and params.logprobs is None:
            params.logprobs = 0
            self.unshown = params.prompt_logprobs is None
        if self.parser is not None and params.structured_outputs is not None:
            self._tell_reasoning(start, prompt)
        return self._sampled(start, prompt, params)

    def _tell_reasoning(self, start: GenerationRequest, prompt: Any) -> None:
        """Whether a grammar holds from the first token on. Where vLLM doesn't say, the engine would
        look for it in the whole prompt."""
        if self.opening is not None and start.options.get("reasoning_ended") is None:
            ended = self.parser.is_reasoning_end(prompt["prompt_token_ids"])
            start.options["reasoning_ended"] = ended

    async def _sampled(
        self, start: GenerationRequest, prompt: Any, params: Any
    ) -> AsyncGenerator[Any]:
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

    async def _restarted(
        self, start: GenerationRequest, prompt: Any, params: Any
    ) -> AsyncGenerator[Any]:
        """The steps of the first attempt during which the weights don't change, at its end."""
        for attempt in itertools.count():
            name = f"-attempt{attempt}" if attempt else ""
            steps = start(dict(prompt), params.clone(), name)  # vLLM may change what it is given
            if (attempted := await self.gate.unless_renewed(_all(steps))) is not None:
                break
        for step in attempted:
            yield step

    async def _unmask(
        self, start: GenerationRequest, prompt_ids: list[int], sample: Sample, params: Any
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
        if output.logprobs:
            told = output.logprobs
            if type(told[0]) is not float:  # else the sampled ones alone are kept
                told = [at[i].logprob for i, at in zip(ids, told, strict=True)]
            sample.logprobs += told if min(told) >= LOWEST_LOGPROB else map(_bounded, told)
        sample.ids += ids
        if output.finish_reason is not None:
            sample.finish_reason = output.finish_reason
            if spans := compat.weight_spans(output):  # of all its tokens; told at its end
                sample.versions = spans
                return
        if ids:
            version, versions = self.version(), sample.versions
            if versions and versions[-1][0] == version:
                versions[-1] = (version, versions[-1][1], len(sample.ids))
            else:
                versions.append((version, start, len(sample.ids)))


def _bounded(logprob: float) -> float:
    return max(logprob, LOWEST_LOGPROB)


async def _all(steps: AsyncGenerator[Any]) -> list[Any]:
    return [step async for step in steps]


def digest(ids: Sequence[int]) -> bytes:
    """Of token ids, for comparing."""
    return hashlib.blake2b(array("q", ids).tobytes(), digest_size=16).digest()


def _is_text(prompt: Any) -> bool:
    """Whether its token ids are all of it: no images."""
    return isinstance(prompt, Mapping) and prompt.get("type") == "token"


def is_request(error: BaseException) -> bool:
    """Whether an error is that of the request which is being answered."""
    call = current.get()
    sampled = call is not None and any(g.samples for g in call.generations)
    return not sampled and isinstance(error, (*_WRONG_VALUE, *compat.request_errors()))
