"""Tokens a second: clients through HTTP against `LLM.generate` of stock vLLM.

Both have the same model (random weights: what they are costs nothing), the same flags and, in each
of the rounds, which alternate, the same prompts. Both engines are there all the time; one works at
a time. The clients are in a process of their own, as an agent's are.
"""

import asyncio
import json
import random
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

from rollout_server.bench import model as models
from rollout_server.bench.gpu.companion import Companion
from rollout_server.bench.gpu.findings import Findings
from rollout_server.bench.gpu.scale import MIB, Scale
from rollout_server.bench.gpu.stock import model_folder

_HERE = "rollout_server.bench.gpu."
_START = 300.0  # seconds for stock vLLM to be there
_ROUND = 120.0  # seconds for one round


def measure(scale: Scale, found: Findings) -> None:
    """At 64 and at 256 clients."""
    numbers, tokens, rounds = scale.of((64, 256), (3, 8)), scale.of(128, 8), scale.of(3, 2)
    policy = scale.policy("1b")
    sizes = {"max_model_len": 1024, "kv_cache_memory_bytes": scale.of(8192, 64) * MIB}
    flags: dict[str, Any] = {"max_num_seqs": 256, "enable_prefix_caching": True}
    if not scale.on_gpu:
        flags["enforce_eager"] = True
    tokenizer = models.tokenizer(policy.config.vocab_size)
    stock = {"dtype": str(policy.dtype).removeprefix("torch."), "gpu": scale.on_gpu}
    with (
        model_folder(policy, tokenizer) as folder,
        Companion(_HERE + "stock:Stock", stock | sizes | flags | {"model": folder}) as llm,
        scale.attach(policy, engine_args=flags, **sizes) as server,
        Companion(_HERE + "http:Clients", {"url": server.base_url, "key": server.api_key}) as http,
    ):
        llm.ready(_START)
        http.ready(_ROUND)
        ways: dict[str, Callable[[Any], float]] = {
            "HTTP": lambda work: float(http.ask(work, _ROUND)),
            "LLM.generate": lambda work: float(llm.ask(work, _ROUND)),
        }
        for number in numbers:
            rates: dict[str, list[float]] = {way: [] for way in ways}
            for at in range(1 + rounds):
                prompts = _prompts(policy.config.vocab_size, number, at)
                for way, run in ways.items():
                    rate = number * tokens / run((prompts, tokens))
                    if at:  # not the first: it warms up
                        rates[way].append(rate)
            of_http, of_llm = (statistics.median(found) for found in rates.values())
            what = f"{number} clients through HTTP"
            found.figure(what, of_http, "tokens/s", "LLM.generate of stock vLLM", of_llm)
    if scale.tiny:
        found.skip("as many tokens a second as LLM.generate", "tiny models compute next to nothing")
        return
    ratios = [found.ratio(figure.what) for figure in found.figures]
    found.check("nearly as many tokens a second as LLM.generate", min(ratios) >= 0.9, ratios)


def _prompts(vocabulary: int, number: int, seed: int) -> list[list[int]]:
    """Other ones in each round, so that no cache helps."""
    draw = random.Random(f"{number} {seed}")
    return [draw.choices(range(10, vocabulary), k=draw.randrange(32, 128)) for _ in range(number)]


class Clients:
    """One for each prompt, all at once, with a connection each: bytes out, bytes in."""

    def __init__(self, url: str, key: str):
        address, _, base = url.removeprefix("http://").partition("/")
        self._host, _, port = address.rpartition(":")
        self._port = int(port)
        self._head = (
            f"POST /{base}/completions HTTP/1.1\r\nHost: {address}\r\nConnection: close\r\n"
            f"Authorization: Bearer {key}\r\nContent-Type: application/json\r\nContent-Length: "
        )

    def __call__(self, work: tuple[Sequence[list[int]], int]) -> float:
        """Seconds until all have all their tokens."""
        prompts, tokens = work
        bodies = [json.dumps(_asked(prompt, tokens)).encode() for prompt in prompts]
        started = time.perf_counter()
        answers = asyncio.run(self._ask_all(bodies))
        taken = time.perf_counter() - started
        for answer in answers:
            told = json.loads(answer)
            if told["usage"]["completion_tokens"] != tokens:
                raise ValueError(f"{told['usage']}, where {tokens} tokens were asked for")
        return taken

    async def _ask_all(self, bodies: Sequence[bytes]) -> list[bytes]:
        return await asyncio.gather(*map(self._ask, bodies))

    async def _ask(self, body: bytes) -> bytes:
        reader, writer = await asyncio.open_connection(self._host, self._port)
        writer.write(self._head.encode() + f"{len(body)}\r\n\r\n".encode() + body)
        head, _, answer = (await reader.read(-1)).partition(b"\r\n\r\n")
        writer.close()
        if b" 200 " not in head.split(b"\r\n", 1)[0]:
            raise ValueError(f"{head!r}: {answer[:500]!r}")
        return answer


def _asked(prompt: list[int], tokens: int) -> dict[str, Any]:
    return {
        "model": "policy",
        "prompt": prompt,
        "max_tokens": tokens,
        "temperature": 1.0,
        "logprobs": 0,
        "ignore_eos": True,
    }
