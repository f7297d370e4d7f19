"""What a request may not ask for: what would make the server fetch, read or run something that the
request names, what vLLM would drop without a word, and sizes that one request could stop it with.

Each refusal is a `BadRequest` that names the field, the value and the remedy. What vLLM itself
refuses by name (a model that isn't served, tokens out of the vocabulary, ...) is left to it.
"""

import json
import math
import re
from collections.abc import Iterable, Mapping
from typing import Any

from rollout_server.http.images import Images
from rollout_server.http.responses import BadRequest, shown

SAMPLES = 1024  # answers to one request: prompts times n
TEXT = 1 << 20  # characters to tokenise, tokens to turn into text
GRAMMAR = 32 << 10  # characters of a grammar or a schema
CHOICES = 1024  # alternatives, in a list of them
PATTERN = 2048  # characters of a regular expression
REPEATS = 1 << 16  # how often a pattern may repeat something, its repeats multiplied
TOOLS = 1 << 20  # characters of all tools, descriptions included
COUNT = 1 << 16  # of items, or characters, that a schema may ask for
STOPS, STOP = 64, 1024  # stop strings or words, characters of one
IDS = 1024  # token ids that stop, or are biased
NAME = 256  # characters of an id that a client makes up

_OWN = "the policy's own is used; leave it out"
_INSIDE = "it is between engines, not for a request; leave it out"
_GONE = "it isn't known here; use structured_outputs or response_format"
_REFUSED = {
    "chat_template": _OWN,
    "mm_processor_kwargs": _OWN,
    "media_io_kwargs": _OWN,
    "kv_transfer_params": _INSIDE,
    "ec_transfer_params": _INSIDE,
    "vllm_xargs": _INSIDE,
    "extra_args": _INSIDE,
    "previous_input_messages": "it is of gpt-oss alone, and dropped for others; give them as input",
    "priority": "all requests have the same; leave it out",
    "prompt_embeds": "give token ids or text as prompt",
    "return_assistant_tokens_mask": "answers and records tell what was sampled; leave it out",
    "logits_processors": "none can be named; leave it out",
    "custom_logit_processor": "none can be named; leave it out",
    "lora_request": "the policy alone is served; leave it out",
    "lora_path": "the policy alone is served; leave it out",
    "use_beam_search": "answers are sampled; leave it out",
    "guided_json": _GONE,
    "guided_regex": _GONE,
    "guided_choice": _GONE,
    "guided_grammar": _GONE,
    "guided_decoding_backend": "the server's own is used; leave it out",
}
# What a chat template gets besides its variables; vLLM would hand these on to the tokenizer.
_OF_TOKENIZER = frozenset(
    (
        "chat_template",
        "conversation",
        "messages",
        "tools",
        "documents",
        "tokenize",
        "padding",
        "truncation",
        "max_length",
        "return_tensors",
        "return_dict",
        "return_assistant_tokens_mask",
        "tokenizer_kwargs",
        "processor_kwargs",
        "template",
        "tokenizer",
        "model_config",
        "model",
    )
)
_MEDIA = ("image_url", "audio_url", "video_url", "file_url", "file", "image", "audio", "video")
_TENSORS = ("image_embeds", "audio_embeds", "video_embeds", "image_pil")
_TELLING = frozenset((*_MEDIA, *_TENSORS, "source", "uuid"))
_COUNTS = re.compile(r"(min|max)(Length|Items|Properties|Contains)")
_REPEAT = re.compile(r"\{(\d*)(?:,(\d*))?\}")
_HEADERS = {b"x-data-parallel-rank": _INSIDE, b"content-encoding": "send the body as it is"}


def refuse_headers(headers: Iterable[tuple[bytes, bytes]]) -> None:
    """Refuse what a header asks for."""
    for name, value in headers:
        if name in _HEADERS and value.lower() != b"identity":
            raise BadRequest(f"header {name.decode()}: {_HEADERS[name]}")


def refuse_content(path: str, request: Any) -> None:
    """Refuse what a body asks for; what isn't an object is left to the route."""
    if not isinstance(request, dict):
        return
    if not _REFUSED.keys().isdisjoint(request):
        for name, remedy in _REFUSED.items():
            if request.get(name):
                raise BadRequest(f"{name} is {shown(request[name])}; {remedy}")
    if request.get("best_of") not in (None, request.get("n"), 1):
        raise BadRequest(f"best_of is {shown(request['best_of'])}; give n alone")
    _require_sane_template(request.get("chat_template_kwargs"))
    _require_no_media(request)
    _require_few_samples(request)
    _require_short(path, request)
    _require_small_constraints(request)


def _require_sane_template(given: Any) -> None:
    if given is None:
        return
    if not isinstance(given, dict):
        raise BadRequest(f"chat_template_kwargs is {shown(given)}; give an object")
    for name in given:
        if name in _OF_TOKENIZER or name.startswith("_"):
            raise BadRequest(
                f"chat_template_kwargs.{name[:NAME]} isn't the template's; leave it out"
            )


# -- media ------------------------------------------------------------------------------------


