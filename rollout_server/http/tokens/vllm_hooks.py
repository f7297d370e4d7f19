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
from typing import Any

from rollout_server import vllm_compat as compat
from rollout_server.http.responses import BadRequest
from rollout_server.http.tokens.calls import Call, Start, current
from rollout_server.http.tokens.reasoning import Openings, tap_parsers
from rollout_server.http.tokens.splice import Message, Splicer
from rollout_server.http.tokens.texts import Texts

log = logging.getLogger("rollout_server")
_NOT_TAKEN_APART = (
    "a turn was rendered afresh, so its prompt doesn't hold the tokens that were sampled before, "
    "and it is a branch of its own. This is said once"
)


def tap(client: Any, state: Any, texts: Texts) -> None:
    """Have an `AsyncLLM` tell the `current` call what it renders and samples.

    state: of vLLM's app; texts: of the policy's tokenizer.
    """
    if (chat := state.openai_serving_chat) is not None:
        _tap_chat(chat)
    _tap_generate(client)
    if (processor := getattr(client, "output_processor", None)) is not None:
        _tap_logprobs(processor)
    openings = Openings(texts) if tap_parsers(state) else None
    _tap_render(client.renderer, Splicer(texts, _ends(client.model_config)), openings)


def _ends(model_config: Any) -> list[int]:
    """Ids of the tokens at which vLLM ends an answer."""
    ends = (model_config.try_get_generation_config() or {}).get("eos_token_id")
    return [ends] if isinstance(ends, int) else list(ends or ())


def _tap_chat(chat: Any) -> None:
    create = chat.create_chat_completion

    async def tapped(request, *others, **options):
        call = current.get()
        if call is not None:
            request.messages = [*call.earlier.messages, *request.messages]
        return await create(request, *others, **options)

    chat.create_chat_completion = tapped


def _tap_generate(client: Any) -> None:
    generate = client.generate

    def tapped(prompt, sampling_params, request_id, **options):
        call = current.get()
        if call is not None and call.must_see and not call.seen:
            # Said before an answer begins, which an error can't take back.
            raise BadRequest(_unseen(client.model_config))
        if call is None:
            return generate(prompt, sampling_params, request_id, **options)
        if call.with_logprobs and sampling_params.logprobs is None:
            sampling_params.logprobs = 0
            call.unshown = sampling_params.prompt_logprobs is None
        _tell_reasoning(call, prompt, sampling_params, options)
        start = Start(generate, client.model_config.max_model_len, request_id, options)
        return call.sampled(start, prompt, sampling_params)

    client.generate = tapped


def _tap_logprobs(processor: Any) -> None:
    """vLLM makes a text of each token that has a log-probability, which costs more than all else
    that it does for it. Where the client hasn't asked for them, nobody reads it."""
    add = processor.add_request

    def tapped(request, *others, **options):
        add(request, *others, **options)
        call = current.get()
        if call is not None and call.unshown:
            processor.request_states[request.request_id].logprobs_processor.tokenizer = None

    processor.add_request = tapped


def _unseen(model_config: Any) -> str:
    kind = getattr(model_config.hf_config, "model_type", "this model")
    return (
        f"vLLM renders conversations of {kind} in a way of its own, in which tokens of earlier "
        "answers have no place: sessions, and token ids in messages, can't be exact. Use "
        "/v1/completions or /generate with token ids, or this route with neither"
    )


def _tell_reasoning(call: Call, prompt: Any, params: Any, options: dict[str, Any]) -> None:
    """Whether a grammar holds from the first token on. Where vLLM doesn't say, the engine would
    look for it in the whole prompt."""
    if call.parser is None or params.structured_outputs is None or call.opening is None:
        return
    if options.get("reasoning_ended") is None:
        options["reasoning_ended"] = call.parser.is_reasoning_end(prompt["prompt_token_ids"])


def _tap_render(renderer: Any, splicer: Splicer, openings: Openings | None) -> None:
    render, parse_is_tapped = renderer.render_messages_async, _tap_parse(renderer)

    told = False

    async def tapped(messages, params):
        nonlocal told
        call = current.get()
        if call is None:
            return await render(messages, params)

        async def rendered(messages, params):
            call.rendered = messages if parse_is_tapped else _copies(messages)
            return await render(call.rendered, params)

        call.seen, known_before = True, call.earlier.messages
        call.messages = [*known_before, *map(_plain, messages[len(known_before) :])]
        call.template = _template(params)
        options = params.chat_template_kwargs
        known = call.known(call.messages, call.template)
        conversation = None

        async def text(messages, generation):
            nonlocal conversation
            chosen = options | {"tokenize": False, "continue_final_message": False}
            if not generation:
                chosen["add_generation_prompt"] = False
            try:
                conversation, prompt = await rendered(
                    messages, dataclasses.replace(params, chat_template_kwargs=chosen)
                )
            except compat.request_errors():
                return None
            return prompt.get("prompt") if "multi_modal_data" not in prompt else None

        goes_on = options.get("continue_final_message")
        if openings is not None and not goes_on:
            call.opening = await openings.after(call.messages, text, call.template)
        if known is None or goes_on:
            return await rendered(call.messages, params)
        if not call.carried or await splicer.goes_on(call.messages, known, text, call.template):
            ids = await splicer.splice(call.messages, known, text, call.template)
            if ids is not None:
                return conversation, {"prompt_token_ids": ids}
            if not told:
                told = True
                log.warning("the chat template can't be taken apart: %s", _NOT_TAKEN_APART)
        return await rendered(call.messages, params)

    renderer.render_messages_async = tapped


def _tap_parse(renderer: Any) -> bool:
    """What vLLM's usual renderer makes of messages for their template is kept for the next turn.
    Other renderers' it can't be kept of: False."""
    module = sys.modules[type(renderer).__module__]
    parse = getattr(module, "parse_chat_messages_async", None)
    if module.__name__ != "vllm.renderers.hf" or parse is None:
        return False
    if hasattr(parse, "tapped"):  # for an engine before this one
        return True

    @functools.wraps(parse)
    async def tapped(messages, model_config, content_format, **options):
        def copied(messages):
            return parse(_copies(messages), model_config, content_format, **options)

        call = current.get()
        if call is None or messages is not call.rendered:
            return await parse(messages, model_config, content_format, **options)
        if model_config.is_multimodal_model:  # media have their places among all messages
            return await copied(messages)
        return await call.earlier.parse(messages, content_format, copied)

    tapped.tapped = True
    module.parse_chat_messages_async = tapped
    return True


def _template(params: Any) -> bytes:
    """What a template renders with besides messages, as a key: a hash, for tools can be long."""
    options = {k: v for k, v in params.chat_template_kwargs.items() if k not in _NOT_OF_HISTORY}
    key = params.chat_template, sorted(options.items(), key=lambda item: item[0])
    return hashlib.blake2b(repr(key).encode(errors="replace"), digest_size=16).digest()


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
