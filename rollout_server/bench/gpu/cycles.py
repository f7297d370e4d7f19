"""Train, sync, wake, generate, sleep, many times: nothing is left behind by a cycle."""

from rollout_server.bench.gpu.findings import Findings
from rollout_server.bench.gpu.scale import (
    MIB,
    NO_GPU,
    PROMPT,
    Scale,
    Trainer,
    difference,
    greedy,
    quick,
    seconds,
)
from rollout_server.bench.memory import memory

_BOUNDS = {"device": 16 * MIB, "together": 64 * MIB}
_NAMES = {"device": "GPU memory of both", "together": "host memory of both"}


def measure(scale: Scale, found: Findings) -> None:
    """Memory is looked at while the engine sleeps."""
    cycles, warm = scale.of(50, 6), scale.of(5, 3)
    policy = scale.policy("smollm2")
    trainer = Trainer(policy)
    marks: list[dict[str, int]] = []
    answers: set[tuple[float, ...]] = set()
    with scale.attach(policy, **quick()) as server:

        def cycle() -> None:
            server.sleep()
            trainer.step()
            server.wake()
            answers.add(tuple(greedy(server, PROMPT).logprobs))

        first = server.policy_version
        for _ in range(warm):
            cycle()
        taken = 0.0
        for _ in range(cycles - warm):
            taken += seconds(cycle)
            server.sleep()
            marks.append(memory(server.engine_pid))
        server.wake()
        versions, apart = server.policy_version - first, difference(policy, greedy(server, PROMPT))
        with found.step("the engine has the policy's weights in the end"):
            server.verify_weights()
    found.figure("seconds of a cycle", taken / (cycles - warm), "s")
    found.figure("cycles", cycles)
    found.check("each step is seen in the answers", len(answers) == cycles, len(answers))
    found.check("each is a version", versions > cycles, f"{versions} versions")
    found.check("trainer and engine agree in the end", apart < 0.1, f"{apart:.2g} nats apart")
    for where, bound in _BOUNDS.items():
        if where not in marks[0]:
            found.skip(_NAMES[where], NO_GPU)
            continue
        grown = max(mark[where] for mark in marks[1:]) - marks[0][where]
        after = f"what was held after {warm + 1} cycles"
        found.figure(f"{_NAMES[where]}, growth", grown, "bytes", after, marks[0][where])
        found.check(f"{_NAMES[where]} doesn't grow", grown <= bound, f"{grown} bytes")