def _require_no_media(request: Mapping[str, Any]) -> None:
    """Media come in the request or not at all: nothing is fetched, and no tensor unpickled."""
    images = Images()
    for name in ("messages", "input", "system"):
        _require_own_parts(name, request.get(name), images)
    for at, tool in enumerate(_list(request.get("tools"))):
        if isinstance(tool, dict) and tool.get("type") == "mcp":
            raise BadRequest(f"tools[{at}].type is 'mcp'; this server calls nobody: give functions")


def _require_own_parts(where: str, parts: Any, images: Images) -> None:
    for at, part in enumerate(_list(parts)):
        if not isinstance(part, dict):
            continue
        told = _TELLING.intersection(part)  # answers that clients send back have many nulls
        if part.get("type") in _TENSORS or any(part[name] is not None for name in told):
            _require_own_part(f"{where}[{at}]", part, images)
        for inner in ("content", "output"):
            if isinstance(part.get(inner), list):
                _require_own_parts(f"{where}[{at}].{inner}", part[inner], images)


def _require_own_part(name: str, part: Mapping[str, Any], images: Images) -> None:
    for kind in _TENSORS:
        if part.get(kind) is not None or part.get("type") == kind:
            raise BadRequest(f"{name}.{kind}: tensors aren't taken; give the data itself")
    if part.get("uuid") is not None:
        raise BadRequest(
            f"{name}.uuid is {shown(part['uuid'])}; media are told apart by what they hold: leave "
            "it out"
        )
    for kind in _MEDIA:
        _require_own(f"{name}.{kind}", part.get(kind), images if "image" in kind else None)
    source = part.get("source")
    if isinstance(source, dict) and source.get("type") in ("url", "file"):
        raise BadRequest(f"{name}.source.type is {source['type']!r}; give base64 data")
    encoded = source.get("data") if isinstance(source, dict) else None
    if isinstance(encoded, str) and part.get("type") != "document":
        images.add(f"{name}.source.data", encoded)


def _require_own(name: str, medium: Any, images: Images | None) -> None:
    """A string, or an object with a url: no other address than the data themselves."""
    if isinstance(medium, dict):
        for inner in ("url", "file_url", "path"):
            _require_own(f"{name}.{inner}", medium.get(inner), images)
    elif isinstance(medium, str) and medium.lstrip()[:5].lower() != "data:":
        raise BadRequest(f"{name} is {shown(medium)}; nothing is fetched: give a data: URL")
    elif isinstance(medium, str) and images is not None:
        images.add_url(name, medium)


# -- sizes ------------------------------------------------------------------------------------


def _require_few_samples(request: Mapping[str, Any]) -> None:
    n, prompts = request.get("n"), 1
    for name in ("prompt", "input_ids", "text"):
        given = request.get(name)
        if isinstance(given, list) and given and isinstance(given[0], (str, list)):
            prompts = len(given)
    if (type(n) is int and n * prompts > SAMPLES) or prompts > SAMPLES:
        asked = f"n={shown(n)} for {prompts} prompt{'s' * (prompts > 1)}"
        raise BadRequest(f"{asked}: ask for at most {SAMPLES} answers at a time")


def _require_short(path: str, request: Mapping[str, Any]) -> None:
    if path in ("/tokenize", "/detokenize", "/v1/messages/count_tokens"):
        for name in ("prompt", "tokens", "messages", "system", "tools"):
            if (size := _size(request.get(name), TEXT)) > TEXT:
                raise BadRequest(f"{name} has {size} characters or more; give at most {TEXT}")
    for name in ("request_id", "rid", "session_id", "user"):
        if isinstance(given := request.get(name), str) and len(given) > NAME:
            raise BadRequest(f"{name} has {len(given)} characters; give at most {NAME}")
    if _LIMITED.isdisjoint(request):
        return
    fields = request.get("sampling_params")  # of SGLang's /generate; parameters: of TGI's
    given = [fields, *_list(fields), request.get("parameters")]
    for one in (request, *(f for f in given if isinstance(f, dict))):
        _require_few(one)


_NESTED = "sampling_params", "parameters"
_WORDS = "stop", "stop_sequences", "bad_words"
_BY_TOKEN = "stop_token_ids", "logit_bias", "logprob_token_ids", "token_ids_logprob"
# Where there is none of them there is nothing to be looked at: so of most requests.
_LIMITED = frozenset((*_NESTED, *_WORDS, *_BY_TOKEN))
_CONSTRAINING = frozenset(
    ("structured_outputs", "response_format", "text", "output_config", "tools", "sampling_params")
)


def _require_few(fields: Mapping[str, Any]) -> None:
    for name in _WORDS:
        words = fields.get(name)
        words = [words] if isinstance(words, str) else _list(words)
        if (len(words) > STOPS and name != "bad_words") or len(words) > 2 * STOPS:
            raise BadRequest(f"{name} has {len(words)} entries; give at most {STOPS}")
        if any(isinstance(word, str) and len(word) > STOP for word in words):
            raise BadRequest(f"{name} holds a string of more than {STOP} characters; shorten it")
    for name in _BY_TOKEN:
        given = fields.get(name)
        if isinstance(given, (list, dict)) and len(given) > IDS:
            raise BadRequest(f"{name} has {len(given)} entries; give at most {IDS}")
    bias = fields.get("logit_bias")
    for token, value in bias.items() if isinstance(bias, dict) else ():
        if isinstance(value, float) and not math.isfinite(value):
            raise BadRequest(f"logit_bias[{token[:NAME]!r}] is {value}; give a finite number")


