"""Real tokenizers with real chat templates, and conversations as policies and clients have them.

A case pairs a chat template with a real vocabulary that was given the template's own tokens. What a
policy samples is rarely what its text would be tokenised to, and what a template renders of an
answer is rarely what was sampled: `play` makes such conversations.
"""

import importlib.util
import itertools
import json
import re
import tempfile
import zlib
from collections.abc import Callable, Iterator
from copy import deepcopy
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from random import Random
from shutil import copyfile

from tokenizers import AddedToken, Tokenizer
from tokenizers.decoders import DecodeStream
from tokenizers.pre_tokenizers import Metaspace
from transformers import (
    AutoTokenizer,
    GemmaTokenizer,
    LlamaTokenizer,
    PreTrainedTokenizerBase,
)
from transformers.integrations.mistral import convert_tekken_tokenizer

from smollm2 import model_folder

Call = tuple[str, str]  # the name of a function and its arguments, as they were written
Answer = tuple[str | None, str, list[Call]]  # reasoning, content, calls


def _tool(name: str, **types: str) -> dict:
    properties = {key: {"type": kind} for key, kind in types.items()}
    schema = {"type": "object", "properties": properties, "required": list(types)}
    function = {"name": name, "description": f"Do a {name}.", "parameters": schema}
    return {"type": "function", "function": function}


TOOLS = [_tool("lookup", query="string", limit="integer"), _tool("run_code", source="string")]

# Formats of answers. `write` gives text and, where the policy samples a special token, its name in
# a list of its own; `read` is what a server's parsers make of the text.


class Plain:
    """Text and nothing else."""

    def write(self, message: dict, loose: Callable[[str], str]) -> list[str | list[str]]:
        """loose: changes the white space of JSON in which no string has any."""
        return [message.get("content") or ""]

    def read(self, text: str) -> Answer:
        return None, text, []


class Hermes(Plain):
    """Calls as JSON in XML tags: Qwen's."""

    def write(self, message, loose):
        text = message.get("content") or ""
        for name, arguments in _calls(message):
            head = loose(f'{{"name": "{name}", "arguments": ')
            text += ("\n" if text else "") + f"<tool_call>\n{head}{arguments}}}\n</tool_call>"
        return [text]

    def read(self, text):
        blocks = re.findall("<tool_call>(.*?)</tool_call>", text, re.DOTALL)
        calls = [_call(block.strip(), "arguments") for block in blocks]
        if not calls or None in calls:
            return None, text, []
        return None, text[: text.index("<tool_call>")], calls


class Thinking(Hermes):
    """The same after a reasoning block."""

    def write(self, message, loose):
        return [
            f"<think>\n{message['reasoning_content']}\n</think>\n\n",
            *super().write(message, loose),
        ]

    def read(self, text):
        reasoning, end, rest = text.removeprefix("<think>").partition("</think>")
        return (reasoning, *super().read(rest)[1:]) if end else (reasoning, "", [])


class Opened(Plain):
    """A reasoning block that the prompt has opened: DeepSeek's."""

    def write(self, message, loose):
        return [f"{message['reasoning_content']}\n</think>\n\n{message.get('content') or ''}"]

    def read(self, text):
        reasoning, _, rest = text.partition("</think>")
        return reasoning, rest, []


class Llama(Plain):
    """A call is the whole answer."""

    def write(self, message, loose):
        for name, arguments in _calls(message):
            return [loose(f'{{"name": "{name}", "parameters": ') + arguments + "}"]
        return super().write(message, loose)

    def read(self, text):
        call = _call(text.strip(), "parameters")
        return (None, "", [call]) if call else (None, text, [])


class Mistral(Plain):
    """Calls as a list behind a special token; `space` comes before everything."""

    def __init__(self, space: str):
        self.space = space

    def write(self, message, loose):
        calls = [
            loose(f'{{"name": "{name}", "arguments": ') + arguments + "}"
            for name, arguments in _calls(message)
        ]
        if calls:
            return [["[TOOL_CALLS]"], f"{self.space}[{', '.join(calls)}]"]
        return [self.space + (message.get("content") or "")]

    def read(self, text):
        content, begun, rest = text.partition("[TOOL_CALLS]")
        try:
            ends = [0, *_ends(rest.strip())] if begun else []
        except ValueError:
            ends = []
        parts = [rest.strip()[a:b].strip("[], \n") for a, b in itertools.pairwise(ends)]
        calls = [_call(part, "arguments") for part in parts]
        if not calls or None in calls:
            return None, text, []
        return None, content, calls


