"""Formats of answers: how policies write them, and what a server's parsers make of the text.

`write` gives text and, where the policy samples a special token, its name in a list of its own.
"""

import itertools
import json
import re
from collections.abc import Callable, Iterator

Call = tuple[str, str]  # the name of a function and its arguments, as they were written
Answer = tuple[str | None, str, list[Call]]  # reasoning, content, calls


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
