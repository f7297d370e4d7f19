"""The keys of vLLM's compilation caches for a model, as an engine of ours would have them.

As a script: `compiling.py FOLDER [ROPE_THETA]...` prints them as JSON, one line for each.
"""

import json
import sys
from pathlib import Path

from transformers import AutoModelForCausalLM, AutoTokenizer

from rollout_server import RolloutConfig
from rollout_server.engine.arguments import engine_arguments, engine_variables, vllm_config
from rollout_server.engine.folder import write_model_folder
from rollout_server.engine.spawn import engine_environment
from rollout_server.engine.temporary import TemporaryFolder


def cache_keys(folder, rope_theta=None):
    """What a server of the model in `folder` does up to vLLM's config, which compiles for it."""
    from vllm import envs
    from vllm.compilation.caching import aot_compile_hash_factors

    model = AutoModelForCausalLM.from_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    if rope_theta is not None:
        model.config.rope_parameters["rope_theta"] = rope_theta
    temporary = TemporaryFolder()
    try:
        path = temporary.model(
            lambda path: write_model_folder(path, model, tokenizer, "float32", False)
        )
        arguments = engine_arguments(
            RolloutConfig(kv_cache_memory_bytes=1 << 28),
            path, temporary.path, ["policy"], "float32", {"top_p": 1.0}, 0, True,
        )  # fmt: skip
        with engine_environment(engine_variables(True, False, [None], temporary.path)):
            config = vllm_config(arguments | {"enforce_eager": False})
            keys = {
                "model": config.model_config.compute_hash(),
                "config": config.compute_hash(),
                "variables": str(envs.compile_factors()),
                "ahead of time": str(aot_compile_hash_factors(config)),
            }
        files = [file.read_bytes() for file in Path(path).rglob("*") if file.is_file()]
        server_told = any(temporary.path.encode() in content for content in files)
    finally:
        temporary.remove()
    return {"path": path, "server": temporary.path, "server_told": server_told, "keys": keys}


if __name__ == "__main__":
    for theta in [None, *map(float, sys.argv[2:])]:
        print(json.dumps(cache_keys(sys.argv[1], theta)))