def _require_small_constraints(request: Mapping[str, Any]) -> None:
    """Grammars are compiled before anything is sampled, and some sizes take minutes."""
    if _CONSTRAINING.isdisjoint(request):
        return
    text, output = request.get("text"), request.get("output_config")
    fields = request.get("sampling_params")
    constraints = {
        "structured_outputs": request.get("structured_outputs"),
        "response_format": request.get("response_format"),
        "text.format": text.get("format") if isinstance(text, dict) else None,
        "output_config.format": output.get("format") if isinstance(output, dict) else None,
        "tools": request.get("tools"),
    }
    for one in (f for f in [fields, *_list(fields)] if isinstance(f, dict)):
        for name in ("structured_outputs", "json_schema", "regex", "ebnf", "structural_tag"):
            constraints[f"sampling_params.{name}"] = {name: one.get(name)}
    for name, constraint in constraints.items():
        if constraint is None:
            continue
        most = TOOLS if name == "tools" else GRAMMAR
        if (size := _size(constraint, most)) > most:
            raise BadRequest(f"{name} has {size} characters or more; give at most {most}")
        if name != "tools" or _forces(request):
            _require_compilable(name, constraint)
    so = request.get("structured_outputs")
    if so is not None:
        _require_object("structured_outputs", so)
        for name in ("json", "structural_tag"):
            if isinstance(so.get(name), str):
                _require_schema(f"structured_outputs.{name}", so[name])


def _forces(request: Mapping[str, Any]) -> bool:
    """Whether the schemas of the tools become a grammar; agents' tools are large, and mostly only
    described to the model."""
    choice = request.get("tool_choice")
    choice = choice.get("type") if isinstance(choice, dict) else choice
    return choice not in (None, "auto", "none") or _any_strict(request["tools"])


def _any_strict(tools: Any) -> bool:
    """Whether one of them asks for a grammar of its own, wherever a dialect has that."""
    waiting = [tools]
    while waiting:
        one = waiting.pop()
        if isinstance(one, dict):
            if one.get("strict") is True:
                return True
            waiting += one.values()
        elif isinstance(one, list):
            waiting += one
    return False


def _require_object(name: str, value: Any) -> None:
    if not isinstance(value, dict):
        raise BadRequest(f"{name} is {shown(value)}; give an object")


def _require_schema(name: str, text: str) -> None:
    """A schema that comes as text in text."""
    try:
        schema = json.loads(text)
    except (ValueError, RecursionError):
        return  # vLLM says so
    _require_compilable(name, schema)


def _require_compilable(name: str, value: Any) -> None:
    waiting = [(name, value)]
    while waiting:
        name, value = waiting.pop()
        for key, inner in value.items() if isinstance(value, dict) else enumerate(_list(value)):
            where = f"{name}.{key}" if isinstance(key, str) else f"{name}[{key}]"
            if isinstance(key, str):
                _require_few_states(where, key, inner)
            if isinstance(inner, (dict, list)):
                waiting.append((where, inner))


def _require_few_states(where: str, key: str, value: Any) -> None:
    if key in ("pattern", "regex", "whitespace_pattern") and isinstance(value, str):
        _require_pattern(where, value)
    lists = ("enum", "choice", "anyOf", "oneOf", "allOf")
    if key in lists and isinstance(value, list) and len(value) > CHOICES:
        raise BadRequest(f"{where} has {len(value)} entries; give at most {CHOICES}")
    if _COUNTS.fullmatch(key) and isinstance(value, (int, float)) and value > COUNT:
        raise BadRequest(f"{where} is {shown(value)}; give at most {COUNT}")


def _require_pattern(name: str, pattern: str) -> None:
    if len(pattern) > PATTERN:
        raise BadRequest(f"{name} has {len(pattern)} characters; give at most {PATTERN}")
    repeats = 1
    for low, high in _REPEAT.findall(pattern):
        count = high or low
        repeats *= max(int(count[:12] or 1), 1)
        if repeats > REPEATS:
            raise BadRequest(f"{name} repeats something more than {REPEATS} times; give less")


def _size(value: Any, enough: int) -> int:
    """Characters of all strings and names in a value, and one for each other thing; counted no
    further than past `enough`."""
    size, waiting = 0, [value]
    while waiting and size <= enough:
        one = waiting.pop()
        if isinstance(one, str):
            size += len(one)
        elif isinstance(one, dict):
            size += sum(map(len, one))
            waiting += one.values()
        elif isinstance(one, list):
            if one and type(one[0]) is int:
                size += len(one)
            else:
                waiting += one
        elif one is not None:
            size += 1
    return size


def _list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []
