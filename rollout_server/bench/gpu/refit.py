"""The weights into the engine, by all ways of `bench refit`, against a copy on the device."""

from collections.abc import Mapping
from typing import Any

from rollout_server.bench import model, refit
from rollout_server.bench.gpu.findings import Findings
from rollout_server.bench.gpu.scale import MIB, NO_GPU, Scale

_NAMES = {
    "planned": "sync_weights(), plan",
    "wake": "the same, waking an engine that sleeps",
    "layerwise": "vLLM's layerwise reload",
    "per-parameter": "load_weights, a call for each tensor",
    "ipc": "vLLM's own transfer, ipc",
    "share": "sync_weights(), share",
}
_NOISE = 48 * MIB  # of host memory that two engines of one kind differ by


def measure(scale: Scale, found: Findings) -> None:
    """All of them in one run."""
    sizes = {"vocab": scale.of(32000, 128000)}  # tiny but for this: some bytes are to be seen
    policy = model.random_model(scale.of("7b", "tiny"), sizes, scale.dtype, scale.device)
    result = refit.refit("policy", policy, model.tokenizer(), rounds=scale.of(20, 6))
    memcpy, nbytes = result["ways"]["memcpy"]["median"], result["model"]["bytes"]
    found.figure("bytes of the weights", nbytes, "bytes")
    for way, name in _NAMES.items():
        if way in result["ways"]:
            told = result["ways"][way]
            found.figure(name, told["median"], "s", "a copy of the bytes on the device", memcpy)
        elif way == "ipc" and not scale.on_gpu:
            found.skip(name, "CUDA IPC: " + NO_GPU)
        else:
            found.check(name, False, result["errors"].get(way, "not measured"))
    _memory(scale, found, result["memory"], nbytes)


def _memory(scale: Scale, found: Findings, memory: Mapping[str, Any], nbytes: int) -> None:
    """How much less `share` holds than an engine with weights of its own."""
    where = "device" if scale.on_gpu else "together"
    two, one = (memory[f"{how}, awake"][where] for how in ("two copies", "share"))
    found.figure("less memory with share, awake", two - one, "bytes", "the weights", nbytes)
    saved = two - one >= 0.9 * nbytes - (0 if scale.on_gpu else _NOISE)
    found.check("share is one copy", saved, f"{(two - one) / nbytes:.2f} of the weights less")
