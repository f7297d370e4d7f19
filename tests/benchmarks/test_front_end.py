"""What the front end costs in CPU time, beside vLLM's own OpenAI server."""

import asyncio
import contextlib
import itertools
import json
import os
import random
import socket
import statistics
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest
from support import MIB, spread

from rollout_server.engine.arguments import CPU_WORKER

sys.path.insert(0, str(Path(__file__).parent / "front_end"))
from clients import ask, cpu_seconds

CLIENTS, WARM_UP = 32, 2
SIZES = {"max_model_len": 1024, "kv_cache_memory_bytes": 256 * MIB}
# Both: errors alone are logged, so vLLM's statistics are Prometheus's. A thread computes each
# engine: where others want the cores too, two of them wait for each other.
SETTINGS = {
    "VLLM_LOGGING_LEVEL": "ERROR",
    "HF_HUB_OFFLINE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "OMP_NUM_THREADS": "1",
    # As attach() has it: the worker is inside the engine's process.
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "TORCHDYNAMO_DISABLE": "1",
}
# What attach() chooses of vLLM's.
SAME = [
    "--dtype=float32",
    "--enforce-eager",
    "--max-num-seqs=256",
    "--generation-config=vllm",
    "--logprobs-mode=processed_logprobs",
    "--enable-auto-tool-choice",
    "--tool-call-parser=hermes",
    "--served-model-name=policy",
    "--disable-uvicorn-access-log",
    "--host=127.0.0.1",
    "--distributed-executor-backend=uni",
    f"--worker-cls={CPU_WORKER}",
]
# path, tokens of an answer, requests of a client in a round, whether it streams
KINDS = {
    "completions": ("/completions", 16, 3, False),
    "chat": ("/chat/completions", 16, 3, False),
    "chat streamed": ("/chat/completions", 64, 1, True),
}
# A round of short answers differs by a third either way, so there are many: the median of 48 is
# known to a twentieth. Streams are longer, and steadier.
ROUNDS = {"completions": 48, "chat": 48, "chat streamed": 12}
LIMITS = {"no session": 1.1, "session": 1.3}
SAME_EVENTS = 0.03


@contextlib.contextmanager
def attached(folder):
    """(pid, (base_url, api_key), a function that opens so many sessions)."""
    options = json.dumps(SIZES | {"engine_args": {"max_num_seqs": 256}})
    script = Path(__file__).parent / "front_end" / "attached.py"
    process = subprocess.Popen(
        [sys.executable, str(script), folder, options],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | SETTINGS,
    )

    def sessions(number):
        process.stdin.write(f"sessions {number}\n")
        process.stdin.flush()
        return json.loads(process.stdout.readline())

    try:
        yield process.pid, json.loads(process.stdout.readline()), sessions
        process.stdin.close()
        process.wait(60)
    finally:
        process.kill()


