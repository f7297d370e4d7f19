"""Prompts in which earlier answers stand as they were sampled.

A template renders a conversation as text, and tokenising that text again gives other tokens than
those that the model sampled: merges differ, tool calls are printed anew, reasoning is left out. So
of the latest answer whose tokens are known, and of all before it, the tokens are taken; the
template says only what comes after that answer. Its text is told from the rest by a marker that
stands in for the answer:

    rendered with the marker: ...<|im_start|>assistant\\n MARK <|im_end|>\\n<|im_start|>user\\n...
    the prompt:               [known tokens ...........]      [tokens of this ..............]

The answer may have ended with the end-of-turn token or been cut off before it; what of the ending
was sampled isn't said twice. Where the conversation isn't one that goes on from the known tokens,
or the template can't be taken apart, there is no splice.
"""

import itertools
import json
import secrets
import unicodedata
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from rollout_server.http.tokens.texts import Texts

Message = dict[str, Any]
# Renders messages as text, with or without the start of the next answer; None: can't be rendered.
Render = Callable[[Sequence[Message], bool], Awaitable[str | None]]

_MARK = f"answer{secrets.token_hex(8)}"
_CALL = {"value": _MARK}
_FRAMES = 64  # of templates; tools are part of one


@dataclass(frozen=True)
class Known:
    """Tokens of a conversation up to the end of one answer.

    at: index of the answer in the messages; prompt_ids: what the model saw; ids: what it sampled.
    Where it isn't known which of them were sampled, all are `ids`.
    """

    at: int
    prompt_ids: Sequence[int]
    ids: Sequence[int]


class Splicer:
    """Splices prompts for one tokenizer."""

    def __init__(self, texts: Texts, ends: Iterable[int] = ()):
        """texts: the tokenizer's; ends: ids of the tokens that end an answer, besides its own."""
        self._texts = texts
        self._tokenizer = texts.tokenizer
        self._ends = {*ends, self._tokenizer.eos_token_id}
        added = getattr(self._tokenizer, "added_tokens_decoder", {})
        special = [i for i, token in added.items() if token.special]
        self._special = {*self._ends, *self._tokenizer.all_special_ids, *special}
        self._frames: OrderedDict[Any, _Frame] = OrderedDict()

    async def splice(
        self, messages: Sequence[Message], known: Known, render: Render, template: Any
    ) -> list[int] | None:
        """The prompt's token ids, the known ones first; None where they can't be told.

        template: names what `render` renders with; how it ends a turn is found out once.
        """
        frame = await self._frame(render, template)
        text = await render(_marked(messages, known.at), True)
        if text is None or text.count(_MARK) != 1:
            return None
        tail = frame.from_ending(text.partition(_MARK)[2], messages[known.at])
        if tail is None:
            return None
        if self._texts.too_long(tail):
            return None  # all of it is then, too
        new = await self._texts.encode(tail)
        return [*known.prompt_ids, *known.ids, *new[self._said(known.ids, new, frame.ended) :]]

    def _said(self, ids: Sequence[int], new: list[int], ended: Sequence[int]) -> int:
        """How many of the new tokens the sampled ones end with, or with others in their place.

        ended: those of the template's ending."""
        for count in range(min(max(len(ended), 1), len(ids)), 0, -1):
            if list(ids[-count:]) == new[:count]:
                return count
        if ended and ids and ids[-1] in self._ends:
            # It ended with another token than the template's, or without the white space before.
            for at, token in enumerate(new[: len(ended)]):
                if token in self._special and token in ended:
                    return at + 1
            return int(new[0] in self._special)
        return 0

    async def is_continuation(
        self, messages: Sequence[Message], known: Known, render: Render, template: Any
    ) -> bool:
        """Whether the messages up to `known.at` are what the known tokens say.

        For tokens that a client sends, which may have edited, dropped or compacted messages and
        left the tokens as they were. White space isn't compared, nor are answers before the last;
        in doubt (texts that look like the template's own, calls of tools) it says no.
        """
        frame = await self._frame(render, template)
        text, ending = await render(_all_marked(messages[: known.at]), True), frame.ending
        if text is None or not ending:
            return False
        seen = _plain(await self._texts.decode(known.prompt_ids or known.ids))
        first, *others = text.split(_MARK)
        answers = [m for m in messages[: known.at] if _is_answer(m)]
        marks = [2 if m.get("tool_calls") else 1 for m in answers]
        if len(others) != sum(marks) or not seen.startswith(_plain(first)):
            return False
        at, mark, parts = len(_plain(first)), _plain(ending), iter(others)
        for answer, count in zip(answers, marks, strict=True):
            *_, other = itertools.islice(parts, count)
            part = frame.from_ending(other, answer)
            at = seen.find(mark, at)
            if part is None or at < 0 or not seen.startswith(_plain(part), at):
                return False
            at += len(_plain(part))
        said = seen[at:]
        if known.prompt_ids:
            if said:
                return False
            said = _plain(await self._texts.decode(known.ids))
        return self._says(said, messages[known.at], ending)

    def _says(self, text: str, answer: Message, ending: str) -> bool:
        """Whether an answer's message is what its text says, reasoning and white space apart."""
        text = text.removesuffix(_plain(ending))
        thought = answer.get("reasoning") or answer.get("reasoning_content")
        if thought and "</think>" not in text:  # cut off in its reasoning
            text = text.removeprefix("<think>").removeprefix(_plain(thought))
        text = text.rpartition("</think>")[2]
        content, calls = _plain(text_of(answer.get("content"))), answer.get("tool_calls")
        content = content.rpartition("</think>")[2]
        for special in self._tokenizer.all_special_tokens:
            text = text.removesuffix(_plain(special))
        if not calls:
            return text == content
        names = [_plain(str(_function(call).get("name"))) for call in calls]
        return text.startswith(content) and all(name in text for name in names)

    async def _frame(self, render: Render, template: Any) -> "_Frame":
        frame = self._frames.pop(template, None)
        if frame is None:
            answer = {"role": "assistant", "content": "?"}
            call = {"id": "call00000", "type": "function", "function": {"name": "f"}}
            texts = []
            for message in (answer, answer | {"tool_calls": [call]}):
                text = await render([{"role": "user", "content": "?"}, _stand_in(message)], False)
                parts = [] if text is None else text.split(_MARK)
                texts.append(parts[1] if len(parts) == 2 else None)
            ending, after_call = texts
            ended = await self._texts.encode(ending) if ending else []
            frame = _Frame(ending, await self._closing(after_call, ending), tuple(ended))
        self._frames[template] = frame  # the latest
        while len(self._frames) > _FRAMES:
            self._frames.popitem(last=False)
        return frame

    async def _closing(self, after_call: str | None, ending: str | None) -> str | None:
        """Of what follows a call's arguments, that which isn't the end of the turn."""
        if after_call is None:
            return None
        if ending is not None and after_call.endswith(ending):
            return after_call[: len(after_call) - len(ending)]
        # A turn that ends in a call ends in another way.
        special = [i for i in await self._texts.encode(after_call) if i in self._special]
        end = self._tokenizer.convert_ids_to_tokens(special[-1]) if special else None
        return after_call[: after_call.rfind(end)] if end and end in after_call else None


