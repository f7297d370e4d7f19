"""`server.close(); del model`: the device is as empty as before there was a model."""

import gc
from pathlib import Path

import psutil
import torch

from rollout_server.bench.gpu.findings import Findings
from rollout_server.bench.gpu.scale import (
    MIB,
    PROMPT,
    Scale,
    Trainer,
    device_bytes,
    greedy,
    quick,
    weight_bytes,
)

# Less than a CUDA context takes, and than a twentieth of the weights that are looked for.
_LEFT = 128 * MIB
_LEFT_SHARED = 64 << 10  # on a CPU, of tiny weights: libraries map a page or two


def measure(scale: Scale, found: Findings) -> None:
    """With an engine that has weights of its own, and with one that shares them."""
    bound = _LEFT if scale.on_gpu else _LEFT_SHARED
    what = "GPU memory" if scale.on_gpu else "shared memory"
    _trained(scale)  # kernels are loaded at their first use
    for colocate in ("sleep", "share"):
        before = _held(scale)
        weights, most, pid = _lived(scale, colocate)
        left = _held(scale) - before
        found.figure(f"{what} left, {colocate}", left, "bytes", "the weights", weights)
        seen = f"{left} bytes left of {most - before}"
        found.check(f"{colocate}: the weights were seen", most - before >= 0.9 * weights, seen)
        found.check(f"{colocate}: nothing is left", left <= bound, seen)
        found.check(f"{colocate}: the engine has ended", not psutil.pid_exists(pid))


def _trained(scale: Scale) -> None:
    Trainer(scale.policy("1b")).step()


def _lived(scale: Scale, colocate: str) -> tuple[int, int, int]:
    """(bytes of the weights, what was held with a server, the engine's process)."""
    policy = scale.policy("1b")
    trainer = Trainer(policy)
    with scale.attach(policy, colocate=colocate, **quick()) as server:
        greedy(server, PROMPT)
        server.sleep()
        trainer.step()
        server.wake()
        greedy(server, PROMPT)
        return weight_bytes(policy), _held(scale), server.engine_pid


def _held(scale: Scale) -> int:
    """In use on the device; on a CPU what this process has mapped together with others."""
    gc.collect()
    if scale.on_gpu:
        torch.cuda.ipc_collect()
        return device_bytes()
    total = 0
    for line in Path("/proc/self/maps").read_text(encoding="utf-8").splitlines():
        span, permissions, _, _, _, *name = line.split(None, 5)
        if permissions[3] == "s" and not _of_a_device("".join(name)):
            start, end = (int(part, 16) for part in span.split("-"))
            total += end - start
    return total


def _of_a_device(path: str) -> bool:
    return path.startswith("/dev/") and not path.startswith("/dev/shm/")
