"""The folder that vLLM is started from: a config, a tokenizer, names and shapes; no weights.

vLLM wants a path. What it reads there is written from the objects in memory, so a model that was
never saved can be served; its weights arrive later, from the trainer.
"""

import json
import os
from typing import Any

from rollout_server.errors import UnsupportedModelError


def write_model_folder(path: str, model: Any, tokenizer: Any, dtype: str, untied: bool) -> None:
    """Write `config.json` and the tokenizer's (or processor's) files into the folder `path`.

    model: the bare module (no DDP or FSDP wrapper around it) with a `transformers` config.
    tokenizer: a `transformers` tokenizer or processor, chat template included.
    dtype: name of the dtype the engine computes in.
    untied: whether lm_head has weights of its own, whatever the config says.
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
    if hasattr(config, "vision_config") and not hasattr(tokenizer, "image_processor"):
        raise UnsupportedModelError(
            f"{type(model).__name__} sees images, and a {type(tokenizer).__name__} can't prepare "
            "them, which vLLM asks for; give the model's processor (for a trainer: as its "
            "processing_class)"
        )
    tokenizer.save_pretrained(path)
    fields = config.to_dict()
    # Absent in a model that was built in memory; vLLM picks its class by it.
    fields["architectures"] = config.architectures or [_class_name(model)]
    fields["dtype"] = dtype
    # Where the model came from; vLLM puts the folder's own path there.
    fields.pop("_name_or_path", None)
    if untied:  # as when PEFT trains a copy of it
        fields["tie_word_embeddings"] = False
    # The policy's weights come as they are in memory, whatever file they once came from.
    fields.pop("quantization_config", None)
    _write(path, "config.json", fields)
    # Where generation ends; vLLM is told to take nothing else from it.
    generation = getattr(model, "generation_config", None)
    ends = getattr(generation, "eos_token_id", None)
    if ends is None:
        ends = fields.get("eos_token_id")
    _write(path, "generation_config.json", {} if ends is None else {"eos_token_id": ends})


def _class_name(model: Any) -> str:
    # FSDP2 makes a class of its own out of the model's.
    names = [c.__name__ for c in type(model).__mro__]
    return next(name for name in names if not name.startswith("FSDP"))


def _write(path: str, name: str, fields: Any) -> None:
    with open(os.path.join(path, name), "w", encoding="utf-8") as f:
        json.dump(fields, f, default=str)
