"""What several test files use, besides the fixtures."""

import asyncio
import statistics
import time

import inside
import torch

# Tests and benchmarks ask in the same way.
from rollout_server.bench.gpu.scale import greedy as greedy
from rollout_server.bench.gpu.scale import trainer_logprobs as trainer_logprobs

MIB = 1 << 20
PREFIX = "rollout_server_"  # of the names of our metrics


def eventually(condition, within=30.0):
    """What `condition()` gives, once that is true; fails if it isn't `within` so many seconds."""
    until = time.monotonic() + within
    while not (found := condition()):
        assert time.monotonic() < until, f"not within {within:g} s: {_told(condition)}"
        time.sleep(0.002)
    return found


async def soon(condition, within=30.0):
    """`eventually`, for a condition that this loop's own tasks bring about."""
    until = time.monotonic() + within
    while not (found := condition()):
        assert time.monotonic() < until, f"not within {within:g} s: {_told(condition)}"
        await asyncio.sleep(0.002)
    return found


def _told(condition):
    code = condition.__code__
    return f"{code.co_name} in {code.co_filename}, line {code.co_firstlineno}"


def held(server):
    """How many requests wait at the server's gate."""
    return server.metrics()["rollout_server_gate_held_requests"]


def running(server, but=()):
    """vLLM's states of what the engine generates."""
    states = inside.output_processor(server).request_states
    return [state for state in list(states.values()) if state not in but]


def under_way(server, but=()):
    """Of those `running`, the ones that have a token."""
    return [state for state in running(server, but) if state.stats.num_generation_tokens]


def every_call(server):
    """Each kind of call that the trainer makes, one after the other; awake afterwards."""
    server.wake()
    server.generate("And now", {"max_tokens": 2})
    server.sync_weights()
    server.sleep()
    server.wake()
    server.verify_weights()


def tiny_sizes(vocabulary, **others):
    """Sizes of a two-layer model, by the names of transformers' configs."""
    return (
        dict(
            vocab_size=vocabulary,
            hidden_size=128,
            intermediate_size=256,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=256,
        )
        | others
    )


def reward_length(completions, **_):
    """A reward function, as TRL calls them."""
    return [float(len(set(text)) % 7) for text in completions]


def trl_settings(folder, **options):
    """Fields of a TRL config for a few short steps on the CPU."""
    return (
        dict(
            output_dir=str(folder),
            use_cpu=True,
            bf16=False,
            report_to=[],
            save_strategy="no",
            logging_steps=1,
            learning_rate=1e-3,
            num_generations=4,
            max_completion_length=8,
            disable_tqdm=True,
        )
        | options
    )


def large_step(model, prompt_ids, seed):
    """One optimizer step with a large learning rate, on random targets."""
    torch.manual_seed(seed)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    ids = torch.randint(0, model.config.vocab_size, (2, 32)).to(model.device)
    model(ids, labels=ids).loss.backward()
    optimizer.step()
    optimizer.zero_grad()


def spread(values, unit=""):
    """'median (minimum to maximum) unit'."""
    low, middle, high = min(values), statistics.median(values), max(values)
    return f"{middle:.4g} ({low:.4g} to {high:.4g}) {unit}".rstrip()
