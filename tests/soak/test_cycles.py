"""A night of steps, in short: what grows, and what gets slower, over 1,000 cycles."""

import gc
import os
import statistics
import tempfile
import threading
import time
from pathlib import Path

import psutil
import pytest
import torch
from support import MIB
from transformers import AutoModelForCausalLM

from rollout_server import attach

CYCLES = int(os.environ.get("ROLLOUT_SOAK_CYCLES", 1000))
AGENTS = 4


class Agent(threading.Thread):
    """Conversations in sessions until told to stop."""

    def __init__(self, server, stop):
        super().__init__(daemon=True)
        self.server, self.stop, self.answers, self.error = server, stop, 0, None

    def run(self):
        try:
            while not self.stop.is_set():
                with self.server.session() as session, session.openai() as client:
                    messages = []
                    for _ in range(3):
                        messages.append({"role": "user", "content": "Go on."})
                        answer = client.chat.completions.create(
                            model="policy", messages=messages, max_tokens=4
                        )
                        content = answer.choices[0].message.content
                        messages.append({"role": "assistant", "content": content})
                        self.answers += 1
                    session.trajectory()
        except Exception as error:
            self.error = error


def held(server):
    """What the trainer and the engine hold now."""
    gc.collect()
    own, engine = psutil.Process(), psutil.Process(server.engine_pid)
    return {
        "trainer MiB": own.memory_info().rss / MIB,
        "engine MiB": engine.memory_info().rss / MIB,
        "trainer descriptors": own.num_fds(),
        "engine descriptors": engine.num_fds(),
        "trainer threads": own.num_threads(),
        "engine threads": engine.num_threads(),
        "temporary files": sum(1 for _ in Path(tempfile.gettempdir()).rglob("*")),
        "shared memory files": len(os.listdir("/dev/shm")),
    }


@pytest.fixture
def temporary(monkeypatch):
    """A temporary folder for this test, of a name short enough for the sockets in it: else the
    server's would be another."""
    with tempfile.TemporaryDirectory(prefix="soak-") as folder:
        monkeypatch.setenv("TMPDIR", folder)
        monkeypatch.setattr(tempfile, "tempdir", None)
        yield


@pytest.mark.timeout(4 * 3600)
def test_a_thousand_cycles(tiny_folder, tokenizer, temporary):
    model = AutoModelForCausalLM.from_pretrained(tiny_folder, dtype=torch.float32)
    with attach(
        model, tokenizer, kv_cache_memory_bytes=128 * MIB, verify_every=50, progress=False
    ) as server:
        stop = threading.Event()
        agents = [Agent(server, stop) for _ in range(AGENTS)]
        for agent in agents:
            agent.start()
        seconds, samples = [], []
        for cycle in range(CYCLES):
            started = time.perf_counter()
            server.wake()
            server.sync_weights()
            server.generate([5, 6, 7], {"max_tokens": 8, "ignore_eos": True})
            server.sleep()
            seconds.append(time.perf_counter() - started)
            if cycle % 100 == 99:
                print(
                    f"  {cycle + 1} cycles, {statistics.median(seconds[-100:]):.3f} s", flush=True
                )
            if cycle >= CYCLES // 5 and cycle % (CYCLES // 20) == 0:  # warmed up
                samples.append(held(server))
        server.wake()
        stop.set()
        for agent in agents:
            agent.join(60)
        assert [a.error for a in agents] == [None] * AGENTS and not any(
            a.is_alive() for a in agents
        )
        assert samples[0]["temporary files"] > 0  # the server's are looked at
        quarter = len(samples) // 4
        print()
        grown = {}
        for name in samples[0]:
            first = statistics.median(s[name] for s in samples[:quarter])
            last = statistics.median(s[name] for s in samples[-quarter:])
            grown[name] = last / first if first else 1 + last
            print(f"  {name}: {first:.4g} -> {last:.4g} ({grown[name]:.4f})")
        tenth = CYCLES // 10
        early, late = (statistics.median(s) for s in (seconds[20 : tenth + 20], seconds[-tenth:]))
        print(f"  seconds a cycle: {early:.3f} -> {late:.3f} ({late / early:.3f})")
        print(f"{CYCLES} cycles, {sum(a.answers for a in agents)} answers to agents")
        assert not {name: ratio for name, ratio in grown.items() if ratio > 1.01}
        assert late < 1.1 * early
