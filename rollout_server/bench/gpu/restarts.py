"""Requests that run while the engine sleeps, or dies: they go on as if nothing had been."""

import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import torch

from rollout_server.bench.gpu.findings import Findings
from rollout_server.bench.gpu.killing import killed
from rollout_server.bench.gpu.scale import PROMPT, Scale, greedy, quick, seconds
from rollout_server.server import RolloutServer

_PATIENCE = 120.0  # seconds for a stream to begin, and to end


class Streams:
    """Greedy completions of several prompts, streamed by one client each."""

    def __init__(self, server: RolloutServer, number: int, tokens: int):
        self._server = server
        self._tokens = tokens
        self._pool = ThreadPoolExecutor(number)
        self.ids: list[list[int]] = [[] for _ in range(number)]
        self._under_way = [threading.Event() for _ in range(number)]
        self._done = [self._pool.submit(self._one, i) for i in range(number)]

    def _one(self, index: int) -> None:
        with self._server.openai() as client:
            for event in client.completions.create(
                model="policy",
                prompt=[*PROMPT, index + 1],
                stream=True,
                max_tokens=self._tokens,
                temperature=0,
                extra_body={"ignore_eos": True, "return_token_ids": True},
            ):
                for choice in event.choices:
                    self.ids[index] += choice.token_ids or []
                if self.ids[index]:
                    self._under_way[index].set()

    def wait_until_under_way(self) -> None:
        until = time.monotonic() + _PATIENCE
        for event in self._under_way:
            if not event.wait(max(0.0, until - time.monotonic())):
                raise TimeoutError(f"no token after {_PATIENCE:g} s")

    def told(self) -> int:
        """How many tokens have come so far."""
        return sum(len(ids) for ids in self.ids)

    def finish(self) -> list[list[int]]:
        for done in self._done:
            done.result(_PATIENCE)
        self._pool.shutdown()
        return self.ids


def measure(scale: Scale, found: Findings) -> None:
    """In fp32: greedy tokens don't hang on the last bit."""
    number, tokens = 4, scale.of(384, 200)
    policy = scale.policy("smollm2", torch.float32)
    attached: list[RolloutServer] = []
    attaching = seconds(lambda: attached.append(scale.attach(policy, **quick())))
    with attached[0] as server:
        known = greedy(server, PROMPT, 32)
        whole = Streams(server, number, tokens).finish()
        found.check("prompts have answers of their own", len({*map(tuple, whole)}) == number)
        apart = _disturbed(found, server, whole, "a sleep", lambda: _slept(found, server))
        found.figure("tokens told before the sleep", apart, "", "all of them", number * tokens)
        with found.step("an engine that dies while requests run"):
            taken: list[float] = []
            apart = _disturbed(found, server, whole, "a restart",
                               lambda: taken.append(killed(found, server, known)))  # fmt: skip
            found.figure("tokens told before the death", apart, "", "all of them", number * tokens)
            found.figure("SIGKILL to the next right answer", taken[0], "s", "attach()", attaching)


def _disturbed(
    found: Findings,
    server: RolloutServer,
    whole: list[list[int]],
    what: str,
    disturb: Callable[[], None],
) -> int:
    """How many tokens the streams had when they were disturbed."""
    streams = Streams(server, len(whole), len(whole[0]))
    streams.wait_until_under_way()
    before = streams.told()
    disturb()
    same = streams.finish() == whole
    some = 0 < before < len(whole) * len(whole[0])
    found.check(f"requests were running at {what}", some, f"{before} tokens were told")
    found.check(f"over {what} they go on with the same tokens", same)
    return before


def _slept(found: Findings, server: RolloutServer) -> None:
    server.sleep()
    running = server.metrics()["rollout_server_running_generations"]
    found.check("they wait while it sleeps", running > 0, f"{running:g} unfinished")
    time.sleep(0.5)
    server.wake()
