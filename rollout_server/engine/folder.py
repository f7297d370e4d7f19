"""The folder that vLLM is started from: a config and a tokenizer, no weights.

vLLM wants a path. What it reads there is written from the objects in memory, so a model that was
never saved can be served; its weights arrive later, from the trainer.
"""

import json
import os
from typing import Any

from rollout_server.errors import UnsupportedModelError


def write_model_folder(path: str, model: Any, tokenizer: Any, dtype: str) -> None:
    """Write `config.json` and the tokenizer's (or processor's) files into the folder `path`.

    model: the bare module (no DDP or FSDP wrapper around it) with a `transformers` config.
    tokenizer: a `transformers` tokenizer or processor, chat template included.
    dtype: name of the dtype the engine computes in.
    """
    config = getattr(model, "config", None)
    if config is None or not hasattr(config, "to_dict"):
        raise UnsupportedModelError(
            f"{type(model).__name__} has no `config` of transformers, from which vLLM learns the "
            "architecture; attach a transformers model, or set `model.config`"
        )
    if not hasattr(tokenizer, "save_pretrained"):
        raise UnsupportedModelError(
            f"the tokenizer is a {type(tokenizer).__name__}; give a transformers tokenizer or "
            "processor (for a trainer: its processing_class)"
        )
    tokenizer.save_pretrained(path)
    fields = config.to_dict()
    # Absent in a model that was built in memory; vLLM picks its class by it.
    fields["architectures"] = config.architectures or [type(model).__name__]
    fields["dtype"] = dtype
    # The policy's weights come as they are in memory, whatever file they once came from.
    fields.pop("quantization_config", None)
    _write(path, "config.json", fields)
    # Where generation ends; vLLM is told to take nothing else from it.
    generation = getattr(model, "generation_config", None)
    ends = getattr(generation, "eos_token_id", None)
    if ends is None:
        ends = fields.get("eos_token_id")
    _write(path, "generation_config.json", {} if ends is None else {"eos_token_id": ends})


def _write(path: str, name: str, fields: dict) -> None:
    with open(os.path.join(path, name), "w", encoding="utf-8") as f:
        json.dump(fields, f, default=str)
