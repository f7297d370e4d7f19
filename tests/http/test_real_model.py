"""SmolLM2-135M-Instruct behind the endpoint: what only a real model can show."""

import json

import pytest
import torch
from support import MIB, greedy, trainer_logprobs
from transformers import AutoModelForCausalLM

from rollout_server import attach

pytestmark = pytest.mark.slow

MESSAGES = [{"role": "user", "content": "What is the weather in Rome?"}]
WEATHER = {
    "type": "function",
    "function": {
        "name": "weather",
        "strict": True,
        "description": "Tells the weather.",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string", "enum": ["Oslo", "Rome"]}},
            "required": ["city"],
            "additionalProperties": False,
        },
    },
}


@pytest.fixture(scope="module")
def model(smollm2):
    return AutoModelForCausalLM.from_pretrained(smollm2, dtype=torch.float32)


@pytest.fixture(scope="module")
def real(model, tokenizer):
    with attach(
        model, tokenizer, kv_cache_memory_bytes=128 * MIB, max_model_len=1024, progress=False
    ) as server:
        yield server


@pytest.fixture
def client(real):
    return real.openai()


def test_it_answers_sensibly(client):
    answer = client.chat.completions.create(
        model="policy",
        temperature=0,
        max_tokens=40,
        messages=[{"role": "user", "content": "What is the capital of France?"}],
    )
    assert "Paris" in answer.choices[0].message.content
    assert answer.choices[0].finish_reason == "stop"


def test_its_logprobs_are_the_trainers(real, model, tokenizer):
    prompt = tokenizer("The capital of France is")["input_ids"]
    completion = greedy(real, prompt, tokens=32)
    own = trainer_logprobs(model, prompt, completion.ids)
    assert torch.allclose(
        torch.tensor(completion.logprobs), own[range(32), completion.ids], atol=1e-3
    )


def test_a_forced_tool_call(client):
    asked = dict(
        model="policy",
        messages=MESSAGES,
        tools=[WEATHER],
        max_tokens=100,
        temperature=0,
        tool_choice={"type": "function", "function": {"name": "weather"}},
    )
    answer = client.chat.completions.create(**asked)
    (call,) = answer.choices[0].message.tool_calls
    assert call.function.name == "weather"
    assert json.loads(call.function.arguments)["city"] in ("Oslo", "Rome")
    streamed = client.chat.completions.create(**asked, stream=True)
    parts = [c.choices[0].delta.tool_calls for c in streamed if c.choices]
    arguments = "".join(p[0].function.arguments or "" for p in parts if p)
    assert json.loads(arguments)["city"] in ("Oslo", "Rome")
