"""What vLLM's engine is started with."""

import getpass
import importlib.util
import os
import re
import tempfile
from collections.abc import Mapping, Sequence
from typing import Any

from rollout_server import vllm_compat as compat
from rollout_server.config import RolloutConfig
from rollout_server.engine.gpu_memory import GIB, Need, shared_kv_cache, utilization
from rollout_server.engine.images import IMAGES
from rollout_server.engine.log import first_lines
from rollout_server.errors import ConfigError, OutOfMemoryError, UnsupportedModelError
from rollout_server.weights.wire import LOAD_FORMAT, STREAMED_BYTES

WORKER_EXTENSION = "rollout_server.worker.extension.WeightReceiver"
CPU_WORKER = "rollout_server.worker.cpu_worker.CpuWorker"

# How a chat template writes a tool call, and vLLM's parser of that form.
_TOOL_FORMS = (
    (r"<\|tool_calls_section_begin\|>", "kimi_k2"),
    (r"<function=", "qwen3_coder"),
    (r"\[TOOL_CALLS\]", "mistral"),
    (r"<\|python_tag\|>", "llama3_json"),
)


def engine_arguments(
    config: RolloutConfig,
    model: str,
    folder: str,
    names: list[str],
    dtype: str,
    sampling: Mapping[str, Any],
    seed: int,
    on_cpu: bool,
    device: int | None = None,
    need: Need = Need(),  # noqa: B008 - it is frozen
) -> dict[str, Any]:
    """Fields for vLLM's `AsyncEngineArgs`.

    model: the folder with the config and the tokenizer, whose path vLLM's compilation caches go by;
    folder: of the server; names: model names to serve under;
    sampling: defaults for fields that a request leaves out; device: the GPU, as torch counts it in
    this process; need: what the engine takes there besides its KV cache.
    """
    chosen: dict[str, Any] = {
        "model": model,
        "tokenizer": model,
        "served_model_name": names,
        # Weights come from the trainer before the first request: see worker/loader.py.
        "load_format": LOAD_FORMAT,
        "model_loader_extra_config": {"folder": folder, "share": config.colocate == "share"},
        "dtype": dtype,
        "seed": seed,
        # -1 fits the context to the KV cache.
        "max_model_len": config.max_model_len or -1,
        # Never the checkpoint's generation_config.json: requests would be sampled off-policy.
        "generation_config": "vllm",
        "override_generation_config": {k: v for k, v in sampling.items() if k != "max_tokens"},
        # Log-probabilities of the distribution that was sampled from.
        "logprobs_mode": "processed_logprobs",
        "enable_prefix_caching": True,
        # Prompts with images are token-exact; others' media haven't been proven to be.
        "limit_mm_per_prompt": {"image": IMAGES, "video": 0, "audio": 0},
        "mm_processor_cache_gb": 1,  # of the trainer's host memory, and of the engine's
        # Nothing is fetched for a request: vLLM takes an empty list for every domain.
        "allowed_media_domains": ["nowhere.invalid"],
        "worker_extension_cls": WORKER_EXTENSION,
        # A single worker is inside the engine's process: one process less.
        "distributed_executor_backend": "uni" if config.tensor_parallel == 1 else "mp",
    }
    if on_cpu:
        chosen |= {
            "worker_cls": CPU_WORKER,
            "enforce_eager": True,
            "kv_cache_memory_bytes": _cpu_kv_cache(config),
        }
    else:
        chosen |= {"enable_sleep_mode": config.colocate != "resident"} | _gpu_memory(
            config, device, need
        )
    if config.reasoning_parser is not None:
        chosen["reasoning_parser"] = config.reasoning_parser  # a grammar begins after reasoning
    if "load_format" in config.engine_args:
        raise ConfigError(
            f"engine_args: load_format={config.engine_args['load_format']!r}: the engine takes its "
            "weights from the trainer, whichever way they go later (sync_path); leave it out"
        )
    return chosen | dict(config.engine_args)


def vllm_config(arguments: Mapping[str, Any]) -> Any:
    """vLLM's `VllmConfig` for `AsyncEngineArgs` fields; `ConfigError` or `UnsupportedModelError` if
    it refuses them."""
    from vllm.engine.arg_utils import AsyncEngineArgs

    try:
        return AsyncEngineArgs(**arguments).create_engine_config()
    except TypeError as error:
        raise ConfigError(
            f"engine_args: vLLM's AsyncEngineArgs refuses a field: {error}"
        ) from error
    except compat.request_errors() as error:  # pydantic's ValidationError is a ValueError
        text = str(error)
        if "failed to be inspected" in text and importlib.util.find_spec("torchvision") is None:
            raise UnsupportedModelError(
                "vLLM's implementation of this architecture can't be imported, and torchvision, "
                "which most that see images import, isn't installed; install the build of "
                f"torchvision that belongs to your torch: {first_lines(text)}"
            ) from error
        if "rchitecture" in text:
            raise UnsupportedModelError(
                f"vLLM has no such architecture: {first_lines(text)}; serve a model whose class "
                "vLLM implements, or register yours with vllm.ModelRegistry"
            ) from error
        raise ConfigError(f"vLLM refuses the engine's options: {first_lines(text)}") from error


def device_name(device: int | None) -> str | None:
    """How CUDA_VISIBLE_DEVICES calls the GPU that torch counts as `device` in this process."""
    if device is None:
        return None
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    return visible.split(",")[device] if visible else str(device)


