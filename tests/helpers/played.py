"""Conversations as policies and clients have them, with the cases of templates.py.

What a policy samples is rarely what its text would be tokenised to, and what a template renders of
an answer is rarely what was sampled: `play` makes such conversations.
"""

import json
import re
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from random import Random

from templates import Case
from tokenizers import Tokenizer
from tokenizers.decoders import DecodeStream
from tokenizers.pre_tokenizers import Metaspace

# -- what a server does ------------------------------------------------------------------------


def render(case: Case, messages: list[dict], generate: bool = True) -> list[int]:
    """The ids of the messages, for the template and the tokenizer alone to say."""
    return case.tokenizer.apply_chat_template(
        [_for_template(message) for message in messages],
        tools=case.tools,
        add_generation_prompt=generate,
        return_dict=False,
    )


def rendered_text(case: Case, messages: list[dict], generate: bool = True) -> str:
    """The same before it is tokenised."""
    return case.tokenizer.apply_chat_template(
        [_for_template(message) for message in messages],
        tools=case.tools,
        add_generation_prompt=generate,
        tokenize=False,
    )


def _for_template(message: dict) -> dict:
    """Templates want the arguments of calls as objects, and a content."""
    message = {**message, "content": message.get("content") or ""}
    if message.get("tool_calls"):
        message["tool_calls"] = [
            {**call, "function": {**call["function"], "arguments": _object(call)}}
            for call in message["tool_calls"]
        ]
    return message


def _object(call: dict) -> object:
    return json.loads(call["function"]["arguments"])


def answer(case: Case, prompt: list[int], ids: list[int]) -> dict:
    """The message that a server gives for the sampled `ids`, as a client puts it into its history.

    Texts are verbatim, white space included; what there is none of is missing, but for a content
    of None.
    """
    ended = bool(ids) and ids[-1] in case.stop_ids
    text = _decoded(case, prompt, ids[:-1] if ended else ids)
    reasoning, content, calls = case.format.read(text)
    if not case.renders_tools and calls:
        content, calls = text, []
    message = {"role": "assistant", "content": content or (None if calls or reasoning else "")}
    if reasoning is not None:
        message["reasoning_content"] = reasoning
    if calls:
        seed = zlib.crc32(repr(ids).encode())
        message["tool_calls"] = [
            {
                "id": f"call_{seed:08x}{number}",
                "type": "function",
                "function": {"name": name, "arguments": arguments},
            }
            for number, (name, arguments) in enumerate(calls)
        ]
    return message


def _decoded(case: Case, prompt: list[int], ids: list[int]) -> str:
    """The text of `ids`, of which the last may be incomplete, as it reads after `prompt`."""
    backend = case.tokenizer.backend_tokenizer
    stream, text = DecodeStream(ids=prompt, skip_special_tokens=False), ""
    for number in ids:
        try:
            text += stream.step(backend, number) or ""
        except Exception as error:  # tokenizers has no class for it
            if "Invalid prefix" not in str(error):
                raise
            stream = DecodeStream(skip_special_tokens=False)
            text += stream.step(backend, number) or ""
    return text


# -- what a policy does ------------------------------------------------------------------------


def sample(rng: Random, case: Case, message: dict) -> list[int]:
    """Ids that a policy might sample to give `message`.

    Their text is right, but they are rarely those that the text would be tokenised to; white space
    around what it gives verbatim may be odd; the answer may have been cut at any token.
    """
    part = rng.choice([0, 0.1, 0.4])
    ids = []
    for piece in case.format.write(message, lambda text: _loose(rng, text)):
        if isinstance(piece, list):
            ids += case.tokenizer.convert_tokens_to_ids(piece)
        else:
            ids += _split(rng, case, part, raw(case).encode(piece, add_special_tokens=False).ids)
    if rng.random() < 0.15 and ids:
        return ids[: rng.randint(1, len(ids))]
    return [*ids, case.end(message)]


@cache
def raw(case: Case) -> Tokenizer:
    """Takes text for what it is: no special tokens in it, no space put before it."""
    raw = Tokenizer.from_str(case.tokenizer.backend_tokenizer.to_str())
    raw.encode_special_tokens = True
    if isinstance(raw.pre_tokenizer, Metaspace):
        raw.pre_tokenizer = Metaspace(prepend_scheme="never", split=False)
    return raw


@cache
def _vocabulary(case: Case) -> dict[str, int]:
    """Without the tokens that were added."""
    return raw(case).get_vocab(with_added_tokens=False)


def _split(rng: Random, case: Case, part: float, ids: list[int]) -> list[int]:
    """The same text in other ids: about this `part` of them cut in two, some again."""
    vocabulary = _vocabulary(case)
    added = case.tokenizer.added_tokens_decoder
    result, todo = [], ids[::-1]
    while todo:
        number = todo.pop()
        if number in added or rng.random() >= part:
            result.append(number)
            continue
        token = raw(case).id_to_token(number)
        at = rng.randint(1, max(1, len(token) - 1))
        halves = [vocabulary.get(token[:at]), vocabulary.get(token[at:])]
        single = [vocabulary.get(f"<0x{byte:02X}>") for byte in token.replace("▁", " ").encode()]
        if None not in halves and not set(halves) & set(added):
            todo += halves[::-1]
        elif len(token) == 1 and None not in single:
            result += single
        else:
            result.append(number)
    return result


