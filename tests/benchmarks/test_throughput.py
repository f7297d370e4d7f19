"""HTTP against `LLM.generate`, and what a sleeping server costs the trainer."""

import asyncio
import random
import statistics
import time

import pytest
import torch
from support import MIB, spread
from transformers import AutoModelForCausalLM

from rollout_server import attach
from rollout_server.engine.spawn import engine_children, quiet_front_end

CLIENTS, TOKENS, ROUNDS = 32, 32, 5


@pytest.fixture(scope="module")
def policy(smollm2):
    return AutoModelForCausalLM.from_pretrained(smollm2, dtype=torch.float32)


def prompts(seed):
    """32 prompts of 16 to 48 tokens; other ones each round, so that no cache helps."""
    draw = random.Random(seed)
    return [
        [draw.randrange(1000, 40000) for _ in range(draw.randrange(16, 48))] for _ in range(CLIENTS)
    ]


@pytest.mark.timeout(1200)
def test_http_against_llm_generate(policy, smollm2, tokenizer, tmp_path, report):
    """32 concurrent clients through HTTP; the same work through vLLM's own `LLM.generate`."""
    from vllm import LLM, SamplingParams

    sizes = dict(kv_cache_memory_bytes=512 * MIB, max_model_len=1024)
    variables = {"VLLM_ENABLE_V1_MULTIPROCESSING": "1"}
    with engine_children(str(tmp_path / "llm.log"), variables, []), quiet_front_end():
        llm = LLM(
            model=smollm2, dtype="float32", enforce_eager=True, disable_log_stats=True, **sizes
        )
    fixed = SamplingParams(temperature=1.0, max_tokens=TOKENS, ignore_eos=True, logprobs=0)
    rates = {"llm": [], "http": [], "generate": []}
    with attach(policy, tokenizer, progress=False, **sizes) as server:
        client = server.async_openai(max_retries=0)

        async def ask(ids):
            answer = await client.completions.create(
                model="policy", prompt=ids, max_tokens=TOKENS, logprobs=0,
                extra_body={"ignore_eos": True},
            )  # fmt: skip
            return answer.usage.completion_tokens

        async def ask_all(work):
            return await asyncio.gather(*[ask(ids) for ids in work])

        ways = {
            "llm": lambda work: llm.generate(
                [{"prompt_token_ids": ids} for ids in work], fixed, use_tqdm=False
            ),
            "http": lambda work: runner.run(ask_all(work)),
            "generate": lambda work: server.generate(
                work, {"max_tokens": TOKENS, "ignore_eos": True}
            ),
        }
        with asyncio.Runner() as runner:
            for number in range(ROUNDS + 1):
                for way, run in ways.items():
                    started = time.perf_counter()
                    run(prompts(f"{way}{number}"))
                    if number:  # the first round warms up
                        rates[way].append(CLIENTS * TOKENS / (time.perf_counter() - started))
    ratio = statistics.median(rates["http"]) / statistics.median(rates["llm"])
    report(
        {
            "LLM.generate": spread(rates["llm"], "tokens/s"),
            f"{CLIENTS} clients through HTTP": spread(rates["http"], "tokens/s"),
            "server.generate": spread(rates["generate"], "tokens/s"),
            "HTTP / LLM.generate (at least 0.9)": round(ratio, 3),
        }
    )
    assert ratio >= 0.9


@pytest.mark.timeout(1200)
def test_training_step_beside_a_sleeping_server(policy, tokenizer, report):
    """Forward, backward and optimizer step: without a server, with one asleep, without again."""
    policy.train()
    optimizer = torch.optim.AdamW(policy.parameters(), lr=1e-6)
    ids = torch.randint(1000, 40000, (4, 64))

    def steps(count):
        seconds = []
        for _ in range(count):
            started = time.perf_counter()
            policy(ids, labels=ids).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            seconds.append(time.perf_counter() - started)
        return seconds

    steps(2)
    without, beside = [], []
    for _ in range(2):
        without += steps(8)
        with attach(policy, tokenizer, progress=False, kv_cache_memory_bytes=512 * MIB) as server:
            server.generate("Hello", {"max_tokens": 4})
            server.sleep()
            beside += steps(16)
        without += steps(8)
    ratio = statistics.median(beside) / statistics.median(without)
    report(
        {
            "step without a server": spread(without, "s"),
            "step beside a sleeping server": spread(beside, "s"),
            "with / without (at most 1.03)": round(ratio, 4),
        }
    )
    assert ratio <= 1.03