@contextlib.contextmanager
def vllms_own(folder):
    """(pid, (base_url, any key))."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    sizes = [f"--{name.replace('_', '-')}={value}" for name, value in SIZES.items()]
    process = subprocess.Popen(
        [
            sys.executable,
            "-m",
            "vllm.entrypoints.openai.api_server",
            f"--model={folder}",
            f"--port={port}",
            *SAME,
            *sizes,
        ],
        env=os.environ | SETTINGS,
    )
    try:
        until = time.monotonic() + 300
        while True:
            with contextlib.suppress(OSError):
                urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5).close()
                break
            assert process.poll() is None and time.monotonic() < until, "vLLM's didn't start"
            time.sleep(0.2)
        yield process.pid, (f"http://127.0.0.1:{port}/v1", "none")
        process.terminate()
        process.wait(60)
    finally:
        process.kill()


def bodies(kind, seed):
    """A list for each client: other words each time, so that no cache helps."""
    path, tokens, number, streams = KINDS[kind]
    draw = random.Random(seed)
    for _ in range(CLIENTS):
        texts = [" ".join(draw.choices(WORDS, k=40)) for _ in range(number)]
        yield [json.dumps(_body(path, tokens, streams, text)).encode() for text in texts]


WORDS = ("the", "river", "stone", "under", "seven", "bright", "letters", "glass", "why", "sing")


def _body(path, tokens, streams, text):
    asked = {"model": "policy", "max_tokens": tokens, "ignore_eos": True, "temperature": 1.0}
    if streams:
        asked["stream"] = True
    if path == "/completions":
        return asked | {"prompt": text}
    return asked | {"messages": [{"role": "user", "content": text}]}


def check(kind, answers):
    """Each answer has all its tokens; the events of the streams, if they are some."""
    _, tokens, number, streams = KINDS[kind]
    assert len(answers) == CLIENTS * number
    for answer in answers:
        if streams:
            assert b'"finish_reason":"length"' in answer.replace(b'": ', b'":')
            assert b"data: [DONE]" in answer
        else:
            assert json.loads(answer)["usage"]["completion_tokens"] == tokens
    return sum(answer.count(b"data: {") for answer in answers) / len(answers)


def measure(kind, own, vllm, rounds, warm_up=WARM_UP, ways=("vLLM", "no session", "session")):
    """CPU in ms a request of each way, a list of rounds, and events of a stream."""
    path, _, number, _ = KINDS[kind]
    costs = {way: [] for way in ways}
    events = {way: [] for way in ways}
    orders = itertools.cycle(itertools.permutations(costs))
    for at in range(warm_up + rounds):
        # The same requests for all: what the engine caches of prompts, each has an engine for.
        work = list(bodies(kind, f"{kind}{at}"))
        for way in next(orders):
            if way == "session":
                pid, ends = own[0], own[2](CLIENTS)
            elif way == "no session":
                pid, ends = own[0], [own[1]] * CLIENTS
            else:
                pid, ends = vllm[0], [vllm[1]] * CLIENTS
            before = cpu_seconds(pid)
            answers = asyncio.run(ask(ends, path, work))
            cost = cpu_seconds(pid) - before
            happened = check(kind, answers)
            if at >= warm_up:
                costs[way].append(1e3 * cost / (CLIENTS * number))
                events[way].append(happened)
    return costs, events


def compared(costs, events, way):
    """The ratio in each round whose streams had as many events. A front end that isn't given a core
    for a while tells several tokens in one event, which costs it less."""
    rounds = zip(costs[way], costs["vLLM"], events[way], events["vLLM"], strict=True)
    ratios = [a / b for a, b, ours, theirs in rounds if abs(ours - theirs) <= SAME_EVENTS * theirs]
    assert len(ratios) >= len(costs[way]) / 3, "the machine is too busy: events were put together"
    return ratios


@pytest.mark.timeout(1800)
def test_front_end(tiny_folder, report):
    """CPU time of the process that a request costs, the engine's process left out on both sides:
    the median of each round's ratio, for what else the machine does slows all of a round."""
    rows, ratios = {}, {}
    with attached(tiny_folder) as own, vllms_own(tiny_folder) as vllm:
        for kind in KINDS:
            costs, events = measure(kind, own, vllm, ROUNDS[kind])
            for way, found in costs.items():
                rows[f"{kind}, {way}"] = spread(found, "ms")
            for way, limit in LIMITS.items():
                each = compared(costs, events, way)
                ratios[kind, way] = statistics.median(each)
                rows[f"{kind}, {way} / vLLM (at most {limit})"] = spread(each)
                rows[f"{kind}, {way} / vLLM, rounds"] = len(each)
            if KINDS[kind][3]:
                rows[f"{kind}: events of an answer"] = ", ".join(
                    f"{way} {statistics.mean(found):.1f}" for way, found in events.items()
                )
    report(rows)
    for (kind, way), ratio in ratios.items():
        assert ratio <= LIMITS[way], (kind, way)
