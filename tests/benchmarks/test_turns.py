"""What a turn of a long conversation costs besides the engine's own work."""

import statistics
import time

import httpx
import pytest
import torch
from support import MIB, spread
from transformers import AutoModelForCausalLM

from rollout_server import attach

CONVERSATIONS, EARLY, LATE = 2, range(8, 13), range(96, 101)


@pytest.mark.timeout(900)
def test_a_turn_costs_as_much_at_turn_100_as_at_turn_10(smollm2, tokenizer, report):
    """Seconds of a request without those in vLLM's `generate`: tokens of earlier turns are known,
    so neither they nor the whole text are tokenised again."""
    model = AutoModelForCausalLM.from_pretrained(smollm2, dtype=torch.float32)
    seconds = {"session": {}, "afresh": {}}
    with attach(model, tokenizer, kv_cache_memory_bytes=512 * MIB, progress=False) as server:
        inside = _time_generate(server._engine.client)
        for _ in range(CONVERSATIONS):
            for kind, found in seconds.items():
                with server.session() as session:
                    url = session.base_url if kind == "session" else server.base_url
                    for turn, cost in _converse(url, server.api_key, session, inside, kind):
                        found.setdefault(turn, []).append(1e3 * cost)
    rows, ratios = {}, {}
    for kind, found in seconds.items():
        early = [x for turn in EARLY for x in found[turn]]
        late = [x for turn in LATE for x in found[turn]]
        ratios[kind] = statistics.median(late) / statistics.median(early)
        rows |= {
            f"{kind}: overhead at turn 10": spread(early, "ms"),
            f"{kind}: overhead at turn 100": spread(late, "ms"),
            f"{kind}: ratio": f"{ratios[kind]:.2f}",
        }
    report(rows)
    assert ratios["session"] <= 1.5


def _converse(url, key, session, inside, kind):
    """(number of the turn, its overhead in seconds)."""
    headers = {"authorization": f"Bearer {session.api_key if kind == 'session' else key}"}
    messages = []
    with httpx.Client(headers=headers, timeout=60) as client:
        for turn in range(1, LATE.stop):
            messages.append({"role": "user", "content": f"This is question number {turn}: why?"})
            body = {"model": "policy", "messages": messages, "max_tokens": 3, "ignore_eos": True}
            before, started = inside[0], time.perf_counter()
            answer = client.post(f"{url}/chat/completions", json=body).json()
            cost = time.perf_counter() - started - (inside[0] - before)
            messages.append(answer["choices"][0]["message"])
            yield turn, cost


def _time_generate(client):
    """A list with the seconds spent in `client.generate` so far."""
    generate, inside = client.generate, [0.0]

    async def timed(*args, **options):
        started = time.perf_counter()
        async for step in generate(*args, **options):
            yield step
        inside[0] += time.perf_counter() - started

    client.generate = timed
    return inside
