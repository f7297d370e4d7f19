"""Sleep and wake: how long, and what of the memory comes back."""

import functools
import statistics
from typing import Any

import torch

from rollout_server.bench.gpu.findings import Findings
from rollout_server.bench.gpu.scale import (
    MIB,
    PROMPT,
    Scale,
    device_bytes,
    greedy,
    seconds,
    weight_bytes,
)
from rollout_server.bench.memory import memory

_GROWTH = 16 * MIB


def measure(scale: Scale, found: Findings) -> None:
    """Of an engine with graphs, of a 7 B-shaped model."""
    policy = scale.policy("7b")
    copying = _copying(policy)
    with scale.attach(policy) as server:

        def held() -> int:
            return device_bytes() if scale.on_gpu else memory(server.engine_pid)["engine"]

        before, engine = greedy(server, PROMPT), server.memory()
        theirs = engine["weights"] + engine["kv_cache"]
        awake, asleep, sleeps, wakes, answers = held(), [], [], [], []
        for _ in range(scale.of(10, 3)):
            sleeps.append(seconds(server.sleep))
            asleep.append(held())
            wakes.append(seconds(server.wake))
            answers.append(greedy(server, PROMPT).ids)
    copy = "a copy of the weights on the device"
    found.figure("sleep()", statistics.median(sleeps), "s", copy, copying)
    found.figure("wake(), the weights with it", statistics.median(wakes), "s", copy, copying)
    what = "memory given back asleep"
    found.figure(what, awake - asleep[0], "bytes", "weights and KV cache", theirs)
    found.check("weights aren't less than the policy's", engine["weights"] >= weight_bytes(policy))
    share = (awake - asleep[0]) / theirs
    found.check("nearly all of it is given back", share >= 0.95, f"{share:.3f}")
    growth = max(asleep) - asleep[0]
    found.check("no more is kept with each sleep", growth <= _GROWTH, f"{growth} bytes")
    found.check("the same answers after each wake", all(a == before.ids for a in answers))


def _copying(policy: Any) -> float:
    """Seconds for the policy's weights from one place on the device to another."""
    parameters = [p.detach() for p in policy.parameters()]
    copies = [p.clone() for p in parameters]
    copying = functools.partial(torch._foreach_copy_, copies, parameters)
    return min(seconds(copying) for _ in range(3))
