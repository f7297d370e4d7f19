"""What is wrapped of vLLM, so that requests are token-exact and recorded by the tokens themselves.

Its routes, streaming or not, all render messages through one method of its renderer and sample
through one method of its client. That of chat completions is given whole conversations again.
"""

import dataclasses
import functools
import hashlib
import logging
import sys
from collections.abc import Mapping, Sequence
from contextvars import ContextVar
from typing import Any

from rollout_server import vllm_compat as compat
from rollout_server.engine.logprobs import keep_sampled_alone
from rollout_server.http.responses import BadRequest
from rollout_server.http.tokens import media
from rollout_server.http.tokens.calls import GenerationRequest, current
from rollout_server.http.tokens.reasoning import Openings, hook_parsers
from rollout_server.http.tokens.splice import Message, Splicer
from rollout_server.http.tokens.texts import Texts

log = logging.getLogger("rollout_server")
_GOES_ON = "continue_final_message"
_NOT_TAKEN_APART = "the chat template can't be taken apart"
_EDITED = "the tokens aren't of an answer to these messages that this server knows"
_AFRESH = (
    "a turn was rendered afresh, so its prompt doesn't hold the tokens that were sampled before, "
    "and it is a branch of its own. This is said once"
)


def install_hooks(client: Any, state: Any, texts: Texts) -> None:
    """Have an `AsyncLLM` tell the `current` call what it renders and samples.

    state: of vLLM's app; texts: of the policy's tokenizer.
    """
    if (chat := state.openai_serving_chat) is not None:
        _hook_chat(chat)
    _hook_generate(client)
    if (processor := getattr(client, "output_processor", None)) is not None:
        _hook_logprobs(processor)
    openings = Openings(texts) if hook_parsers(state) else None
    _hook_render(client.renderer, Splicer(texts, _ends(client.model_config)), openings)


def _ends(model_config: Any) -> list[int]:
    """Ids of the tokens at which vLLM ends an answer."""
    ends = (model_config.try_get_generation_config() or {}).get("eos_token_id")
    return [ends] if isinstance(ends, int) else list(ends or ())


def _hook_chat(chat: Any) -> None:
    create = chat.create_chat_completion

    async def hooked(request: Any, *others: Any, **options: Any) -> Any:
        call = current.get()
        if call is not None and call.earlier.messages:
            request.messages = call.whole(request.messages)
        return await create(request, *others, **options)

    chat.create_chat_completion = hooked


def _hook_generate(client: Any) -> None:
    generate = client.generate

    def hooked(prompt: Any, sampling_params: Any, request_id: str, **options: Any) -> Any:
        call = current.get()
        if call is None:
            return generate(prompt, sampling_params, request_id, **options)
        start = GenerationRequest(generate, client.model_config, request_id, options)
        return call.generate(start, prompt, sampling_params)

    client.generate = hooked


def _hook_logprobs(processor: Any) -> None:
    """vLLM makes two objects and a text of each token that has a log-probability, which costs more
    than all else that it does for it. Where the client hasn't asked for them, nobody reads them."""
    add = processor.add_request

    def hooked(request: Any, *others: Any, **options: Any) -> None:
        add(request, *others, **options)
        call = current.get()
        if call is not None and call.unshown:
            keep_sampled_alone(processor.request_states[request.request_id].logprobs_processor)

    processor.add_request = hooked


def _hook_render(renderer: Any, splicer: Splicer, openings: Openings | None) -> None:
    render, parse_is_hooked = renderer.render_messages_async, _hook_parse(renderer)
    warned = False

    async def hooked(messages: Sequence[Any], params: Any) -> Any:
        nonlocal warned
        call = current.get()
        if call is None or (openings is None and not call.remembers):
            return await render(messages, params)
        known_before = call.earlier.messages
        messages = [*known_before, *map(_plain, messages[len(known_before) :])]
        rendering = _Rendering(render, params, copies=not parse_is_hooked)
        template, goes_on = _template(params), params.chat_template_kwargs.get(_GOES_ON)
        known = call.rendering(messages, template)
        token = _rendered.set(rendering)
        try:
            if openings is not None and not goes_on:
                call.opening = await openings.after(messages, rendering.text, template)
            if known is None or goes_on:
                return await rendering.whole(messages)
            text = rendering.text
            ids, edited = None, call.edited
            if not edited or await splicer.is_continuation(messages, known, text, template):
                ids, edited = await splicer.splice(messages, known, text, template), False
            if ids is not None:
                if rendering.media:
                    ids = call.known_ids = media.known_ids(messages, known, ids, rendering.media)
                return rendering.conversation, {"prompt_token_ids": ids, **rendering.media}
            why = _EDITED if edited else _NOT_TAKEN_APART
            if kinds := ", ".join(media.kinds(rendering.media)):
                raise BadRequest(media.NOT_EXACT.format(kinds=kinds, why=why))
            if not edited and not warned:
                warned = True
                log.warning("%s: %s", why, _AFRESH)
            return await rendering.whole(messages)
        finally:
            _rendered.reset(token)

    renderer.render_messages_async = hooked