@dataclass(frozen=True)
class _Frame:
    """What a template puts after an answer, such as "<|im_end|>\\n", and between the arguments of
    its last tool call and that; None where it can't be told. ended: the tokens of `ending`."""

    ending: str | None
    closing: str | None
    ended: Sequence[int] = ()

    def from_ending(self, tail: str, answer: Message) -> str | None:
        """What follows the marker, from the end of the turn on: a tool call is closed before."""
        if not answer.get("tool_calls"):
            return tail
        if self.closing is not None and tail.startswith(self.closing):
            return tail[len(self.closing) :]
        at = tail.find(self.ending) if self.ending else -1
        return None if at < 0 else tail[at:]


def is_image(part: Any) -> bool:
    """Whether a part of a message's content is an image, by its type or, without one, its names;
    vLLM ignores a text in it."""
    if not isinstance(part, dict):
        return False
    kind = part.get("type")
    return "image" in kind if isinstance(kind, str) else any("image" in name for name in part)


def text_of(content: Any) -> str:
    """A message's content as one string; parts that aren't text are named by their JSON."""
    if content is None:
        return ""
    if isinstance(content, str):
        return content
    return "".join(
        part
        if isinstance(part, str)
        else part["text"]
        if isinstance(part.get("text"), str) and not is_image(part)
        else json.dumps(part, sort_keys=True, default=str)
        for part in content
    )


def _is_answer(message: Message) -> bool:
    return message.get("role") == "assistant"


def _function(call: Any) -> dict[str, Any]:
    return call.get("function") or {}


def _marked(messages: Sequence[Message], at: int) -> list[Message]:
    """The messages with the marker in the place of answer `at`."""
    return [*messages[:at], _stand_in(messages[at]), *messages[at + 1 :]]


def _all_marked(messages: Sequence[Message]) -> list[Message]:
    """All answers marked, those with tool calls before and in the last one."""
    return [_stand_in(m, _MARK) if _is_answer(m) else m for m in messages]


def _stand_in(answer: Message, beside_calls: str = "") -> Message:
    calls = answer.get("tool_calls")
    if not calls:
        return {"role": "assistant", "content": _MARK}
    # Templates look at what calls precede a tool's result, so they stay.
    *others, last = calls
    marked = {**last, "function": {**_function(last), "arguments": json.dumps(_CALL)}}
    return {"role": "assistant", "content": beside_calls, "tool_calls": [*others, marked]}


def _plain(text: str) -> str:
    return "".join(unicodedata.normalize("NFKC", text).split())