class Glm(Plain):
    """A reasoning block in one line, calls all in XML tags."""

    strings = ("query", "source")

    def write(self, message, loose):
        reasoning, content = message["reasoning_content"], message.get("content")
        text = f"\n<think>{reasoning}</think>" + (f"\n{content}" if content else "")
        for name, arguments in _calls(message):
            text += f"\n<tool_call>{name}\n"
            for key, value in json.loads(arguments).items():
                if not isinstance(value, str):
                    value = json.dumps(value, ensure_ascii=False)
                text += f"<arg_key>{key}</arg_key>{loose(' ').replace(' ', chr(10))}"
                text += f"<arg_value>{value}</arg_value>\n"
            text += "</tool_call>"
        return [text]

    def read(self, text):
        reasoning, end, rest = text.partition("</think>")
        reasoning = reasoning.strip().removeprefix("<think>")
        if not end:
            return reasoning, "", []
        calls = []
        for name, body in re.findall("<tool_call>(.*?)\n(.*?)</tool_call>", rest, re.DOTALL):
            pairs = re.findall(
                r"<arg_key>(.*?)</arg_key>\s*<arg_value>(.*?)</arg_value>", body, re.DOTALL
            )
            try:
                values = {k: v if k in self.strings else json.loads(v) for k, v in pairs}
            except ValueError:
                return reasoning, rest, []
            calls.append((name, json.dumps(values, ensure_ascii=False)))
        return reasoning, rest.partition("<tool_call>")[0] if calls else rest, calls


class Harmony(Plain):
    """Channels: gpt-oss's."""

    def write(self, message, loose):
        parts = []
        if message.get("reasoning_content"):
            parts += [["<|channel|>"], "analysis", ["<|message|>"], message["reasoning_content"]]
            parts += [["<|end|>", "<|start|>"], "assistant"]
        for name, arguments in _calls(message):
            parts += [f" to=functions.{name}", ["<|channel|>"], "commentary json"]
            return [*parts, ["<|message|>"], arguments]
        parts += [["<|channel|>"], "final", ["<|message|>"]]
        return [*parts, message.get("content") or ""]

    def read(self, text):
        reasoning, content, calls = None, "", []
        for part in text.split("<|start|>assistant"):
            head, _, body = part.partition("<|message|>")
            body = body.removesuffix("<|end|>")
            to = re.match(r" to=functions\.(\w+)<\|channel\|>commentary", head)
            if to and isinstance(_parsed(body), dict):
                calls.append((to[1], body))
            elif "analysis" in head:
                reasoning = body
            else:
                content += body
        return reasoning, content, calls


def _calls(message: dict) -> list[Call]:
    functions = [call["function"] for call in message.get("tool_calls") or []]
    return [(function["name"], function["arguments"]) for function in functions]


def _parsed(text: str) -> object:
    try:
        return json.loads(text)
    except ValueError:
        return None


def _call(text: str, key: str) -> Call | None:
    """The call that is the JSON `text`, its arguments as they stand there under `key`."""
    call = _parsed(text)
    if not isinstance(call, dict) or not isinstance(call.get(key), dict):
        return None
    if not isinstance(call.get("name"), str):
        return None
    start = re.search(rf'"{key}"\s*:\s*', text).end()
    return call["name"], text[start : json.JSONDecoder().raw_decode(text, start)[1]]


def _ends(text: str) -> Iterator[int]:
    """Where the objects end in a JSON list of objects. Raises `ValueError` if it is none."""
    if not all(isinstance(item, dict) for item in json.loads(text)):
        raise ValueError("not a list of objects")
    at = text.find("{")
    while at != -1:
        end = json.JSONDecoder().raw_decode(text, at)[1]
        yield end
        at = text.find("{", end)


