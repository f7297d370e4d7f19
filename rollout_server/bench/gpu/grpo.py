"""GRPO steps an hour with TRL: an attached server, and TRL's own colocated vLLM with sleep.

The same model, data, seed, reward and settings, one after the other, each in a process of its own,
since TRL's vLLM lives in the trainer's.
"""

import importlib
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

from rollout_server.bench import model as models
from rollout_server.bench.gpu.companion import Companion
from rollout_server.bench.gpu.findings import Findings
from rollout_server.bench.gpu.scale import MIB, Scale

_WARM = 2  # steps that don't count: the first of each compiles, loads, allocates
_LONG = 300.0  # seconds for one way
_SHARE = 0.3  # of the GPU, for either engine
_RATIO = "sampling/importance_sampling_ratio/mean"
_THEIRS = "TRL's own colocated vLLM with sleep"


def measure(scale: Scale, found: Findings) -> None:
    """Each way trains the same number of steps."""
    with tempfile.TemporaryDirectory(prefix="rollout_server-bench-") as folder:
        told = {"ours": _way(folder, scale.tiny, "attached")}
        if scale.on_gpu:
            with found.step(f"{_THEIRS} trains"):
                told["theirs"] = _way(folder, scale.tiny, "colocate")
        else:
            found.skip(_THEIRS, "vLLM's CPU build has no sleep mode, which TRL's colocate needs")
    hourly = {way: 3600 / statistics.median(one["seconds"]) for way, one in told.items()}
    ours, theirs = told["ours"], told.get("theirs")
    against = _THEIRS if theirs else ""
    found.figure("steps an hour, attached", hourly["ours"], "", against, hourly.get("theirs"))
    reward = theirs["rewards"][-1] if theirs else None
    found.figure("reward of the last step, attached", ours["rewards"][-1], "", against, reward)
    found.check("each step was trained", len(ours["rewards"]) == scale.of(8, 3), ours["rewards"])
    found.check("the policy has changed", ours["changed"] > 0, ours["changed"])
    ratios = ours["ratios"]
    found.check(f"TRL logs {_RATIO}", len(ratios) == len(ours["rewards"]), ratios)
    found.check("importance ratios are near 1", all(0.9 < r < 1.1 for r in ratios), ratios)


def _way(folder: str, tiny: bool, way: str) -> dict[str, Any]:
    with Companion("rollout_server.bench.gpu.grpo:Training", {"tiny": tiny}) as training:
        training.ready(_LONG)
        told: dict[str, Any] = training.ask((folder, way), _LONG)
    return told


def letters(completions: list[str], **_: Any) -> list[float]:
    """The reward: how many different characters a completion has."""
    return [float(len(set(text))) for text in completions]


class Training:
    """In a companion's process."""

    def __init__(self, tiny: bool):
        self._scale = Scale(tiny)

    def __call__(self, work: tuple[str, str]) -> dict[str, Any]:
        """Train; seconds: of the steps that count; rewards and ratios: of all; changed: how far the
        policy's weights have moved at most. The way is "attached" or "colocate"."""
        folder, way = work
        scale = self._scale
        policy = scale.policy("1b")
        before = [p.detach().clone() for p in policy.parameters()]
        if way == "colocate":  # TRL has its vLLM read a checkpoint
            policy.save_pretrained(folder)
            models.tokenizer(policy.config.vocab_size).save_pretrained(folder)
            policy.name_or_path = policy.config._name_or_path = folder
        trainer = _trainer(scale, policy, folder, way == "colocate")
        ends = _Ends()
        trainer.add_callback(ends.callback())
        if way == "attached":
            from rollout_server import attach

            sizes: dict[str, Any] = {"max_model_len": 512}
            if scale.on_gpu:
                sizes["gpu_memory_utilization"] = _SHARE
            else:
                sizes["kv_cache_memory_bytes"] = 64 * MIB
            with attach(trainer, progress=False, **sizes) as server:
                trainer.train()
                server.verify_weights()
        else:
            trainer.train()
        logs = trainer.state.log_history
        after = trainer.model.parameters()
        return {
            "seconds": ends.seconds()[_WARM:],
            "rewards": [log["reward"] for log in logs if "reward" in log],
            "ratios": [log[_RATIO] for log in logs if _RATIO in log],
            "changed": max(
                float((a - b.to(a.device)).abs().max()) for a, b in zip(after, before, strict=True)
            ),
        }


def _trainer(scale: Scale, policy: Any, folder: str, colocate: bool) -> Any:
    from datasets import Dataset

    trl: Any = importlib.import_module("trl")  # it exports lazily
    batch = scale.of(32, 4)
    settings: dict[str, Any] = {
        "output_dir": str(Path(folder) / "out"),
        "report_to": [],
        "save_strategy": "no",
        "logging_steps": 1,
        "disable_tqdm": True,
        "seed": 7,
        "max_steps": scale.of(8, 3),
        "per_device_train_batch_size": batch,
        "num_generations": 4,
        "max_completion_length": scale.of(128, 8),
        "learning_rate": 1e-4,
        "bf16": scale.on_gpu,
        "use_cpu": not scale.on_gpu,
        "gradient_checkpointing": False,
    }
    if colocate:
        settings |= {
            "use_vllm": True,
            "vllm_mode": "colocate",
            "vllm_enable_sleep_mode": True,
            "vllm_gpu_memory_utilization": _SHARE,
            "vllm_max_model_length": 512,
        }
    return trl.GRPOTrainer(
        model=policy,
        args=trl.GRPOConfig(**settings),
        train_dataset=Dataset.from_list([{"prompt": f"Say {i}"} for i in range(64)]),
        reward_funcs=letters,
        processing_class=models.tokenizer(policy.config.vocab_size),
    )


class _Ends:
    """When each step ended."""

    def __init__(self) -> None:
        self._at: list[float] = []

    def callback(self) -> Any:
        from transformers import TrainerCallback

        at = self._at

        class Noting(TrainerCallback):
            def on_train_begin(self, *_: Any, **__: Any) -> None:
                at.append(time.perf_counter())

            def on_step_end(self, *_: Any, **__: Any) -> None:
                at.append(time.perf_counter())

        return Noting()

    def seconds(self) -> list[float]:
        return [end - start for start, end in zip(self._at, self._at[1:], strict=False)]
