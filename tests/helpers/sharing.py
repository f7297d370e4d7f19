"""vLLM's model over a trainer's memory, in this process: the loader alone, without an engine."""

import contextlib
import tempfile
from types import SimpleNamespace

from rollout_server import RolloutConfig
from rollout_server.engine.arguments import engine_arguments, engine_variables, vllm_config
from rollout_server.engine.folder import write_model_folder
from rollout_server.engine.spawn import engine_environment
from rollout_server.weights.conversion import views_of
from rollout_server.weights.manifest import write_specs, write_views
from rollout_server.weights.shared import SharedWeights
from rollout_server.weights.sources.kinds import source_of


def initialise_vllm(config):
    """What a worker does once, before it loads a model."""
    from vllm.config import set_current_vllm_config
    from vllm.distributed import ensure_model_parallel_initialized, init_distributed_environment
    from vllm.model_executor.layers import utils as layer_utils

    from rollout_server.worker import cpu_worker

    layer_utils.dispatch_cpu_unquantized_gemm = cpu_worker._plain_gemm
    cpu_worker.keep_plain()
    with set_current_vllm_config(config), tempfile.NamedTemporaryFile() as file:
        init_distributed_environment(1, 0, f"file://{file.name}.store", 0, "gloo")
        ensure_model_parallel_initialized(1, 1)


@contextlib.contextmanager
def shared_load(policy, tokenizer, dtype="float32"):
    """vLLM's config of the policy, and a function that loads it with colocate="share"."""
    source = source_of(policy, "merge")
    with tempfile.TemporaryDirectory() as folder:
        untied = "lm_head.weight" in source.specs
        write_model_folder(folder, policy, tokenizer, dtype, untied)
        write_specs(folder, source.specs)
        write_views(folder, views_of(policy, source.specs))
        arguments = engine_arguments(
            RolloutConfig(colocate="share", kv_cache_memory_bytes=1 << 26, max_model_len=128),
            folder, folder, ["policy"], dtype, {}, 0, True,
        )  # fmt: skip
        with engine_environment(engine_variables(True, True, [None], folder)):
            config = vllm_config(arguments)
        shared = SharedWeights()

        def load():
            from vllm.config import set_current_vllm_config
            from vllm.model_executor.model_loader import get_model_loader

            with set_current_vllm_config(config), shared.answering(folder, source.tensors):
                loader = get_model_loader(config.load_config)
                return loader.load_model(vllm_config=config, model_config=config.model_config)

        yield SimpleNamespace(config=config, load=load, shared=shared, source=source)


def private_memory():
    """Bytes of this process's memory that no other shares."""
    with open("/proc/self/status", encoding="utf-8") as file:
        fields = dict(line.split(":", 1) for line in file)
    return int(fields["RssAnon"].split()[0]) * 1024


def apart(model, policy):
    """Names of vLLM's parameters that aren't in files that the policy's are in too. Addresses
    differ, since each is mapped twice."""
    mapped = []
    with open("/proc/self/maps", encoding="utf-8") as file:
        for line in file:
            addresses, _, _, _, inode, *_ = line.split()
            start, end = (int(address, 16) for address in addresses.split("-"))
            mapped.append((start, end, int(inode)))

    def inode(tensor):
        at = tensor.untyped_storage().data_ptr()
        return next((number for start, end, number in mapped if start <= at < end), 0)

    theirs = {inode(parameter) for parameter in policy.parameters()} - {0}
    return [name for name, p in model.named_parameters() if inode(p) not in theirs]
