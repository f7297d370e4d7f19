"""Memory has an owner: what sessions, turns, tools and streams took is given back at their end.

ROLLOUT_SOAK_SESSIONS sets how many sessions there are; what the trainer's process holds after the
last is compared with what it held after the first hundred, or a third of fewer.
"""

import concurrent.futures
import ctypes
import gc
import json
import os
import random

import httpx
import psutil
import pytest
import torch
from support import MIB
from transformers import AutoModelForCausalLM

from rollout_server import attach

SESSIONS = int(os.environ.get("ROLLOUT_SOAK_SESSIONS", 2000))
TURNS, TOOLS, AT_ONCE, TOKENS = 20, 8, 4, 3


def tools(number):
    """Of one session: no other has such."""
    draw = random.Random(number)
    schema = {"type": "object", "properties": {"what": {"type": "string"}}}
    return [
        {
            "type": "function",
            "function": {
                "name": f"tool_{number}_{at}",
                "description": draw.randbytes(200).hex(),
                "parameters": schema,
            },
        }
        for at in range(TOOLS)
    ]


def converse(server, client, number):
    """One session of streamed turns; how many calls were recorded."""
    own, messages = tools(number), [{"role": "system", "content": f"You are agent {number}."}]
    with server.session(number=number) as session:
        for turn in range(TURNS):
            messages.append({"role": "user", "content": f"Turn {turn}."})
            request = {
                "model": "policy",
                "messages": messages,
                "tools": own,
                "stream": True,
                "max_tokens": TOKENS,
                "logprobs": True,
                "ignore_eos": True,
            }
            said = []
            with client.stream(
                "POST", f"{session.base_url}/chat/completions", json=request
            ) as answer:
                assert answer.status_code == 200, answer.read()
                for line in answer.iter_lines():
                    if line.startswith("data: {"):
                        for choice in json.loads(line[6:])["choices"]:
                            said.append(choice["delta"].get("content") or "")
            messages.append({"role": "assistant", "content": "".join(said)})
        assert len(session.trajectory()) >= 1
        return len(session.tree.calls)


def held():
    """MiB of this process, without what Python or malloc would give back if they were asked."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    return psutil.Process().memory_info().rss / MIB


@pytest.mark.timeout(4 * 3600)
# pytest keeps each warning, of which vLLM gives two a request: it would be the growth.
@pytest.mark.filterwarnings("ignore:max_tokens is deprecated:DeprecationWarning")
def test_sessions_leave_nothing_behind(tiny_folder, tokenizer):
    model = AutoModelForCausalLM.from_pretrained(tiny_folder, dtype=torch.float32)
    first, part = min(100, SESSIONS // 3), max(SESSIONS // 20, 1)
    with (
        attach(model, tokenizer, kv_cache_memory_bytes=128 * MIB, progress=False) as server,
        httpx.Client(timeout=120) as client,
        concurrent.futures.ThreadPoolExecutor(AT_ONCE) as pool,
    ):

        def run(begin, end):
            calls = pool.map(lambda number: converse(server, client, number), range(begin, end))
            assert set(calls) == {TURNS}

        run(0, first)
        before = after = held()
        print(f"\n  {first} sessions: {before:.1f} MiB", flush=True)
        for begin in range(first, SESSIONS, part):
            end = min(begin + part, SESSIONS)
            run(begin, end)
            after = held()
            print(f"  {end} sessions: {after:.1f} MiB ({after / before:.4f})", flush=True)
    assert after <= 1.02 * before
