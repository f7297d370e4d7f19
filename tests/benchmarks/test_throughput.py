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
from rollout_server.engine.arguments import CPU_WORKER
from rollout_server.engine.spawn import engine_children

CLIENTS, TOKENS, WARM_UP, ROUNDS = 32, 32, 2, 6


@pytest.fixture(scope="module")
def policy(smollm2):
    return AutoModelForCausalLM.from_pretrained(smollm2, dtype=torch.float32)


def prompts(seed):
    """32 prompts of 16 to 48 tokens; other ones each round, so that no cache helps."""
    draw = random.Random(seed)
    return [
        [draw.randrange(1000, 40000) for _ in range(draw.randrange(16, 48))] for _ in range(CLIENTS)
    ]


def start_llm(log, variables, **options):
    from vllm import LLM

    with engine_children(str(log), variables, []):
        return LLM(dtype="float32", enforce_eager=True, disable_log_stats=True, **options)


@pytest.mark.timeout(1200)
def test_http_against_llm_generate(policy, smollm2, tokenizer, tmp_path, report):
    """32 concurrent clients through HTTP, and the same work through vLLM's own `LLM.generate`:
    once as vLLM sets itself up, once with the worker and the processes of an attached server, so
    that only the front ends differ."""
    from vllm import SamplingParams

    sizes = dict(kv_cache_memory_bytes=512 * MIB, max_model_len=1024)
    own = start_llm(tmp_path / "own.log", {}, model=smollm2, **sizes)
    same = start_llm(
        tmp_path / "same.log",
        # Any number but 1, or vLLM puts the worker into a further process.
        {"VLLM_ENABLE_V1_MULTIPROCESSING": "2"},
        model=smollm2,
        distributed_executor_backend="uni",
        worker_cls=CPU_WORKER,
        **sizes,
    )
    fixed = SamplingParams(temperature=1.0, max_tokens=TOKENS, ignore_eos=True, logprobs=0)

    def through(llm):
        return lambda work: llm.generate(
            [{"prompt_token_ids": ids} for ids in work], fixed, use_tqdm=False
        )

    with attach(policy, tokenizer, progress=False, **sizes) as server, asyncio.Runner() as runner:
        client = server.async_openai(max_retries=0)

        async def ask(ids):
            answer = await client.completions.create(
                model="policy",
                prompt=ids,
                max_tokens=TOKENS,
                logprobs=0,
                extra_body={"ignore_eos": True},
            )
            assert answer.usage.completion_tokens == TOKENS

        async def ask_all(work):
            await asyncio.gather(*[ask(ids) for ids in work])

        ways = {
            "LLM.generate": through(own),
            "LLM.generate, the server's worker and processes": through(same),
            f"{CLIENTS} clients through HTTP": lambda work: runner.run(ask_all(work)),
            "server.generate": lambda work: server.generate(
                work, {"max_tokens": TOKENS, "ignore_eos": True}
            ),
        }
        rates = {way: [] for way in ways}
        for number in range(WARM_UP + ROUNDS):
            for way, run in ways.items():
                started = time.perf_counter()
                run(prompts(f"{way}{number}"))
                if number >= WARM_UP:
                    rates[way].append(CLIENTS * TOKENS / (time.perf_counter() - started))
    for llm in (own, same):  # or their processes go on beside the next benchmark
        llm.llm_engine.engine_core.shutdown()
    first, second, http, _ = (statistics.median(r) for r in rates.values())
    report(
        {way: spread(r, "tokens/s") for way, r in rates.items()}
        | {
            "HTTP / LLM.generate (at least 0.9)": round(http / first, 3),
            "HTTP / LLM.generate, same engine (at least 0.9)": round(http / second, 3),
        }
    )
    assert http / first >= 0.9
    assert http / second >= 0.9


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
    # Of the fastest steps: others have caught some of the machine's noise, up to twice as long.
    ratio = min(beside) / min(without)
    report(
        {
            "step without a server": spread(without, "s"),
            "step beside a sleeping server": spread(beside, "s"),
            "fastest with / fastest without (at most 1.03)": round(ratio, 4),
        }
    )
    assert ratio <= 1.03
