"""What `RolloutServer.generate` takes and gives."""

import itertools
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
    (rendered with the chat template, and the start of the assistant's turn added; those with
    images by the processor, each with all its tokens).
    """
    return [_ids(i, p, tokenizer) for i, p in enumerate(_several(prompts))]


def images_in(prompts: Prompt | Sequence[Prompt]) -> list[list[Any]]:
    """The images of each prompt, those of messages: parts `{"type": "image", "image": ...}`."""
    return [[part["image"] for part in _image_parts(prompt)] for prompt in _several(prompts)]


def _image_parts(prompt: Prompt) -> list[dict[str, Any]]:
    contents = [m.get("content") for m in prompt if isinstance(m, dict)]
    parts = itertools.chain.from_iterable(c for c in contents if isinstance(c, list))
    return [p for p in parts if isinstance(p, dict) and p.get("type") == "image"]


def _several(prompts: Prompt | Sequence[Prompt]) -> Sequence[Prompt]:
    one = isinstance(prompts, str) or (len(prompts) > 0 and isinstance(prompts[0], (int, dict)))
    return cast(Sequence[Prompt], [prompts] if one else prompts)


def text_tokenizer(tokenizer: Any) -> Any:
    """The tokenizer of text, which a processor holds."""
    return getattr(tokenizer, "tokenizer", tokenizer)


def _ids(index: int, prompt: Prompt, tokenizer: Any) -> list[int]:
    processor, tokenizer = tokenizer, text_tokenizer(tokenizer)
    if isinstance(prompt, str):
        ids = list(tokenizer(prompt)["input_ids"])
    elif len(prompt) and all(isinstance(m, dict) for m in prompt):
        if seen := _image_parts(prompt):
            _require_images(index, seen, processor)
        if seen or not getattr(tokenizer, "chat_template", None):
            tokenizer = processor
        ids = tokenizer.apply_chat_template(
            list(prompt), add_generation_prompt=True, tokenize=True, return_dict=True
        )["input_ids"]
        if isinstance(ids[0], list):  # a processor's are of a batch
            (ids,) = ids
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


def _require_images(index: int, parts: Sequence[dict[str, Any]], processor: Any) -> None:
    if not hasattr(processor, "image_processor"):
        raise SamplingError(
            f"prompts[{index}] holds images, which a {type(processor).__name__} has no processor "
            "for; attach the model with its processor"
        )
    require_decoded(f"prompts[{index}]", [part.get("image") for part in parts])


def require_decoded(name: str, images: Sequence[Any]) -> None:
    """`SamplingError` unless the images of a prompt are PIL's: nothing is fetched or opened."""
    for image in images:
        if not (hasattr(image, "convert") and hasattr(image, "size")):
            raise SamplingError(
                f"{name} holds the image {str(image)[:80]!r} ({type(image).__name__}); give images "
                "that are decoded, as PIL has them"
            )