class _Rendering:
    """One conversation's, by vLLM's `render`.

    conversation, media: what it made of the messages that were rendered last; messages: those.
    """

    def __init__(self, render: Any, params: Any, copies: bool):
        """copies: whether vLLM is handed copies of messages, for it changes them."""
        self._render = render
        self._params = params
        self._copies = copies
        self.conversation: Any = None
        self.media: dict[str, Any] = {}
        self.messages: Sequence[Message] = ()

    async def whole(self, messages: Sequence[Message]) -> Any:
        """As vLLM does it: (conversation, prompt)."""
        self.messages = _copies(messages) if self._copies else messages
        return await self._render(self.messages, self._params)

    async def text(self, messages: Sequence[Message], generation: bool) -> str | None:
        """The text alone, with or without the start of the next answer, a mark in the place of
        each image; None: it can't be."""
        chosen = self._params.chat_template_kwargs | {"tokenize": False, _GOES_ON: False}
        if not generation:
            chosen["add_generation_prompt"] = False
        self.messages = _copies(messages) if self._copies else messages
        params = dataclasses.replace(self._params, chat_template_kwargs=chosen)
        try:
            self.conversation, prompt = await self._render(self.messages, params)
        except compat.request_errors():
            return None
        self.media = media.of_prompt(prompt)
        return prompt.get("prompt") if media.kinds(self.media) in ([], ["image"]) else None


# What the current request has rendered.
_rendered: ContextVar["_Rendering | None"] = ContextVar("rollout_rendering", default=None)


def _hook_parse(renderer: Any) -> bool:
    """What vLLM's usual renderer makes of messages for their template is kept for the next turn.
    Other renderers' it can't be kept of: False."""
    module: Any = sys.modules[type(renderer).__module__]
    parse = getattr(module, "parse_chat_messages_async", None)
    if module.__name__ != "vllm.renderers.hf" or parse is None:
        return False
    if hasattr(parse, "hooked"):  # for an engine before this one
        return True

    @functools.wraps(parse)
    async def hooked(
        messages: Sequence[Message], model_config: Any, content_format: str, **options: Any
    ) -> Any:
        def copied(messages: Sequence[Message]) -> Any:
            return parse(_copies(messages), model_config, content_format, **options)

        call, rendering = current.get(), _rendered.get()
        if call is None or rendering is None or messages is not rendering.messages:
            return await parse(messages, model_config, content_format, **options)
        if model_config.is_multimodal_model:  # media have their places among all messages
            return await copied(messages)
        return await call.earlier.parse(messages, content_format, copied)

    hooked.hooked = True  # type: ignore[attr-defined]
    module.parse_chat_messages_async = hooked
    return True


def _template(params: Any) -> bytes:
    """What a template renders with besides messages, as a key: a hash, for tools can be long."""
    options = {k: v for k, v in params.chat_template_kwargs.items() if k not in _NOT_OF_HISTORY}
    key = params.chat_template, sorted(options.items(), key=lambda item: item[0])
    return hashlib.blake2b(repr(key).encode(errors="replace"), digest_size=16).digest()


_NOT_OF_HISTORY = ("add_generation_prompt", _GOES_ON, "tokenize")


def _plain(message: Any) -> Message:
    """A message as a dict whose lists can be read more than once, unlike pydantic's."""
    if hasattr(message, "model_dump"):
        message = message.model_dump(exclude_none=True)
    plain: Message = dict(message)
    for name in ("content", "tool_calls"):
        value = plain.get(name)
        if value is not None and not isinstance(value, str):
            plain[name] = [_as_dict(part) for part in value]
    return plain


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
                {**c, "function": dict(c["function"])}
                if isinstance(c.get("function"), Mapping)
                else dict(c)
                for c in copy["tool_calls"]
            ]
        copies.append(copy)
    return copies
