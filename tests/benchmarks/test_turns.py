"""What a turn of a long conversation costs besides the engine's own work."""

import contextlib
import itertools
import json
import statistics
import time

import httpx
import pytest
import torch
from inside import client as engine_client
from support import MIB, spread
from transformers import AutoModelForCausalLM

from rollout_server import attach

CONVERSATIONS, EARLY, LATE = 4, range(8, 13), range(96, 101)


@pytest.mark.timeout(900)
def test_a_turn_costs_as_much_at_turn_100_as_at_turn_10(smollm2, tokenizer, report):
    """Seconds from the request's first byte to the answer's last, without those in vLLM's
    `generate`: what was read, tokenised or recorded of earlier turns isn't again.

    Early turns of some conversations alternate with late turns of others, since what else the
    machine does changes the cost of both.
    """
    model = AutoModelForCausalLM.from_pretrained(smollm2, dtype=torch.float32)
    rows, ratios = {}, {}
    with attach(model, tokenizer, kv_cache_memory_bytes=2048 * MIB, progress=False) as server:
        inside = _time_generate(engine_client(server))
        for kind in ("session", "afresh"):
            early, late = _measured(server, inside, in_session=kind == "session")
            ratios[kind] = statistics.median(late) / statistics.median(early)
            rows |= {
                f"{kind}: overhead at turn 10": spread(early, "ms"),
                f"{kind}: overhead at turn 100": spread(late, "ms"),
                f"{kind}: ratio": f"{ratios[kind]:.2f}",
            }
    report(rows)
    assert ratios["session"] <= 1.5


def _measured(server, inside, in_session):
    """Costs in ms of early and of late turns."""
    with contextlib.ExitStack() as stack:
        costs = {EARLY: [], LATE: []}
        going = []
        for turns in [*costs] * CONVERSATIONS:
            session = stack.enter_context(server.session())
            url, key = session.base_url, session.api_key
            if not in_session:
                url, key = server.base_url, server.api_key
            conversation = _conversation(url, key, inside)
            list(itertools.islice(conversation, turns.start - 1))
            going.append((costs[turns], conversation))
        for _ in EARLY:
            for found, conversation in going:
                found.append(1e3 * next(conversation))
    return costs.values()


def _conversation(url, key, inside):
    """The overhead in seconds of one turn after the other."""
    messages = []
    headers = {"authorization": f"Bearer {key}", "content-type": "application/json"}
    with httpx.Client(headers=headers, timeout=60) as client:
        for turn in itertools.count(1):
            messages.append({"role": "user", "content": f"This is question number {turn}: why?"})
            body = {"model": "policy", "messages": messages, "max_tokens": 3, "ignore_eos": True}
            content = json.dumps(body).encode()
            before, started = inside[0], time.perf_counter()
            answer = client.post(f"{url}/chat/completions", content=content)
            cost = time.perf_counter() - started - (inside[0] - before)
            messages.append(answer.json()["choices"][0]["message"])
            yield cost


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
