"""A table of attacks: requests that a hostile client may send."""

import json

from support import MIB

MESSAGES = [{"role": "user", "content": "Hi"}]
CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
RESPONSES, ANTHROPIC = "/v1/responses", "/v1/messages"


def chat(**fields):
    return CHAT, {"model": "policy", "messages": MESSAGES, "max_tokens": 2} | fields


def completion(**fields):
    return COMPLETIONS, {"model": "policy", "prompt": [5], "max_tokens": 2} | fields


def response(**fields):
    return RESPONSES, {"model": "policy", "input": "Hi", "max_output_tokens": 2} | fields


def anthropic(**fields):
    return ANTHROPIC, {"model": "policy", "messages": MESSAGES, "max_tokens": 2} | fields


def generate(**sampling):
    return "/generate", {"input_ids": [5], "sampling_params": {"max_new_tokens": 2} | sampling}


def with_part(**part):
    return [{"role": "user", "content": [{"type": next(iter(part))} | part]}]


def schema(**fields):
    return {"type": "json_schema", "json_schema": {"name": "a", "schema": fields}}


_DEEP = {"type": "string"}
for _ in range(70):
    _DEEP = {"type": "object", "properties": {"a": _DEEP}}

REFUSED = {
    # templates and what renders them
    "template": (
        *chat(chat_template="{{ cycler.__init__.__globals__.os.popen('id') }}"),
        "chat_template",
    ),
    "template of /tokenize": (
        "/tokenize",
        {"messages": MESSAGES, "chat_template": "{{ 1 }}"},
        "chat_template",
    ),
    **{
        f"template by kwargs: {name}": (
            *chat(chat_template_kwargs={name: value}),
            f"chat_template_kwargs.{name}",
        )
        for name, value in {
            "chat_template": "{{ 1 }}",
            "tokenize": True,
            "tools": [],
            "conversation": [],
            "messages": [],
            "documents": [],
            "return_dict": True,
            "return_tensors": "pt",
            "padding": True,
            "truncation": True,
            "max_length": 1,
            "tokenizer_kwargs": {},
            "return_assistant_tokens_mask": True,
            "__class__": 1,
        }.items()
    },
    "template kwargs of Responses": (
        *response(chat_template_kwargs={"chat_template": "x"}),
        "chat_template",
    ),
    "kwargs that are none": (*chat(chat_template_kwargs="x"), "chat_template_kwargs"),
    "processor": (*chat(mm_processor_kwargs={"num_crops": 10**6}), "mm_processor_kwargs"),
    "media reader": (*chat(media_io_kwargs={"image": {"mode": "x"}}), "media_io_kwargs"),
    # between engines
    "kv transfer": (*chat(kv_transfer_params={"remote_host": "127.0.0.1"}), "kv_transfer_params"),
    "encoder transfer": (*chat(ec_transfer_params={"a": 1}), "ec_transfer_params"),
    "extra arguments": (*completion(vllm_xargs={"a": 1}), "vllm_xargs"),
    "extra arguments, native": (*generate(extra_args={"a": 1}), "extra_args"),
    "priority": (*chat(priority=-100), "priority"),
    # code
    "pickled embeddings": (*completion(prompt_embeds="gASVBQ=="), "prompt_embeds"),
    "pickled embeddings in a message": (
        *chat(messages=with_part(image_embeds="gASV")),
        "image_embeds",
    ),
    "logits processor": (*chat(logits_processors=["os.system"]), "logits_processors"),
    "SGLang's logits processor": (
        "/generate",
        {"input_ids": [5], "custom_logit_processor": "x"},
        "custom_logit_processor",
    ),
    "an adapter": (*chat(lora_request={"lora_path": "/etc"}), "lora_request"),
    # what vLLM would drop
    "backend": (*chat(guided_decoding_backend="outlines"), "guided_decoding_backend"),
    "old grammar": (*chat(guided_regex="a+"), "guided_regex"),
    "beams": (*completion(use_beam_search=True, n=8), "use_beam_search"),
    "best of": (*completion(best_of=10**6), "best_of"),
    # sizes
    "n": (*chat(n=16384), "n=16384"),
    "prompts": (*completion(prompt=[[5]] * 1025), "1025 prompts"),
    "prompts times n": (*completion(prompt=["a"] * 512, n=3), "n=3 for 512 prompts"),
    "prompts, native": ("/generate", {"input_ids": [[5]] * 1025}, "1025 prompts"),
    "max_tokens": (*completion(max_tokens=10**12), "max_tokens"),
    "max_tokens below 0": (*completion(max_tokens=-1), "max_tokens"),
    "all of top_logprobs": (*chat(logprobs=True, top_logprobs=-1), "logprobs"),
    "top_logprobs": (*chat(logprobs=True, top_logprobs=49152), "logprobs"),
    "logprobs": (*completion(logprobs=49152), "logprobs"),
    "logprobs, native": (
        "/generate",
        {"input_ids": [5], "return_logprob": True, "top_logprobs_num": 49152},
        "logprobs",
    ),
    "prompt_logprobs": (*completion(prompt_logprobs=-1), "prompt logprobs"),
    "echoed logprobs": (*completion(echo=True, logprobs=49152), "logprobs"),
    "large number": (*completion(max_tokens=2**63), "64 bits"),
    "prompt": (*completion(prompt="a " * 10**6), "maximum context length"),
    "text to tokenise": ("/tokenize", {"prompt": "a" * (MIB + 1)}, "prompt"),
    "messages to tokenise": (
        "/tokenize",
        {"messages": [{"role": "user", "content": "a" * 2 * MIB}]},
        "messages",
    ),
    "tokens to detokenise": ("/detokenize", {"tokens": [5] * (MIB + 1)}, "tokens"),
    "stop strings": (*completion(stop=["a"] * 100), "stop"),
    "a stop string": (*completion(stop=["a" * 10**6]), "stop"),
    "stop strings of Anthropic": (*anthropic(stop_sequences=["a"] * 100), "stop_sequences"),
    "stop tokens": (*completion(stop_token_ids=[5] * 10**5), "stop_token_ids"),
    "bad words": (*completion(bad_words=["a"] * 10**5), "bad_words"),
    "a bad word": (*completion(bad_words=["a" * 10**5]), "bad_words"),
    "biases": (*completion(logit_bias={str(i): 1 for i in range(40000)}), "logit_bias"),
    "infinite bias": (COMPLETIONS, b'{"prompt": [5], "logit_bias": {"5": 1e999}}', "logit_bias"),
    "request id": (*chat(request_id="a" * 10**6), "request_id"),
    # grammars
    "large grammar": (
        *chat(
            structured_outputs={
                "grammar": "root ::= " + " | ".join(f'"{i}"' for i in range(50_000))
            }
        ),
        "structured_outputs",
    ),
    "long regex": (
        *chat(structured_outputs={"regex": "(a|b)*a" + "(a|b)" * 2000}),
        "structured_outputs.regex",
    ),
    "regex of repeats": (
        *chat(structured_outputs={"regex": "((a{1,1000}){1,1000}){1,1000}"}),
        "structured_outputs.regex",
    ),
    "choices": (
        *chat(structured_outputs={"choice": [str(i) for i in range(2000)]}),
        "structured_outputs.choice",
    ),
    "enum": (*chat(response_format=schema(enum=list(range(2000)))), "enum"),
    "repeats in a schema": (
        *chat(response_format=schema(type="string", pattern="(a{9,999}){9,999}")),
        "pattern",
    ),
    "items": (*chat(response_format=schema(type="array", minItems=10**9)), "minItems"),
    "a schema as text": (
        *chat(structured_outputs={"json": json.dumps({"type": "string", "maxLength": 10**9})}),
        "structured_outputs.json.maxLength",
    ),
    "a schema that is a number": (*chat(structured_outputs={"json": 5}), "structured_outputs"),
    "a grammar that is a number": (*chat(structured_outputs=5), "structured_outputs"),
    "a schema that refers to itself": (
        *chat(
            response_format=schema(**{"$defs": {"a": {"$ref": "#/$defs/a"}}, "$ref": "#/$defs/a"})
        ),
        "grammar",
    ),
    "a tool's schema": (
        *chat(
            tool_choice="required",
            tools=[
                {
                    "type": "function",
                    "function": {
                        "name": "f",
                        "parameters": {
                            "type": "object",
                            "properties": {"a": {"type": "string", "minLength": 10**9}},
                        },
                    },
                }
            ],
        ),
        "minLength",
    ),
    "schema of Responses": (
        *response(
            text={
                "format": {
                    "type": "json_schema",
                    "name": "a",
                    "schema": {"type": "string", "pattern": "(a{1,999}){1,999}"},
                }
            }
        ),
        "pattern",
    ),
    "deep schema": (*chat(response_format=schema(**_DEEP)), "nested"),
    # bodies
    "deep": (CHAT, b"[" * 100_000, "nested"),
    "deep, closed": (CHAT, b'{"a":' * 500 + b"1" + b"}" * 500, "nested"),
    "NaN": (COMPLETIONS, b'{"prompt": [5], "temperature": NaN}', "NaN"),
    "Infinity": (COMPLETIONS, b'{"prompt": [5], "temperature": -Infinity}', "-Infinity"),
    "1e999": (COMPLETIONS, b'{"prompt": [5], "temperature": 1e999}', "temperature"),
    "a number of a million digits": (COMPLETIONS, b'{"prompt": [' + b"9" * 10**6 + b"]}", "JSON"),
    "a name twice": (COMPLETIONS, b'{"prompt": [5], "n": 1, "n": 16384}', "'n' is given twice"),
    "half a character": (COMPLETIONS, b'{"prompt": "\\ud800"}', "surrogate"),
    "no UTF-8": (COMPLETIONS, b'{"prompt": "\xff\xfe"}', "UTF-8"),
    "encoded surrogate": (COMPLETIONS, b'{"prompt": "\xed\xa0\x80"}', "UTF-8"),
    "UTF-16": (COMPLETIONS, '{"prompt": [5]}'.encode("utf-16"), "UTF-8"),
    "no object": (CHAT, b"[1, 2]", ""),
    "nothing": (CHAT, b"", ""),
    "an empty message list": (*chat(messages=[]), ""),
    "token out of the vocabulary": (*completion(prompt=[49152]), ""),
    "token below 0": (*completion(prompt=[-1]), ""),
    "token too large for the machine": ("/detokenize", {"tokens": [10**30]}, ""),
    "stop token of a stranger": (*completion(stop_token_ids=[10**18]), "stop_token_ids"),
    "seed": (*completion(seed=2**80), "64 bits"),
    "top_k": (*completion(top_k=2**80), ""),
    "temperature": (*completion(temperature=1e300), "temperature"),
    "native types": (*generate(temperature="hot"), "temperature"),
    "native objects": (*generate(structured_outputs={"regex": "a"}), "structured_outputs"),
    "native output kind": (*generate(output_kind=7), "output_kind"),
    "native id": ("/generate", {"input_ids": [5], "rid": {"a": 1}}, "rid"),
}

