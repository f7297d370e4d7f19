"""Figures of a benchmark as a dict, and the dict as JSON and Markdown."""

import json
import os
import platform
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from rollout_server.vllm_compat import require_vllm


class Sample(NamedTuple):
    """Seconds, and those of the memcpy of the same round."""

    seconds: float
    memcpy: float


def machine(device: str) -> dict[str, Any]:
    """What ran it."""
    told: dict[str, Any] = {"cores": len(os.sched_getaffinity(0)), "processor": processor()}
    if device != "cpu":
        told["gpu"] = torch.cuda.get_device_name()
    versions = {"python": platform.python_version(), "torch": torch.__version__}
    return told | {"threads": torch.get_num_threads()} | versions | {"vllm": require_vllm()}


def processor() -> str:
    """What the system calls it."""
    with open("/proc/cpuinfo", encoding="utf-8") as f:
        names = [line.split(":", 1)[1].strip() for line in f if line.startswith("model name")]
    return names[0] if names else platform.machine()


def figures(samples: Mapping[str, Sequence[Sample]], nbytes: int) -> dict[str, dict[str, Any]]:
    """Of each way: minimum, median, maximum; GB/s of the median, each byte counted once; and
    ratios to a memcpy: of the medians, of the minima, and the median of each round's ratio, which
    a noisy machine disturbs least."""
    told = {}
    for way, pairs in samples.items():
        seconds, base = zip(*pairs, strict=True)
        middle = statistics.median(seconds)
        told[way] = {
            "minimum": min(seconds),
            "median": middle,
            "maximum": max(seconds),
            "rounds": len(seconds),
            "gigabytes_per_second": nbytes / middle / 1e9,
            "medians_ratio": middle / statistics.median(base),
            "minima_ratio": min(seconds) / min(base),
            "rounds_ratio": statistics.median(s / b for s, b in pairs),
            "seconds": list(seconds),
        }
    return told


def markdown(result: Mapping[str, Any]) -> str:
    """The tables."""
    model, lines = result["model"], []
    lines.append(
        f"{model['name']}: {model['parameters'] / 1e6:.1f} M parameters, {model['dtype']}, "
        f"{model['bytes'] / 1e9:.3f} GB in {model['tensors']} tensors"
    )
    lines += ["", ", ".join(f"{k} {v}" for k, v in result["machine"].items()), ""]
    heads: tuple[str, ...] = ("way", "minimum s", "median s", "maximum s", "rounds", "GB/s")
    heads += ("/ memcpy: medians", "minima", "median of rounds")
    lines += table_row(*heads) + table_rule(len(heads))
    for way, told in result["ways"].items():
        times = [f"{told[n]:.5f}" for n in ("minimum", "median", "maximum")]
        ratios = [f"{told[n]:.3f}" for n in ("medians_ratio", "minima_ratio", "rounds_ratio")]
        rate = f"{told['gigabytes_per_second']:.2f}"
        lines += table_row(way, *times, told["rounds"], rate, *ratios)
    columns = list(dict.fromkeys(name for row in result["memory"].values() for name in row))
    lines += ["", "Memory in MiB; trainer and engine: proportional set size on the host", ""]
    lines += table_row("", *columns) + table_rule(1 + len(columns))
    for what, row in result["memory"].items():
        lines += table_row(what, *(f"{row[n] / 2**20:.0f}" if n in row else "" for n in columns))
    for way, why in result["errors"].items():
        lines += ["", f"{way} failed: {why}"]
    return "\n".join(lines) + "\n"


def write(result: Mapping[str, Any], folder: Path, name: str) -> list[Path]:
    """The files: JSON, and Markdown."""
    folder.mkdir(parents=True, exist_ok=True)
    texts = {".json": json.dumps(result, indent=1), ".md": markdown(result)}
    paths = []
    for ending, text in texts.items():
        paths.append(folder / (name + ending))
        paths[-1].write_text(text, encoding="utf-8")
    return paths


def table_row(*cells: Any) -> list[str]:
    """Of a table in Markdown."""
    return ["| " + " | ".join(map(str, cells)) + " |"]


def table_rule(count: int) -> list[str]:
    """What stands under its head of `count` cells."""
    return ["|" + " --- |" * count]