def engine_variables(
    on_cpu: bool, eager: bool, devices: Sequence[str | None], folder: str
) -> dict[str, str]:
    """Environment variables for the engine's processes.

    eager: whether vLLM compiles nothing; devices: `device_name` of each worker's; folder: for
    temporary files and sockets.
    """
    variables = {
        "VLLM_WORKER_MULTIPROC_METHOD": "spawn",
        "VLLM_NO_USAGE_STATS": os.environ.get("VLLM_NO_USAGE_STATS", "1"),
        "TOKENIZERS_PARALLELISM": "false",
    }
    # vLLM leaves sockets and files behind; this folder is removed with all of them. But what torch
    # compiles is kept for the next engine.
    variables["VLLM_RPC_BASE_PATH"] = variables["TMPDIR"] = folder
    compiled = os.path.join(tempfile.gettempdir(), f"torchinductor_{getpass.getuser()}")
    variables["TORCHINDUCTOR_CACHE_DIR"] = os.environ.get("TORCHINDUCTOR_CACHE_DIR", compiled)
    for name in ("PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF"):
        # vLLM's sleep doesn't work with expandable segments; the trainer may have them.
        settings = os.environ.get(name, "").split(",")
        kept = [s for s in settings if not s.strip().startswith("expandable_segments")]
        if kept != settings:
            variables[name] = ",".join(kept)
    if on_cpu:
        # vLLM moves the CPU worker into a further process where this is "1". `AsyncLLM` has its
        # engine in a process of its own whatever the variable says.
        variables["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
        variables["GLIBC_TUNABLES"] = glibc_tunables(os.environ.get("GLIBC_TUNABLES", ""))
        if eager:
            # vLLM compiles one small function of its sampler all the same; on a CPU the compiler's
            # start is seconds, and the function's time isn't seen.
            variables["TORCHDYNAMO_DISABLE"] = os.environ.get("TORCHDYNAMO_DISABLE", "1")
        if len(devices) > 1 and "VLLM_CPU_OMP_THREADS_BIND" not in os.environ:
            variables["VLLM_CPU_OMP_THREADS_BIND"] = _cores_of_each(len(devices))
    elif None not in devices:
        variables["CUDA_VISIBLE_DEVICES"] = ",".join(filter(None, devices))
    return variables


def glibc_tunables(given: str) -> str:
    """With glibc's bound for copies past the cache, unless that is `given`; elsewhere than on x86
    it has none, and doesn't mind. By default it is 3/4 of a cache that all cores share."""
    name = "glibc.cpu.x86_non_temporal_threshold"
    own = [] if name in given else [f"{name}={STREAMED_BYTES:#x}"]
    return ":".join([*filter(None, [given]), *own])


def _cores_of_each(workers: int) -> str:
    """vLLM itself wants a NUMA node for each worker."""
    cores = sorted(os.sched_getaffinity(0))
    each = len(cores) // workers
    if not each:
        return "nobind"
    lists = [cores[i * each : (i + 1) * each] for i in range(workers)]
    return "|".join(",".join(map(str, cores)) for cores in lists)


def tool_parser(config: RolloutConfig, chat_template: Any) -> str | None:
    """The name of vLLM's tool-call parser, told from the chat template where it is "auto".

    Hermes's form, `<tool_call>{...}</tool_call>`, where the template tells nothing: vLLM needs some
    parser even for a tool call that the request forces.
    """
    if config.tool_call_parser != "auto":
        return config.tool_call_parser
    for form, parser in _TOOL_FORMS:
        if isinstance(chat_template, str) and re.search(form, chat_template):
            return parser
    return "hermes"


def _cpu_kv_cache(config: RolloutConfig) -> int:
    import psutil

    free: int = psutil.virtual_memory().available
    wanted = config.kv_cache_memory_bytes
    if wanted is None:
        return min(GIB, free // 4)
    if wanted > free:
        raise OutOfMemoryError(
            f"kv_cache_memory_bytes={wanted}: only {free} bytes of memory are free; ask for less"
        )
    return wanted


def _gpu_memory(config: RolloutConfig, device: int | None, need: Need) -> dict[str, Any]:
    import torch

    if not torch.cuda.is_available():
        raise ConfigError(
            "vLLM's GPU build is installed but torch sees no GPU; install rollout_server[cpu] "
            "for a machine without one"
        )
    wanted, share = config.kv_cache_memory_bytes, config.gpu_memory_utilization
    if wanted is None and share is not None and config.colocate != "share":
        return {"gpu_memory_utilization": share}
    # Of the device by its name: the current one of this thread is another, where there are several.
    free, total = torch.cuda.mem_get_info(device)
    if config.colocate == "share":
        # vLLM would measure the trainer's weights, which move while it loads, as its own.
        wanted, share = wanted or shared_kv_cache(free, total, share, need), None
    # With a KV cache of a given size vLLM measures nothing, and still wants this share to be free:
    # its default, nearly all, never is beside a trainer.
    memory: dict[str, Any] = {"gpu_memory_utilization": utilization(free, total, share)}
    if wanted is not None:
        if wanted > free:
            raise OutOfMemoryError(
                f"kv_cache_memory_bytes={wanted}: only {free} bytes of GPU memory are free; "
                "ask for less"
            )
        memory["kv_cache_memory_bytes"] = wanted
    return memory
