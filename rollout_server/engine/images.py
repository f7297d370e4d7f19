"""Prompts that hold images: the token ids as the model sees them, and the images themselves.

In a template's text an image is one mark, in whose place vLLM's processor puts as many tokens as
the model sees of it. Ids that a processor has made, the trainer's or vLLM's own in an earlier turn,
have all of these, and would get them once more: of known ids the images' places are looked up, and
nothing is put in.

    rendered:  user\\n <image> What is it?
    known:     user\\n <image><image><image><image> What is it?
"""

import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from rollout_server import vllm_compat as compat
from rollout_server.errors import NotAvailableError, SamplingError

IMAGES = 64  # in a prompt


class KnownIds(list[int]):
    """Token ids of a prompt with images, of which the first are as the model saw them.

    known: how many ids those are; images: how many images stand in them, with all their tokens.
    What follows is as a template renders it.
    """

    def __init__(self, ids: Sequence[int], known: int, images: int):
        super().__init__(ids)
        self.known = known
        self.images = images

    def kept_in(self, prompt_ids: Sequence[int]) -> bool:
        """Whether a prompt begins with the known ones, as they are."""
        return list(prompt_ids[: self.known]) == self[: self.known]


def hook_processor(renderer: Any) -> None:
    """Have a renderer's multimodal processor leave `KnownIds` as they are."""
    processor = renderer.mm_processor
    if processor is None:
        return
    apply = processor._apply_prompt_updates

    def hooked(ids: Any, updates: Mapping[str, Sequence[Any]]) -> Any:
        if isinstance(ids, KnownIds):
            return _placed(processor, apply, ids, updates)
        return apply(ids, updates)

    processor._apply_prompt_updates = hooked


def _placed(processor: Any, apply: Any, ids: KnownIds, updates: Mapping[str, Any]) -> Any:
    """vLLM's (ids, places of each modality), the first images looked up and the others put in."""
    known, rest, here = ids[: ids.known], ids[ids.known :], ids.images
    images = updates.get("image", [])
    found = list(processor._find_mm_placeholders(known, {"image": images[:here]}).get("image", ()))
    seen = Counter(token for place in found for token in _seen(place))
    # A model can sample such a token, which then looks like a part of an image.
    if len(found) != here or seen.total() != sum(token in seen for token in known):
        raise ValueError(
            f"the prompt's tokens must hold {here} images, each with all its tokens, and no such "
            "token besides; give the token ids that the processor made of the prompt"
        )
    others = [
        [processor._recompute_cached_prompt_update(update, at) for update in of_one]
        for at, of_one in enumerate(images[here:])
    ]
    if others:
        rest, placed = apply(rest, {"image": others})
        found += [
            replace(one, item_idx=one.item_idx + here, start_idx=one.start_idx + ids.known)
            for one in placed.get("image", ())
        ]
    return [*known, *rest], {"image": found}


def _seen(place: Any) -> list[int]:
    """Of an image's tokens those in whose place the model sees it; others stand around them."""
    if place.is_embed is None:
        return list(place.tokens)
    return [i for i, seen in zip(place.tokens, place.is_embed.tolist(), strict=True) if seen]


async def image_prompt(renderer: Any, ids: Sequence[int], images: Sequence[Any]) -> Any:
    """vLLM's prompt of token ids that hold `images`, with all their tokens."""
    if renderer.mm_processor is None:
        raise NotAvailableError(
            "the policy takes no images; give token ids, text or messages alone"
        )
    known = KnownIds(ids, len(ids), len(images))
    prompt = {"prompt_token_ids": known, "multi_modal_data": {"image": list(images)}}
    try:
        made = await renderer.process_for_engine_async(prompt, time.time())
    except compat.request_errors() as error:
        raise SamplingError(f"vLLM can't take the prompt's images: {error}") from error
    if not known.kept_in(made["prompt_token_ids"]):
        raise NotAvailableError(
            f"vLLM's {type(renderer.mm_processor).__name__} writes prompts with images in a way of "
            "its own: the engine would see other tokens than those that were given"
        )
    return made
