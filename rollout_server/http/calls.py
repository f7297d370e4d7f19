"""One request of a client: what it knows of earlier answers, and what the engine saw and sampled.

vLLM's routes all render messages through one method of its renderer and sample through one method
of its client. Both are wrapped here, so each route, streaming or not, is token-exact and recorded
by the tokens themselves. Which request such a call belongs to is told by a context variable.
"""

import contextlib
import dataclasses
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

from rollout_server.engine import compat
from rollout_server.http.splice import Known, Message, Splicer
from rollout_server.trajectories.tree import LOWEST_LOGPROB

current: ContextVar["Call | None"] = ContextVar("rollout_call", default=None)


@dataclass
class Sample:
    """One sampled answer: token ids, a log-probability (nats) each, versions as (version, start,
    end), and why it ended."""

    ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
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


@dataclass
class Call:
    """
    known: finds the tokens of an earlier answer, given the messages as the template gets them and
    what else it gets; carried: whether they came from the client, which may have edited them.
    """

    version: Callable[[], int]
    known: Callable[[Sequence[Message], Any], Known | None]
    carried: bool = False
    with_logprobs: bool = False
    messages: list[Message] = field(default_factory=list)
    template: Any = None
    generations: list[Generation] = field(default_factory=list)

    async def sampled(self, outputs: AsyncIterator[Any], params: Any) -> AsyncIterator[Any]:
        """Pass the engine's outputs on, and keep what they hold."""
        generation = Generation(masked=params.structured_outputs is not None)
        self.generations.append(generation)
        whole = params.output_kind.name != "DELTA"
        async for step in outputs:
            if not generation.prompt_ids and step.prompt_token_ids is not None:
                generation.prompt_ids = list(step.prompt_token_ids)
            for output in step.outputs:
                if whole:
                    generation.samples[output.index] = Sample()
                sample = generation.samples.setdefault(output.index, Sample())
                self._take(sample, output)
            yield step

    def _take(self, sample: Sample, output: Any) -> None:
        ids = list(output.token_ids)
        if output.logprobs is not None:
            sample.logprobs += [
                max(at[i].logprob, LOWEST_LOGPROB)
                for i, at in zip(ids, output.logprobs, strict=True)
            ]
        versions, start = sample.versions, len(sample.ids)
        sample.ids += ids
        sample.finish_reason = output.finish_reason or sample.finish_reason
        if spans := compat.weight_spans(output):  # of all its tokens; told at its end
            sample.versions = spans
        elif ids:
            version = self.version()
            if versions and versions[-1][0] == version:
                start = versions.pop()[1]
            versions.append((version, start, len(sample.ids)))


def tap(client: Any, tokenizer: Any) -> None:
    """Have an `AsyncLLM` tell the `current` call what it renders and samples."""
    _tap_generate(client)
    _tap_render(client.renderer, Splicer(tokenizer, _ends(client.model_config)))


def _ends(model_config: Any) -> list[int]:
    """Ids of the tokens at which vLLM ends an answer."""
    ends = (model_config.try_get_generation_config() or {}).get("eos_token_id")
    return [ends] if isinstance(ends, int) else list(ends or ())


def _tap_generate(client: Any) -> None:
    generate = client.generate

    async def tapped(prompt, sampling_params, request_id, **options):
        call = current.get()
        if call is not None and call.with_logprobs and sampling_params.logprobs is None:
            sampling_params.logprobs = 0
        outputs = generate(prompt, sampling_params, request_id, **options)
        if call is not None:
            outputs = call.sampled(outputs, sampling_params)
        async with contextlib.aclosing(outputs):
            async for step in outputs:
                yield step

    client.generate = tapped


def _tap_render(renderer: Any, splicer: Splicer) -> None:
    render = renderer.render_messages_async

    async def tapped(messages, params):
        call = current.get()
        if call is None:
            return await render(messages, params)
        call.messages = [_plain(m) for m in messages]
        call.template = _template(params)
        options = params.chat_template_kwargs
        known = call.known(call.messages, call.template)
        if known is None or options.get("continue_final_message"):
            return await render(_copies(call.messages), params)
        conversation = None

        async def text(messages, generation):
            nonlocal conversation
            chosen = options | {"tokenize": False, "continue_final_message": False}
            if not generation:
                chosen["add_generation_prompt"] = False
            try:
                conversation, prompt = await render(
                    _copies(messages), dataclasses.replace(params, chat_template_kwargs=chosen)
                )
            except compat.request_errors():
                return None
            return prompt.get("prompt") if "multi_modal_data" not in prompt else None

        goes_on = not call.carried or await splicer.goes_on(
            call.messages, known, text, call.template
        )
        if goes_on:
            ids = await splicer.splice(call.messages, known, text, call.template)
            if ids is not None:
                return conversation, {"prompt_token_ids": ids}
        return await render(_copies(call.messages), params)

    renderer.render_messages_async = tapped


def _template(params: Any) -> Any:
    """What a template renders with besides messages, as a key."""
    options = {k: v for k, v in params.chat_template_kwargs.items() if k not in _NOT_OF_HISTORY}
    return params.chat_template, repr(sorted(options.items(), key=lambda item: item[0]))


_NOT_OF_HISTORY = ("add_generation_prompt", "continue_final_message", "tokenize")


def _plain(message: Any) -> Message:
    """A message as a dict whose lists can be read more than once, unlike pydantic's."""
    if hasattr(message, "model_dump"):
        message = message.model_dump(exclude_none=True)
    message = dict(message)
    for name in ("content", "tool_calls"):
        value = message.get(name)
        if value is not None and not isinstance(value, str):
            message[name] = [_as_dict(part) for part in value]
    return message


def _as_dict(part: Any) -> Any:
    if hasattr(part, "model_dump"):
        return part.model_dump(exclude_none=True)
    return dict(part) if isinstance(part, Mapping) else part


def _copies(messages: Sequence[Message]) -> list[Message]:
    """vLLM parses tool calls' arguments in place."""
    copies = []
    for message in messages:
        copy = dict(message)
        if copy.get("tool_calls"):
            copy["tool_calls"] = [
                {**c, "function": dict(c["function"])} if isinstance(c.get("function"), Mapping)
                else dict(c)
                for c in copy["tool_calls"]
            ]  # fmt: skip
        copies.append(copy)
    return copies
