"""Token ids that a client sends along with its messages: those that an earlier answer gave it."""

import math
from collections.abc import Sequence
from typing import Any

from rollout_server.http.responses import BadRequest, shown
from rollout_server.http.tokens.splice import Known, Message

PROMPT, SAMPLED, LOGPROBS = "prompt_token_ids", "generation_token_ids", "generation_log_probs"
UNMASKED = "generation_log_probs_unmasked"
PREFIX = "required_prefix_token_ids"
_FIELDS = frozenset((PROMPT, SAMPLED, LOGPROBS, UNMASKED))  # of a message


def parse_client_tokens(request: dict[str, Any], vocabulary: int) -> Known | None:
    """What a request tells of its latest answer's tokens; None if nothing.

    request: the JSON body; vocabulary: number of token ids there are. Raises `BadRequest`.
    """
    messages = request.get("messages")
    messages = messages if isinstance(messages, list) else []
    found, last = None, None
    for at, message in enumerate(messages):
        if not isinstance(message, dict) or message.get("role") != "assistant":
            continue
        last = at
        if _FIELDS.isdisjoint(message):
            continue
        name = f"messages[{at}]."
        prompt, sampled = message.get(PROMPT), message.get(SAMPLED)
        require_ids(name + PROMPT, prompt, vocabulary)
        require_ids(name + SAMPLED, sampled, vocabulary)
        for field in (LOGPROBS, UNMASKED):
            _require_logprobs(name + field, message.get(field), sampled)
        if sampled is not None and prompt:
            found = Known(at, prompt, sampled)
    prefix = request.get(PREFIX)
    require_ids(PREFIX, prefix, vocabulary)
    if found is not None or not prefix:
        return found
    if last is None:
        raise BadRequest(f"{PREFIX}: messages hold no answer that it could end with; leave it out")
    return Known(last, (), prefix)


def require_ids(name: str, value: Any, vocabulary: int) -> None:
    """`BadRequest` unless `value` is None or a list of token ids."""
    if value is None:
        return
    if not isinstance(value, list):
        raise BadRequest(f"{name} is {shown(value)}; give a list of token ids")
    for at, i in enumerate(value):
        if type(i) is not int or not 0 <= i < vocabulary:
            raise BadRequest(
                f"{name}[{at}] is {shown(i)}; give a token id, a whole number from 0 to "
                f"{vocabulary - 1}"
            )


def _require_logprobs(name: str, logprobs: Any, ids: list[int] | None) -> None:
    if logprobs is None:
        return
    if not isinstance(logprobs, list):
        raise BadRequest(f"{name} is {shown(logprobs)}; give a list of numbers")
    for at, x in enumerate(logprobs):
        if type(x) not in (int, float) or not math.isfinite(x):
            raise BadRequest(f"{name}[{at}] is {shown(x)}; give a finite number")
    if ids is not None and len(ids) != len(logprobs):
        raise BadRequest(
            f"{name} has {len(logprobs)} entries, {SAMPLED} {len(ids)}; give one a token"
        )


def with_tokens(message: Message, prompt_ids: Sequence[int], sample: Any) -> Message:
    """An answer's message with the tokens that it is made of."""
    tokens = {PROMPT: list(prompt_ids), SAMPLED: sample.ids, LOGPROBS: sample.logprobs}
    if sample.unmasked is not None:
        tokens[UNMASKED] = sample.unmasked
    return message | tokens
