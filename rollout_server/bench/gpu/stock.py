"""Stock vLLM in a companion's process: `LLM` as it comes, started from a folder without weights."""

import contextlib
import os
import tempfile
import time
from collections.abc import Iterator, Sequence
from typing import Any

from rollout_server.engine.folder import write_model_folder
from rollout_server.engine.log import start_error
from rollout_server.engine.sampling import token_prompt
from rollout_server.engine.spawn import engine_children


@contextlib.contextmanager
def model_folder(policy: Any, tokenizer: Any) -> Iterator[str]:
    """A folder with the policy's config and its tokenizer."""
    with tempfile.TemporaryDirectory(prefix="rollout_server-bench-") as folder:
        dtype = str(policy.dtype).removeprefix("torch.")
        write_model_folder(folder, policy, tokenizer, dtype, untied=False)
        yield folder


class Stock:
    """`LLM` with random weights."""

    def __init__(self, gpu: bool, **flags: Any):
        """gpu: whether vLLM is to be told not to look for much free memory; flags: `LLM`'s."""
        from vllm import LLM, SamplingParams

        if gpu:
            flags["gpu_memory_utilization"] = 0.1  # the KV cache has a size of its own
        log = os.path.join(flags["model"], "engine.log")
        try:
            with engine_children(log, {}, []):
                self._llm = LLM(
                    load_format="dummy",
                    generation_config="vllm",
                    logprobs_mode="processed_logprobs",
                    **flags,
                )
        except Exception as error:
            raise start_error(error, log) from error
        self._params = SamplingParams

    def __call__(self, work: tuple[Sequence[list[int]], int]) -> float:
        """Seconds for all prompts at once."""
        prompts, tokens = work
        params = self._params(temperature=1.0, max_tokens=tokens, ignore_eos=True, logprobs=0)
        asked = [token_prompt(ids) for ids in prompts]
        started = time.perf_counter()
        done = self._llm.generate(asked, params, use_tqdm=False)
        taken = time.perf_counter() - started
        for one in done:
            if len(one.outputs[0].token_ids) != tokens:
                raise ValueError(f"{len(one.outputs[0].token_ids)} tokens, not {tokens}")
        return taken
