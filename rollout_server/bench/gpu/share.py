"""`colocate="share"`: graphs captured over the trainer's memory, a step, one copy, a restart."""

import time

import torch

from rollout_server.bench.gpu.findings import Findings
from rollout_server.bench.gpu.killing import killed
from rollout_server.bench.gpu.scale import (
    MIB,
    NO_GPU,
    PROMPT,
    Scale,
    Trainer,
    device_bytes,
    difference,
    greedy,
    trainer_logprobs,
    weight_bytes,
)
from rollout_server.server import RolloutServer

_RESTART_KEEPS = 128 * MIB


def measure(scale: Scale, found: Findings) -> None:
    """In fp32, so that greedy answers can be compared token by token."""
    policy = scale.policy("1b", torch.float32)
    weights, trainer = weight_bytes(policy), Trainer(policy, rate=1e-2)
    trainer.step()
    alone = device_bytes() if scale.on_gpu else 0
    started = time.perf_counter()
    with scale.attach(policy, colocate="share") as server:
        attaching = time.perf_counter() - started
        held = server.memory()
        found.check("the engine has no weights of its own", held["weights"] == 0, held["weights"])
        if scale.on_gpu:
            more = device_bytes() - alone - held["kv_cache"]
            found.figure("GPU memory that the engine adds to the KV cache's", more, "bytes",
                         "the weights", weights)  # fmt: skip
            found.check("one copy only", more < 0.5 * weights, f"{more / weights:.2f} of them more")
        else:
            found.skip("one copy only", "seen in the part `refit`; here it needs a GPU")
            found.skip("CUDA graphs", NO_GPU)
        _agree(found, "at first", policy, server)
        before = greedy(server, PROMPT)
        for number in (1, 2):
            trainer.step()
            report = server.sync_weights()
            moved = f"{report.path}, {report.bytes} bytes"
            found.check(f"step {number}: no bytes move", moved == "share, 0 bytes", moved)
            _agree(found, f"step {number}", policy, server)
            after = greedy(server, PROMPT)
            found.check(f"step {number} is seen", after.logprobs != before.logprobs)
            before = after
        _restarts(scale, found, server, attaching)
        _agree(found, "after the restart", policy, server)


def _agree(found: Findings, when: str, policy: torch.nn.Module, server: RolloutServer) -> None:
    """The engine's greedy tokens are the trainer's."""
    completion = greedy(server, PROMPT, 32)
    best = trainer_logprobs(policy, PROMPT, completion.ids).argmax(-1).tolist()
    same = sum(a == b for a, b in zip(completion.ids, best, strict=True))
    found.check(f"greedy tokens are the trainer's, {when}", same == 32, f"{same} of 32")
    apart = difference(policy, completion)
    found.check(f"so are their log-probabilities, {when}", apart < 1e-3, f"{apart:.2g} nats apart")


def _restarts(scale: Scale, found: Findings, server: RolloutServer, attaching: float) -> None:
    held = device_bytes() if scale.on_gpu else 0
    taken = killed(found, server, greedy(server, PROMPT, 32))
    found.figure("SIGKILL to the next right answer, share", taken, "s", "attach()", attaching)
    if scale.on_gpu:
        more = device_bytes() - held
        found.check("a restart leaves nothing behind", more <= _RESTART_KEEPS, f"{more} bytes more")
