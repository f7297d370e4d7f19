"""How large things are, on this device: models, KV caches, numbers of requests."""

import gc
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch

from rollout_server import attach
from rollout_server.bench import model as models
from rollout_server.completion import Completion
from rollout_server.server import RolloutServer

T = TypeVar("T")
MIB = 1 << 20
PROMPT = [21, 22, 23, 24]
NO_GPU = "it needs a GPU"
# Random models have next to no preferences: their answers would hang on the last bit. Larger
# weights give them some.
_SPREAD = 0.1


@dataclass(frozen=True)
class Scale:
    """tiny: models of some hundred kilobytes, as few rounds as show that a part works."""

    tiny: bool

    @property
    def on_gpu(self) -> bool:
        return torch.cuda.is_available()

    @property
    def device(self) -> str:
        return "cuda" if self.on_gpu else "cpu"

    @property
    def dtype(self) -> torch.dtype:
        """What one computes in there."""
        return torch.bfloat16 if self.on_gpu else torch.float32

    def of(self, full: T, tiny: T) -> T:
        return tiny if self.tiny else full

    def policy(self, preset: str, dtype: torch.dtype | None = None) -> Any:
        """A random model of that shape; a tiny one, if all are."""
        preset = self.of(preset, "tiny")
        return models.random_model(preset, {}, dtype or self.dtype, self.device, spread=_SPREAD)

    def attach(self, policy: Any, **options: Any) -> RolloutServer:
        """A server with a KV cache of a known size; graphs as vLLM has them by default."""
        kv_cache = self.of(4096, 512 if self.on_gpu else 64) * MIB
        chosen: dict[str, Any] = {
            "max_model_len": 512,
            "kv_cache_memory_bytes": kv_cache,
            "progress": False,
        }
        tokenizer = models.tokenizer(policy.config.vocab_size)
        return attach(policy, tokenizer, **chosen | options)


def quick(**options: Any) -> dict[str, Any]:
    """Options of an engine that compiles and captures nothing, for what doesn't hang on it."""
    return {"engine_args": {"enforce_eager": True}} | options


def greedy(server: RolloutServer, prompt_ids: Sequence[int], tokens: int = 12) -> Completion:
    """Greedy completion of token ids, its log-probabilities included."""
    (completion,) = server.generate(
        list(prompt_ids), {"temperature": 0, "max_tokens": tokens, "ignore_eos": True}
    )
    return completion


def trainer_logprobs(model: Any, prompt_ids: Sequence[int], ids: Sequence[int]) -> torch.Tensor:
    """The model's own log-softmax at each position of `ids` after `prompt_ids`: (T, vocabulary)."""
    with torch.no_grad():
        tokens = torch.tensor([list(prompt_ids) + list(ids)], device=model.device)
        logits: torch.Tensor = model(tokens).logits[0].float()
    return logits.log_softmax(-1)[len(prompt_ids) - 1 : -1]


def difference(model: Any, completion: Completion) -> float:
    """Mean absolute difference of the trainer's log-probabilities from the engine's, in nats."""
    own = trainer_logprobs(model, completion.prompt_ids, completion.ids).cpu()
    sampled = torch.tensor(completion.logprobs)
    return float((own[range(len(completion.ids)), completion.ids] - sampled).abs().mean())


class Trainer:
    """Steps on random tokens. One optimizer, whose state is there from the first step on."""

    def __init__(self, model: Any, rate: float = 1e-3):
        self._model = model
        self._optimizer = torch.optim.AdamW(model.parameters(), lr=rate)
        self._random = torch.Generator().manual_seed(0)

    def step(self) -> None:
        model = self._model
        ids = torch.randint(0, model.config.vocab_size, (2, 32), generator=self._random)
        ids = ids.to(next(model.parameters()).device)
        model(input_ids=ids, labels=ids).loss.backward()
        self._optimizer.step()
        self._optimizer.zero_grad()


def weight_bytes(model: Any) -> int:
    """Each tensor once, where several are tied."""
    return sum(p.numel() * p.element_size() for p in model.parameters())


def device_bytes() -> int:
    """GPU memory in use, by whomever, once this process has given back what it doesn't need."""
    gc.collect()
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    free, total = torch.cuda.mem_get_info()
    return total - free


def seconds(work: Callable[[], Any]) -> float:
    """What it takes, the device's work included."""
    started = time.perf_counter()
    work()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - started
