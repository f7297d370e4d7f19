"""A script in which each thing that takes time is interrupted by whoever started it.

interrupted.py MODEL_FOLDER OUTPUT: writes a line to OUTPUT before each, and one after it with what
came of it.
"""

import os
import random
import signal
import sys
import threading
import time

import httpx
import torch
from datasets import Dataset
from support import every_call
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import GRPOConfig, GRPOTrainer

from rollout_server import attach
from rollout_server.rollouts.agents import run_agents

folder, output = sys.argv[1:]
tokenizer = AutoTokenizer.from_pretrained(folder)
LONG = {"max_tokens": 900, "ignore_eos": True, "n": 16}


def say(*words):
    with open(output, "a") as lines:
        print(*words, file=lines)


def reward(completions, **_):
    return [float(len(c) % 7) for c in completions]


trainer = GRPOTrainer(
    AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32),
    reward_funcs=reward,
    args=GRPOConfig(
        output_dir=os.path.join(os.path.dirname(output), "run"),
        use_cpu=True,
        bf16=False,
        report_to=[],
        save_strategy="no",
        learning_rate=1e-4,
        num_generations=4,
        per_device_train_batch_size=4,
        max_completion_length=64,
        disable_tqdm=True,
        max_steps=5000,
    ),
    train_dataset=Dataset.from_list([{"prompt": "One, two,"}] * 8),
    processing_class=tokenizer,
)
server = attach(
    trainer,
    kv_cache_memory_bytes=128 << 20,
    liveness_timeout=3,
    hold_timeout=30,
    progress=False,
)
engine = server.engine_pid


def endlessly(*works):
    while True:
        for work in works:
            work()


ASKED = {
    "model": "policy",
    "prompt": "Go on",
    "max_tokens": 900,
    "extra_body": {"ignore_eos": True},
}


async def agent(session, example):
    async with session.async_openai() as client:
        for _ in range(1000):
            await client.completions.create(**ASKED)


def thread(session, example):
    with session.openai() as client:
        for _ in range(1000):
            client.completions.create(**ASKED)


def rollouts(agent):
    return lambda: run_agents(server.session, agent, range(8), concurrency=8, timeout=300)


def all_is_well():
    """Each kind of call, one after the other; what isn't as it was, as text."""
    every_call(server)
    headers = {"authorization": f"Bearer {server.api_key}"}
    asked = {"model": "policy", "prompt": "And now", "max_tokens": 2}
    answer = httpx.post(f"{server.base_url}/completions", json=asked, headers=headers, timeout=20)
    metrics = server.metrics()
    found = {
        "status": (answer.status_code, 200),
        "state": (server.state, "awake"),
        "engine": (server.engine_pid, engine),
        "restarts": (metrics["rollout_server_engine_restarts_total"], 0),
        "held": (metrics["rollout_server_gate_held_requests"], 0),
        "generations": (metrics["rollout_server_running_generations"], 0),
        "sessions": (metrics["rollout_server_sessions_open"], 0),
    }
    return [f"{name} {is_} not {should}" for name, (is_, should) in found.items() if is_ != should]


def interrupted(name, work):
    say("begin", name)
    try:
        work()
        outcome = "finished"
    except KeyboardInterrupt:
        outcome = "interrupted"
    except Exception as error:
        outcome = f"{type(error).__name__}: {error}".replace("\n", " ")
    say("end", name, outcome)
    until = time.monotonic() + 5
    while (wrong := all_is_well()) and time.monotonic() < until:  # an abort takes its time
        time.sleep(0.1)
    say("then", name, *(wrong or ["well"]))


def everything():
    """One of each, at most a few tenths of a second long."""
    server.generate("And now", {"max_tokens": 20, "ignore_eos": True, "n": 2})
    server.sync_weights()
    server.sleep()
    server.wake()


def storm(times, seed):
    """Interrupts at random moments of `everything`, each followed by one that isn't disturbed."""
    chance = random.Random(seed)
    for number in range(times):
        timer = threading.Timer(chance.uniform(0, 0.5), os.kill, (os.getpid(), signal.SIGINT))
        try:
            timer.start()
            endlessly(everything)
        except KeyboardInterrupt:
            pass
        server.wake()
        everything()
        server.verify_weights()
        if (server.state, server.engine_pid) != ("awake", engine):
            say("storm", number, server.state)
            break


def stopped():
    """Until somebody has stopped the process for a while."""
    before = time.monotonic()
    while (now := time.monotonic()) - before < 2:
        before = now
        server.generate("And now", {"max_tokens": 2})


interrupted("generate", lambda: server.generate(["One, two,", "Three,"], LONG))
interrupted("sync", lambda: endlessly(server.sync_weights))
interrupted("sleep", lambda: endlessly(server.sleep, server.wake))
interrupted("agents", rollouts(agent))
interrupted("threads", rollouts(thread))
interrupted("train", trainer.train)
say("begin stop")
stopped()
say("end stop")
time.sleep(1.5)  # for whoever would take the engine for hung now
say("then stop", *(all_is_well() or ["well"]))
storm(40, seed=0)
say("then storm", *(all_is_well() or ["well"]))
say("begin close")
server.close()
say("end close")