def _loose(rng: Random, text: str) -> str:
    if rng.random() < 0.5:
        return text
    return re.sub(" ", lambda _: rng.choice(["", " ", " ", "  ", "\n", "\t"]), text)


# -- conversations -----------------------------------------------------------------------------

_SNIPPETS = [
    *("Skinny", " skip", "kin", "don't", " The", "ing", "A.I.", "user", "assistant", "a b  c"),
    *(
        "été",
        "e\u0301te\u0301",
        "naïve",
        "日本語",
        "Ünï",
        "ﷺ",
        "𝒳",
        "🏳️‍🌈",
        "👩‍🔬",
        "\u200b",
        "\u00a0",
    ),
    *(" ", "  ", "\n", "\n\n", "\t", "\r\n", " \n ", ".", "?!", "...", "“”", "\\n", '"', "'"),
    *("<|im_end|>", "<|eot_id|>", "</s>", "[INST]", "<end_of_turn>", "<think>", "</think>"),
    *("<tool_call>", "</tool_call>", "<|", "|>", "<0x0A>", "▁", "Ġ"),
    *('{"a" :  1 }', "[1,2 , 3]", '{"name": "x"}', "```py\nx = 1\n```", "0.1e-3", "1234567"),
]


def text(rng: Random, case: Case, longest: int = 8) -> str:
    """Anything that may be in a message; may be empty."""
    special = [t for t in case.tokenizer.all_special_tokens if "control" not in t][:12]
    words = [*_SNIPPETS, *special]
    return "".join(rng.choice(words) for _ in range(rng.randint(0, longest)))


def _arguments(rng: Random, case: Case, name: str) -> str:
    if name == "lookup":
        limit = rng.choice([1, 10, 1.0, 1e-7, True, None, [1, {"a": []}], {}])
        value = {"query": text(rng, case, 4), "limit": limit}
    else:
        value = {"source": text(rng, case)}
    return json.dumps(
        value,
        ensure_ascii=rng.random() < 0.5,
        indent=rng.choice([None, None, None, 2]),
        separators=rng.choice([None, (",", ":"), (" , ", " : ")]),
        sort_keys=rng.random() < 0.5,
    )


def conversation(rng: Random, case: Case) -> list[dict]:
    """Messages of a random conversation, those of the assistant as the policy means them.

    Where that means calls, their results follow; they have no `tool_call_id` yet.
    """
    steps = []
    if case.takes_system and rng.random() < 0.5:
        steps.append({"role": "system", "content": text(rng, case)})
    for _ in range(rng.randint(2, 4)):
        steps.append({"role": "user", "content": text(rng, case)})
        for _ in range(rng.randint(0, 2) if case.renders_tools else 0):
            names = rng.choices(["lookup", "run_code"], k=rng.randint(1, case.max_calls))
            functions = [{"name": n, "arguments": _arguments(rng, case, n)} for n in names]
            content = text(rng, case) if case.content_with_calls and rng.random() < 0.5 else ""
            steps.append(
                _meant(rng, case, content, [{"type": "function", "function": f} for f in functions])
            )
            steps += [{"role": "tool", "content": text(rng, case)} for _ in names]
        steps.append(_meant(rng, case, text(rng, case)))
    return steps


def _meant(rng: Random, case: Case, content: str, calls: list[dict] | None = None) -> dict:
    message = {"role": "assistant", "content": content}
    if case.reasons:
        message["reasoning_content"] = text(rng, case)
    if calls:
        message["tool_calls"] = calls
    return message


@dataclass(frozen=True)
class Turn:
    """One request of a client's, and its answer."""

    messages: list[dict]  # sent
    ids: list[int]  # sampled
    message: dict  # the answer


def play(
    rng: Random,
    case: Case,
    prompt: Callable[[Case, list[dict]], list[int]] = render,
) -> Iterator[Turn]:
    """A random conversation, turn by turn, in the history the answers as the server gave them.

    prompt: what the server makes of the messages. An answer that was to have calls and has none,
    because it was cut, is followed by the user's next message.
    """
    history: list[dict] = []
    steps = conversation(rng, case)
    while steps:
        step = steps.pop(0)
        if step["role"] != "assistant":
            history.append(step)
            continue
        ids = sample(rng, case, step)
        message = answer(case, prompt(case, history), ids)
        yield Turn(list(history), ids, message)
        history.append(message)
        results = []
        while steps and steps[0]["role"] == "tool":
            results.append(steps.pop(0))
        calls = message.get("tool_calls") or []
        for number, call in enumerate(calls):
            content = results[number]["content"] if number < len(results) else "unknown"
            history.append({"role": "tool", "tool_call_id": call["id"], "content": content})
        while not calls and steps and steps[0]["role"] != "user":
            steps.pop(0)