@dataclass(frozen=True, eq=False)
class Case:
    """A tokenizer with its chat template, and how a policy with these answers."""

    name: str
    tokenizer: PreTrainedTokenizerBase
    terminator: int  # the id with which the policy ends an answer
    format: Plain
    extra_stop_ids: tuple[int, ...] = ()  # others at which generation stops
    call_terminator: int | None = None  # the one after tool calls, where that differs
    reasons: bool = False  # every answer has reasoning, which may be empty
    strips_reasoning: bool = False  # the template leaves out the reasoning of earlier turns
    max_calls: int = 0  # in one answer
    content_with_calls: bool = True  # the template renders both
    takes_system: bool = True

    @property
    def renders_tools(self) -> bool:
        return self.max_calls > 0

    @property
    def tools(self) -> list[dict] | None:
        """The tools of every conversation."""
        return TOOLS if self.renders_tools else None

    @property
    def stop_ids(self) -> set[int]:
        """All ids at which generation stops."""
        return {self.terminator, self.end({"tool_calls": [None]}), *self.extra_stop_ids}

    def end(self, message: dict) -> int:
        """The id with which the policy ends `message`."""
        if message.get("tool_calls") and self.call_terminator is not None:
            return self.call_terminator
        return self.terminator


# Vocabularies. Each call gives a tokenizer of its own.


def _file(package: str, *parts: str) -> Path:
    """A data file of an installed package, which needn't be imported for it."""
    return Path(importlib.util.find_spec(package).submodule_search_locations[0]).joinpath(*parts)


def _template(name: str) -> str:
    """A model's own chat template."""
    return _file("trl", "chat_templates", f"{name}.jinja").read_text()


def _smollm2() -> PreTrainedTokenizerBase:
    """49,152 tokens of bytes."""
    return AutoTokenizer.from_pretrained(model_folder())


@cache
def _one_tekken() -> PreTrainedTokenizerBase:
    return convert_tekken_tokenizer(str(_file("mistral_common", "data", "tekken_240911.json")))


def _tekken() -> PreTrainedTokenizerBase:
    """Mistral's 131,072 tokens of bytes."""
    return deepcopy(_one_tekken())


def _pieces(kind: type, version: str) -> PreTrainedTokenizerBase:
    """Mistral's 32,000 pieces, with spaces in them and some bytes by themselves."""
    with tempfile.TemporaryDirectory() as folder:
        copyfile(_file("mistral_common", "data", version), Path(folder) / "tokenizer.model")
        return kind.from_pretrained(folder)


def _given(
    tokenizer: PreTrainedTokenizerBase,
    template: str,
    special: str = "",
    ordinary: str = "",
    **named: str,
) -> PreTrainedTokenizerBase:
    """`tokenizer` with a template and its tokens.

    special, ordinary: tokens to add, separated by blanks; decoding can skip the special ones only.
    named: eos_token and the like.
    """
    for tokens, is_special in ((special, True), (ordinary, False)):
        kept = [AddedToken(t, special=is_special, normalized=False) for t in tokens.split()]
        tokenizer.add_tokens(kept, special_tokens=is_special)
    tokenizer.add_special_tokens(named)
    tokenizer.chat_template = template
    return tokenizer


# Templates of Mistral's formats, of which TRL has none. In the older one, spaces come before
# answers and texts, and answers are trimmed.
_MISTRAL = """{{ bos_token }}\
{%- if tools %}[AVAILABLE_TOOLS]SPACE{{ tools | tojson }}[/AVAILABLE_TOOLS]{% endif -%}
{%- set ns = namespace(system="") -%}
{%- for message in messages -%}
{%- if message.role == "system" -%}
  {%- set ns.system = message.content + "\n\n" -%}
{%- elif message.role == "user" -%}
  {{- "[INST]SPACE" + ns.system + message.content + "[/INST]" -}}{%- set ns.system = "" -%}
{%- elif message.role == "tool" -%}
  {{- "[TOOL_RESULTS]SPACE" + {"content": message.content} | tojson + "[/TOOL_RESULTS]" -}}
{%- elif message.tool_calls -%}
  {{- "[TOOL_CALLS]SPACE[" -}}
  {%- for call in message.tool_calls -%}
    {{- '{"name": "' + call.function.name + '", "arguments": ' -}}
    {{- call.function.arguments | tojson + "}" + ("" if loop.last else ", ") -}}
  {%- endfor -%}
  {{- "]" + eos_token -}}
{%- else -%}
  {{- "SPACE" + CONTENT + eos_token -}}
{%- endif -%}
{%- endfor -%}
"""
_OLD_MISTRAL = _MISTRAL.replace("SPACE", " ").replace("CONTENT", "(message.content | trim)")
_NEW_MISTRAL = _MISTRAL.replace("SPACE", "").replace("CONTENT", "message.content")

# Here text follows the terminator before the next turn's first token, and a space that no policy
# writes comes before it.
_LLAMA2 = """\
{%- set ns = namespace(system="") -%}
{%- for message in messages -%}
{%- if message.role == "system" -%}
  {%- set ns.system = "<<SYS>>\n" + message.content + "\n<</SYS>>\n\n" -%}
{%- elif message.role == "user" -%}
  {{- bos_token + "[INST] " + ns.system + message.content.strip() + " [/INST]" -}}
  {%- set ns.system = "" -%}
{%- else -%}
  {{- " " + message.content.strip() + " " + eos_token + "\n" -}}
{%- endif -%}
{%- endfor -%}
"""

_CHATML_TOKENS = "<|im_start|> <|im_end|> <|endoftext|>"
_LLAMA3_TOKENS = (
    "<|begin_of_text|> <|end_of_text|> <|start_header_id|> <|end_header_id|> <|eom_id|> <|eot_id|>"
)
_GLM_TOKENS = "[gMASK] <sop> <|system|> <|user|> <|assistant|> <|observation|> <|endoftext|>"
_GLM_ORDINARY = (
    "<think> </think> <tool_call> </tool_call> <tool_response> </tool_response> "
    "<arg_key> </arg_key> <arg_value> </arg_value>"
)
_PHI_TOKENS = "<|system|> <|user|> <|assistant|> <|end|> <|endoftext|>"
_HARMONY_TOKENS = (
    "<|startoftext|> <|endoftext|> <|start|> <|end|> <|message|> <|channel|> <|return|> <|call|>"
)
_DEEPSEEK_TOKENS = "<｜begin▁of▁sentence｜> <｜end▁of▁sentence｜>"


