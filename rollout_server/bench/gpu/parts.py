"""The parts, those of most worth first: it is the order in which they are run."""

from dataclasses import dataclass

# On a CPU a part is nearly all imports, which take many times as long where others want it too.
_TINY_DEADLINE = 300


@dataclass(frozen=True)
class Part:
    """target: "module:function", which takes a `Scale` and `Findings`.

    seconds: about what it takes on a GPU, and with tiny models on a CPU; with less than that left
    of the whole time it isn't begun. deadlines: seconds after which it is ended, of both.
    """

    name: str
    about: str
    target: str
    seconds: tuple[int, int]
    deadlines: tuple[int, int]


def _part(name: str, about: str, seconds: int, tiny: int, where: str = "") -> Part:
    target = f"rollout_server.bench.gpu.{where or f'{name}:measure'}"
    return Part(name, about, target, (seconds, tiny), (3 * seconds, _TINY_DEADLINE))


PARTS = (
    _part("refit", "a 7 B-shaped model's weights into the engine, by several ways", 90, 40),
    _part("sleep", "sleep and wake, and the memory that is given back", 50, 20),
    _part("http", "tokens a second through HTTP, beside vLLM's `LLM.generate`", 75, 45),
    _part("share", "one copy of the weights: graphs, a step, a restart", 60, 30),
    _part("grpo", "GRPO steps an hour, beside TRL's own colocated vLLM", 120, 30),
    _part("cycles", "train, sync, wake, generate, sleep, many times", 40, 25),
    _part("logprobs", "log-probabilities of trainer and engine, bf16 and fp32", 50, 40),
    _part("restarts", "requests over a sleep, and over the death of the engine", 45, 30),
    _part("closing", "close(), and the GPU is as empty as before", 50, 40),
    _part("experts", "a mixture of experts", 30, 25, "kinds:experts"),
    _part("layerwise", "weights that the engine quantises: vLLM's layerwise reload", 35, 25,
          "kinds:layerwise"),
    _part("fsdp", "FSDP2 on one rank", 30, 25, "kinds:fsdp"),
)  # fmt: skip
NAMES = tuple(part.name for part in PARTS)