MEDIA = {
    "image": lambda url: chat(messages=with_part(image_url={"url": url})),
    "image as text": lambda url: chat(messages=with_part(image_url=url)),
    "audio": lambda url: chat(messages=with_part(audio_url={"url": url})),
    "video": lambda url: chat(messages=with_part(video_url={"url": url})),
    "another type": lambda url: chat(
        messages=[{"role": "user", "content": [{"type": "text", "text": "", "image_url": url}]}]
    ),
    "tool's result": lambda url: chat(
        messages=[
            {
                "role": "tool",
                "tool_call_id": "1",
                "content": [{"type": "image_url", "image_url": url}],
            },
        ]
    ),
    "Responses": lambda url: response(
        input=[{"role": "user", "content": [{"type": "input_image", "image_url": url}]}]
    ),
    "file of Responses": lambda url: response(
        input=[{"role": "user", "content": [{"type": "input_file", "file_url": url}]}]
    ),
    "output of Responses": lambda url: response(
        input=[
            {
                "type": "function_call_output",
                "call_id": "1",
                "output": [{"type": "input_image", "image_url": url}],
            }
        ]
    ),
    "Anthropic": lambda url: anthropic(
        messages=with_part(image=None, source={"type": "url", "url": url})
    ),
    "Anthropic's tool result": lambda url: anthropic(
        messages=[
            {
                "role": "user",
                "content": [
                    {
                        "type": "tool_result",
                        "tool_use_id": "1",
                        "content": [{"type": "image", "source": {"type": "url", "url": url}}],
                    }
                ],
            }
        ]
    ),
    "/tokenize": lambda url: ("/tokenize", {"messages": with_part(image_url={"url": url})}),
    "count_tokens": lambda url: (
        ANTHROPIC + "/count_tokens",
        {"model": "policy", "messages": with_part(image=None, source={"type": "url", "url": url})},
    ),
    "MCP": lambda url: response(
        tools=[{"type": "mcp", "server_label": "a", "server_url": url, "require_approval": "never"}]
    ),
}

HARMLESS = {
    "documents": chat(documents=[{"title": "a", "text": "{{ 7 * 7 }}"}]),
    "salt": chat(cache_salt="a"),
    "greedy regex": chat(structured_outputs={"regex": "(a+)+b"}),
    "grammar that is ambiguous": chat(structured_outputs={"grammar": 'root ::= root root | "a"'}),
    "as many answers as are let": completion(n=64, max_tokens=1),
    "zero bytes": completion(prompt="a\x00b"),
    "the same id twice": chat(request_id="same"),
    "small probabilities": completion(temperature=1e-300, top_p=1e-300),
    "penalties": completion(repetition_penalty=1e300),
    "tokens of no meaning": ("/detokenize", {"tokens": [0, 49151]}),
    "a role of no meaning": chat(messages=[{"role": "root", "content": "x"}]),
}
