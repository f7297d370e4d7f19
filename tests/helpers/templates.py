"""Real tokenizers with real chat templates.

A case pairs a chat template with a real vocabulary that was given the template's own tokens.
"""

import importlib.util
import tempfile
from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from shutil import copyfile

from formats import Glm, Harmony, Hermes, Llama, Mistral, Opened, Plain, Thinking
from tokenizers import AddedToken
from transformers import (
    AutoTokenizer,
    GemmaTokenizer,
    LlamaTokenizer,
    PreTrainedTokenizerBase,
)
from transformers.integrations.mistral import convert_tekken_tokenizer

from smollm2 import model_folder


def _tool(name: str, **types: str) -> dict:
    properties = {key: {"type": kind} for key, kind in types.items()}
    schema = {"type": "object", "properties": properties, "required": list(types)}
    function = {"name": name, "description": f"Do a {name}.", "parameters": schema}
    return {"type": "function", "function": function}


TOOLS = [_tool("lookup", query="string", limit="integer"), _tool("run_code", source="string")]


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