_MADE: dict[str, Callable[[str], Case]] = {
    "smollm2": lambda name: _case(name, _smollm2(), Plain(), "<|im_end|>"),
    "qwen2.5": lambda name: _case(
        name,
        _given(
            _smollm2(),
            _template("qwen2_5"),
            special=_CHATML_TOKENS,
            ordinary="<tool_call> </tool_call>",
            pad_token="<|endoftext|>",
        ),
        Hermes(),
        "<|im_end|>",
        "<|endoftext|>",
        max_calls=2,
    ),
    "qwen3": lambda name: _case(
        name,
        _given(
            _smollm2(),
            _template("qwen3"),
            special=_CHATML_TOKENS,
            ordinary="<tool_call> </tool_call> <tool_response> </tool_response> <think> </think>",
            pad_token="<|endoftext|>",
        ),
        Thinking(),
        "<|im_end|>",
        "<|endoftext|>",
        reasons=True,
        strips_reasoning=True,
        max_calls=2,
    ),
    "llama3.2": lambda name: _case(
        name,
        _given(
            _smollm2(),
            # The date of one day: tests may run past midnight.
            '{%- set date_string = "26 Jul 2024" %}' + _template("llama3_2"),
            special=_LLAMA3_TOKENS,
            bos_token="<|begin_of_text|>",
            eos_token="<|end_of_text|>",
        ),
        Llama(),
        "<|eot_id|>",
        "<|end_of_text|> <|eom_id|>",
        max_calls=1,
        content_with_calls=False,
    ),
    "gemma": lambda name: _case(
        name,
        _given(
            _pieces(GemmaTokenizer, "tokenizer.model.v1"),
            _template("gemma"),
            special="<start_of_turn> <end_of_turn>",
        ),
        Plain(),
        "<end_of_turn>",
        "<eos>",
        takes_system=False,
    ),
    "llama2": lambda name: _case(
        name,
        _given(_pieces(LlamaTokenizer, "tokenizer.model.v1"), _LLAMA2),
        Mistral(" "),
        "</s>",
    ),
    "mistral": lambda name: _case(
        name,
        _given(_pieces(LlamaTokenizer, "mistral_instruct_tokenizer_240323.model.v3"), _OLD_MISTRAL),
        Mistral(" "),
        "</s>",
        max_calls=2,
        content_with_calls=False,
    ),
    "mistral-tekken": lambda name: _case(
        name,
        _given(_tekken(), _NEW_MISTRAL),
        Mistral(""),
        "</s>",
        max_calls=2,
        content_with_calls=False,
    ),
    # The tokens that end a turn of GLM's begin the next one: the template renders them there.
    "glm4moe": lambda name: _case(
        name,
        _given(
            _smollm2(),
            _template("glm4moe"),
            special=_GLM_TOKENS,
            ordinary=_GLM_ORDINARY,
            eos_token="<|endoftext|>",
        ),
        Glm(),
        "<|user|>",
        "<|endoftext|>",
        call_terminator="<|observation|>",
        reasons=True,
        strips_reasoning=True,
        max_calls=2,
    ),
    # A conversation rendered without a generation prompt ends with its eos_token, too.
    "phi3.5": lambda name: _case(
        name,
        _given(
            _pieces(LlamaTokenizer, "tokenizer.model.v1"),
            _template("phi3_5"),
            special=_PHI_TOKENS,
            eos_token="<|endoftext|>",
        ),
        Plain(),
        "<|end|>",
        "<|endoftext|>",
    ),
    # Its prompt opens the reasoning; earlier turns have no trace of that.
    "deepseek-v3": lambda name: _case(
        name,
        _given(
            _tekken(),
            _template("deepseekv3"),
            special=_DEEPSEEK_TOKENS,
            ordinary="<｜User｜> <｜Assistant｜> <think> </think>",
            bos_token="<｜begin▁of▁sentence｜>",
            eos_token="<｜end▁of▁sentence｜>",
        ),
        Opened(),
        "<｜end▁of▁sentence｜>",
        reasons=True,
        strips_reasoning=True,
    ),
    # It renders <|end|> for the <|return|> that the policy sampled.
    "gpt-oss": lambda name: _case(
        name,
        _given(
            _tekken(),
            _template("gptoss").replace('strftime_now("%Y-%m-%d")', '"2025-08-05"'),
            special=_HARMONY_TOKENS,
            bos_token="<|startoftext|>",
            eos_token="<|return|>",
        ),
        Harmony(),
        "<|return|>",
        "<|endoftext|>",
        call_terminator="<|call|>",
        reasons=True,
        strips_reasoning=True,
        max_calls=1,
        content_with_calls=False,
    ),
}

NAMES = list(_MADE)  # of the cases, for a test's parameters: to make them takes some seconds


@cache
def case(name: str) -> Case:
    """The case of that name, made once; tests share its tokenizer."""
    return _MADE[name](name)


def cases() -> list[Case]:
    """All of them."""
    return [case(name) for name in NAMES]


def _case(
    name: str,
    tokenizer: PreTrainedTokenizerBase,
    format: Plain,
    terminator: str,
    extra: str = "",
    call_terminator: str | None = None,
    **others: bool | int,
) -> Case:
    """Tokens are given by their text."""

    def ids(tokens: str) -> tuple[int, ...]:
        vocabulary = tokenizer.get_vocab()
        return tuple(vocabulary[token] for token in tokens.split())

    call_end = ids(call_terminator)[0] if call_terminator else None
    return Case(
        name, tokenizer, ids(terminator)[0], format, ids(extra), call_terminator=call_end, **others
    )


# What a server does.


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


# What a policy does.


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
            ids += _split(rng, case, part, _raw(case).encode(piece, add_special_tokens=False).ids)
    if rng.random() < 0.15 and ids:
        return ids[: rng.randint(1, len(ids))]
    return [*ids, case.end(message)]


@cache
def _raw(case: Case) -> Tokenizer:
    """Takes text for what it is: no special tokens in it, no space put before it."""
    raw = Tokenizer.from_str(case.tokenizer.backend_tokenizer.to_str())
    raw.encode_special_tokens = True
    if isinstance(raw.pre_tokenizer, Metaspace):
        raw.pre_tokenizer = Metaspace(prepend_scheme="never", split=False)
    return raw


@cache
def _vocabulary(case: Case) -> dict[str, int]:
    """Without the tokens that were added."""
    return _raw(case).get_vocab(with_added_tokens=False)


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
        token = _raw(case).id_to_token(number)
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


# Conversations.

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
