"""Refit: how long it takes to bring the policy's weights into the engine, by several ways.

memcpy: the weights' bytes from one flat tensor to another, on the same device; the fastest of the
    ways in copies.py, all of which are run in each round.
planned: `sync_weights` of an engine that is awake, from the call to its return.
wake: the same of an engine that sleeps; its memory has to be brought back too.
layerwise: the same through vLLM's layerwise reload, of tensors that are in shared memory too.
per-parameter: vLLM's loader, a call to the engine for each tensor, as TRL's server mode does it;
    without pausing the engine, and nothing is sent but the name. What the loader leaves out is
    looked for, which costs two more passes over the weights.
ipc: vLLM's own weight transfer between processes on one GPU; without pausing the engine.
share: `sync_weights` where engine and policy have one memory.

Before anything is measured, each way has to bring changed weights over. Rounds of all ways are
interleaved, those of slow ways are fewer.
"""

import argparse
import contextlib
import functools
import os
import sys
import time
from collections.abc import Callable, Coroutine, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from rollout_server import attach
from rollout_server.bench import ipc, model, report
from rollout_server.bench.copies import Copies, environment
from rollout_server.bench.memory import memory
from rollout_server.server import RolloutServer
from rollout_server.weights.sources.base import policy_tensors
from rollout_server.weights.transport import Exporter
from rollout_server.weights.wire import Part, Piece

WAYS = ("planned", "wake", "layerwise", "per-parameter", "ipc", "share")
_SLOW = 5  # a slow way is run in one of so many rounds
_FIRST_PART = 1000  # numbers of the bench's parts; the server's begin at 0


@dataclass(frozen=True)
class Way:
    """`run` returns the seconds that count; every: in which rounds."""

    name: str
    run: Callable[[], float]
    every: int = 1


def add_options(parser: argparse.ArgumentParser) -> None:
    model.add_options(parser)
    parser.add_argument("--device", choices=("cpu", "cuda"), help="default: a GPU if there is one")
    parser.add_argument("--rounds", type=int, default=25)
    parser.add_argument(
        "--ways", nargs="+", choices=WAYS, default=WAYS, help="besides memcpy (all)"
    )
    parser.add_argument("--out", type=Path, default=Path("runs/bench"), metavar="FOLDER")


def main(given: argparse.Namespace) -> None:
    device = given.device or ("cuda" if torch.cuda.is_available() else "cpu")
    if device == "cpu" and os.environ != environment():  # the C library reads it at the start
        os.execve(sys.executable, sys.orig_argv, environment())
    name, policy, tokenizer = model.load(given, device)
    result = refit(name, policy, tokenizer, given.rounds, given.ways)
    print(report.markdown(result))
    for path in report.write(result, given.out, f"refit-{name}-{device}"):
        print(path)


def refit(
    name: str, policy: Any, tokenizer: Any, rounds: int, wanted: tuple[str, ...] = WAYS
) -> dict[str, Any]:
    """Measure the `wanted` ways; the figures, times in seconds and sizes in bytes."""
    tensors = policy_tensors(policy)
    nbytes = sum(t.numel() * t.element_size() for t in tensors.values())
    first = next(iter(tensors.values()))
    kept = {"trainer alone": memory()}
    errors: dict[str, str] = {}
    samples: dict[str, list[report.Sample]] = {}
    if any(way != "share" for way in wanted):
        with _attached(policy, tokenizer, wanted, errors) as (server, usable):
            kept |= _memory_of(server, "two copies")
            # In no variable: what the ways have given the engine would be held to the end.
            samples |= _measure(
                policy, server, _copying(server, policy, wanted, usable), nbytes, first, rounds
            )
    if "share" in wanted:
        with _attach(policy, tokenizer, colocate="share") as server:
            kept |= _memory_of(server, "share")
            ways = [Way("share", lambda: _seconds(server.sync_weights))]
            shared = _measure(policy, server, ways, nbytes, first, rounds)
            for way, more in shared.items():
                samples[way] = samples.get(way, []) + more
    return {
        "machine": report.machine(first.device.type),
        "model": {
            "name": name,
            "parameters": sum(t.numel() for t in tensors.values()),
            "tensors": len(tensors),
            "bytes": nbytes,
            "dtype": str(first.dtype).removeprefix("torch."),
        },
        "ways": report.figures(samples, nbytes),
        "memory": kept,
        "errors": errors,
    }


def _attach(policy: Any, tokenizer: Any, **options: Any) -> RolloutServer:
    """With a small KV cache and without CUDA graphs, which no refit uses."""
    options["engine_args"] = {"enforce_eager": True} | options.get("engine_args", {})
    return attach(
        policy,
        tokenizer,
        max_model_len=512,
        kv_cache_memory_bytes=256 << 20,
        progress=False,
        **options,
    )


