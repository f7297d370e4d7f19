"""Images in a conversation that goes on from known tokens."""

from collections.abc import Mapping, Sequence
from typing import Any

from rollout_server.engine.images import KnownIds
from rollout_server.http.responses import BadRequest
from rollout_server.http.tokens.splice import Known, Message, is_image

NOT_EXACT = (
    "the messages hold {kinds}, and their prompt can't go on from the tokens of an earlier answer: "
    "{why}. Send the conversation as a new one: without token ids, and not in this session"
)


def of_prompt(prompt: Mapping[str, Any]) -> dict[str, Any]:
    """The media of vLLM's prompt, and what goes with them."""
    return {name: value for name, value in prompt.items() if name.startswith(("multi_", "mm_"))}


def kinds(media: Mapping[str, Any]) -> list[str]:
    return sorted(media.get("multi_modal_data") or ())


def known_ids(
    messages: Sequence[Message], known: Known, ids: Sequence[int], media: Mapping[str, Any]
) -> KnownIds:
    """Spliced token ids, with how many images stand in the known ones of them."""
    each = [_images(message) for message in messages]
    rendered = len(media["multi_modal_data"]["image"])
    if sum(each) != rendered:
        why = f"there are {sum(each)} in it, and vLLM makes {rendered} of them"
        raise BadRequest(NOT_EXACT.format(kinds="image", why=why))
    there = len(known.prompt_ids) + len(known.ids)
    return KnownIds(ids, there, sum(each[: known.at + 1]))


def _images(message: Message) -> int:
    content = message.get("content")
    return sum(map(is_image, content)) if isinstance(content, list) else 0
