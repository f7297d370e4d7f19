"""What `RolloutServer.generate` takes and gives."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

from rollout_server.errors import SamplingError

Prompt = str | Sequence[int] | Sequence[dict[str, Any]]


@dataclass(frozen=True)
class Completion:
    """One sampled completion.

    Attributes:
        prompt_ids: token ids of the prompt.
        ids: token ids sampled, the end-of-sequence token included where one was sampled.
        text: `ids` decoded, without special tokens.
        logprobs: log-probability (nats) of each of `ids` under the distribution it was sampled
            from; same length as `ids`.
        finish_reason: "stop" or "length".
        policy_version: the newest version that sampled a token of it.
        versions: (version, start, end) of each run of tokens one version sampled.
    """

    prompt_ids: list[int]
    ids: list[int]
    text: str
    logprobs: list[float]
    finish_reason: str
    policy_version: int
    versions: list[tuple[int, int, int]]


def prompt_list(prompts: Prompt | Sequence[Prompt], tokenizer: Any) -> list[list[int]]:
    """Token ids of each prompt; `prompts` is one prompt or several.

    A prompt is a string (tokenised as it is, special tokens included), token ids, or messages
    (rendered with the chat template, and the start of the assistant's turn added).
    """
    one = isinstance(prompts, str) or (len(prompts) > 0 and isinstance(prompts[0], (int, dict)))
    several = cast(Sequence[Prompt], [prompts] if one else prompts)
    return [_ids(i, p, tokenizer) for i, p in enumerate(several)]


def text_tokenizer(tokenizer: Any) -> Any:
    """The tokenizer of text, which a processor holds."""
    return getattr(tokenizer, "tokenizer", tokenizer)


def _ids(index: int, prompt: Prompt, tokenizer: Any) -> list[int]:
    tokenizer = text_tokenizer(tokenizer)
    if isinstance(prompt, str):
        ids = list(tokenizer(prompt)["input_ids"])
    elif len(prompt) and all(isinstance(m, dict) for m in prompt):
        ids = tokenizer.apply_chat_template(
            list(prompt), add_generation_prompt=True, tokenize=True, return_dict=True
        )["input_ids"]
    else:
        ids = list(prompt)
        if not all(isinstance(i, int) for i in ids):
            raise SamplingError(
                f"prompts[{index}] is {str(prompt)[:80]!r}; give a string, a list of token ids, or "
                "a list of messages"
            )
    if not ids:
        raise SamplingError(f"prompts[{index}] is empty; give at least one token")
    return ids