@contextlib.contextmanager
def _attached(
    policy: Any, tokenizer: Any, wanted: tuple[str, ...], errors: dict[str, str]
) -> Iterator[tuple[RolloutServer, bool]]:
    """(server, whether vLLM's own transfer works there); errors: takes the reason if not."""
    server = None
    if "ipc" in wanted and next(policy.parameters()).is_cuda:
        try:
            with ipc.accepting_pickles():
                server = _attach(policy, tokenizer, engine_args=ipc.ENGINE_ARGS)
            with _resting(server) as at_rest:
                at_rest(ipc.initialise)
            _prove(Way("ipc", _ipc(server, policy)), policy, server)
        except Exception as error:
            errors["ipc"] = f"{type(error).__name__}: {error}"
            if server is not None:
                server.close()
            server = None
    usable = server is not None
    with server or _attach(policy, tokenizer) as server:
        yield server, usable


def _copying(
    server: RolloutServer, policy: Any, wanted: tuple[str, ...], usable: bool
) -> list[Way]:
    """The ways into an engine with weights of its own."""
    by_name = {
        "planned": Way("planned", lambda: _seconds(server.sync_weights)),
        "wake": Way("wake", functools.partial(_wake, server), _SLOW),
        "layerwise": Way("layerwise", functools.partial(_layerwise, server), _SLOW),
        "per-parameter": Way("per-parameter", _per_parameter(server, policy), _SLOW),
    }
    if usable:
        by_name["ipc"] = Way("ipc", _ipc(server, policy))
    return [by_name[name] for name in wanted if name in by_name]


def _measure(
    policy: Any,
    server: RolloutServer,
    ways: list[Way],
    nbytes: int,
    like: torch.Tensor,
    rounds: int,
) -> dict[str, list[report.Sample]]:
    for way in ways:
        _prove(way, policy, server)
    copies = Copies(nbytes, like)
    seconds: dict[str, list[tuple[int, float]]] = {way.name: [] for way in ways}
    for number in range(rounds):
        copies.measure()
        for way in ways:
            if number % way.every == 0:
                seconds[way.name].append((number, way.run()))
    base = copies.fastest
    told = {"memcpy": base} | {f"memcpy: {name}": each for name, each in copies.seconds.items()}
    rows = {name: list(enumerate(each)) for name, each in told.items()} | seconds
    return {
        name: [report.Sample(each, base[number]) for number, each in row]
        for name, row in rows.items()
    }


@torch.no_grad()
def _prove(way: Way, policy: Any, server: RolloutServer) -> None:
    """Change all parameters, and see that the way brings them over."""
    for parameter in policy.parameters():
        parameter.neg_()
    way.run()
    server.verify_weights()


def _wake(server: RolloutServer) -> float:
    server.sleep()
    return _seconds(server.wake)


def _layerwise(server: RolloutServer) -> float:
    usual = server._sync.sender.path
    server._sync.sender.path = "layerwise"
    try:
        return _seconds(server.sync_weights)
    finally:
        server._sync.sender.path = usual


def _per_parameter(server: RolloutServer, policy: Any) -> Callable[[], float]:
    exporter = Exporter()

    def run() -> float:
        messages = [
            exporter.export(Part(_FIRST_PART + number, True, [Piece(name, 0, tensor.detach())]))
            for number, (name, tensor) in enumerate(policy_tensors(policy).items())
        ]

        async def load(engine: Any) -> float:
            started = time.perf_counter()
            for number, message in enumerate(messages, 1):
                first, last = number == 1, number == len(messages)
                await engine.reload_weights(message, first, last, False)
            return time.perf_counter() - started

        with _resting(server) as at_rest:
            seconds: float = at_rest(load)
        return seconds

    return run


def _ipc(server: RolloutServer, policy: Any) -> Callable[[], float]:
    async def load(engine: Any) -> float:
        started = time.perf_counter()
        await ipc.transfer(engine, policy_tensors(policy))
        return time.perf_counter() - started

    def run() -> float:
        with _resting(server) as at_rest:
            seconds: float = at_rest(load)
        return seconds

    return run


@contextlib.contextmanager
def _resting(
    server: RolloutServer,
) -> Iterator[Callable[[Callable[[Any], Coroutine[Any, Any, Any]]], Any]]:
    """The engine is at rest meanwhile; takes functions that are given it, and awaits them."""

    def call(work: Any) -> Any:
        return server._loop.call(work, server._config.transition_time, "refit")

    sync = server._lifecycle.sync()

    async def write(work: Callable[[Any], Coroutine[Any, Any, Any]]) -> Any:
        async with sync.writing():
            return await work(server._engine)

    try:
        call(sync.begin())
        yield lambda work: call(write(work))
    except BaseException as error:
        call(sync.abort(error))
        raise
    call(sync.commit())


def _memory_of(server: RolloutServer, what: str) -> Mapping[str, dict[str, int]]:
    told = {f"{what}, awake": memory(server.engine_pid)}
    server.sleep()
    told[f"{what}, asleep"] = memory(server.engine_pid)
    server.wake()
    return told


def _seconds(work: Callable[[], Any]) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started
