"""Settings of a TRL trainer that an attached server can't serve: refused at `attach`, by name."""

import inspect
import itertools
import warnings
from collections.abc import Mapping
from typing import Any

from transformers import GenerationConfig

from rollout_server import vllm_compat as compat
from rollout_server.config import RolloutConfig
from rollout_server.engine.sampling import sampling_params
from rollout_server.engine.spawn import quiet_front_end
from rollout_server.errors import NotAvailableError, SamplingError, TrainerError

from .trl_generation import brings_tools, generation_fields, sampling_of, sees_images

# Trainers that generate, and how.
_OTHERS = {
    "AsyncGRPOTrainer": "trains on what a vLLM server of its own generates meanwhile",
    "OnlineDPOTrainer": "asks for pairs of completions by code of its own",
}
_IMAGES = ("image", "images")
# Of `generation_kwargs`: what the trainer has another field for.
_ELSEWHERE = {
    "max_new_tokens": "set max_completion_length in the trainer's config",
    "num_return_sequences": "set num_generations in the trainer's config",
    "n": "prompts come repeated already; set num_generations in the trainer's config",
    "seed": "with one seed all completions of a prompt would be the same; set the config's seed",
}
# Fields that make another distribution than the policy's of it, and their values that don't.
_WHOLE: dict[str, tuple[Any, ...]] = {
    "top_p": (1, None),
    "top_k": (0, -1, None),
    "min_p": (0, None),
    "min_tokens": (0, None),
    "bad_words": ([], None),
    "allowed_token_ids": (None,),
    "repetition_penalty": (1, None),
    "presence_penalty": (0, None),
    "frequency_penalty": (0, None),
    "logit_bias": ({}, None),
}


def check(trainer: Any, config: RolloutConfig) -> None:
    """Raise unless the trainer can have its completions from the engine; warn where it is biased.

    config: of the server that is to be attached.
    """
    kind = type(trainer).__name__
    if not hasattr(trainer, "_generate_single_turn") or not hasattr(trainer, "use_vllm"):
        _refuse_kind(trainer, kind)
    if trainer.use_vllm:
        raise TrainerError(
            f"the {kind} was made with use_vllm=True and has an engine already; set "
            "use_vllm=False in its config: attach() gives it one"
        )
    for name in ("use_transformers_continuous_batching", "use_transformers_paged"):
        if getattr(trainer, name, None) or getattr(trainer.args, name, None):
            raise TrainerError(
                f"{name}=True in the {kind}'s config asks for another generator; set it to False"
            )
    for method in ("_generate", "_generate_and_score_completions"):
        if not inspect.ismethod(getattr(trainer, method, None)):
            raise TrainerError(f"{kind} has no {method}(); TRL 1.0 or later is needed")
    _check_images(trainer)
    _check_generation_kwargs(trainer)
    if getattr(trainer, "vllm_importance_sampling_correction", False):
        _check_importance_sampling(trainer, config)
    _warn_of_bias(trainer)


def check_rollout(trainer: Any, config: RolloutConfig) -> None:
    kind = type(trainer).__name__
    if not hasattr(trainer, "rollout_func"):
        raise TrainerError(f"rollout=: a {kind} takes no rollouts of agents; use a GRPOTrainer")
    if trainer.rollout_func is not None or getattr(trainer, "tools", None):
        raise TrainerError(
            f"rollout=: the {kind} has rollouts of its own (rollout_func or tools); leave them out"
        )
    if config.tensor_parallel > 1:
        raise NotAvailableError(
            "rollout= with engine_args['tensor_parallel_size'] above 1 isn't available in this "
            "version; leave that out"
        )
    if (where := _images_of(trainer)) is not None:
        raise NotAvailableError(
            f"rollout=: {where}, with which the rows of an agent can't be trained in this version; "
            "leave that column out"
        )


def _check_importance_sampling(trainer: Any, config: RolloutConfig) -> None:
    """What TRL's constructor checks where it is told that it has vLLM."""
    mode = trainer.vllm_importance_sampling_mode
    allowed = ("token_truncate", "token_mask", "sequence_truncate", "sequence_mask")
    if mode not in allowed:
        raise TrainerError(
            f"vllm_importance_sampling_mode={mode!r}: give one of {', '.join(map(repr, allowed))}"
        )
    if getattr(trainer, "loss_type", None) == "vespo" and not mode.startswith("token_"):
        raise TrainerError(
            f"vllm_importance_sampling_mode={mode!r}: loss_type='vespo' needs 'token_truncate' or "
            "'token_mask'"
        )
    reported = config.engine_args.get("logprobs_mode", "processed_logprobs")
    if reported != "processed_logprobs":
        warnings.warn(
            f"engine_args sets logprobs_mode={reported!r}, which biases the importance sampling "
            "correction; leave it out, or set vllm_importance_sampling_correction=False",
            stacklevel=3,
        )


def _refuse_kind(trainer: Any, kind: str) -> None:
    own = next((_OTHERS[c.__name__] for c in type(trainer).__mro__ if c.__name__ in _OTHERS), None)
    if own is None and not any(hasattr(trainer.args, f) for f in ("use_vllm", "max_new_tokens")):
        raise TrainerError(
            f"{kind} doesn't generate while it trains; attach a GRPOTrainer or RLOOTrainer"
        )
    raise NotAvailableError(
        f"{kind} {own or 'generates by code of its own'}, which an engine of attach() can't take "
        "the place of in this version; train with a GRPOTrainer or RLOOTrainer, or with a loop of "
        "your own: attach(model, tokenizer), server.generate() and server.sync_weights()"
    )


def _check_images(trainer: Any) -> None:
    """By the columns of the data sets, and by their first prompts."""
    if (where := _images_of(trainer)) is None:
        return
    if not sees_images(trainer):
        kind = type(trainer.processing_class).__name__
        raise TrainerError(
            f"{where}, and the trainer's processing_class is a {kind}, which takes none; give the "
            "model's processor, or leave that column out"
        )
    if brings_tools(trainer):
        raise NotAvailableError(
            f"{where}, and the trainer has tools or environments, beside which images aren't "
            "available in this version; leave either out"
        )


def _images_of(trainer: Any) -> str | None:
    """Which of the data sets holds images, and where."""
    for name in ("train_dataset", "eval_dataset"):
        given: Any = getattr(trainer, name, None)
        for data in given.values() if isinstance(given, Mapping) else [given]:
            columns = getattr(data, "column_names", None) or ()
            found = [column for column in _IMAGES if column in columns]
            if not found and "prompt" in columns and hasattr(data, "__getitem__") and len(data):
                found = ["prompt"] if _holds_image(data[0]["prompt"]) else []
            if found:
                return f"{name} holds images in its column {found[0]!r}"
    return None


def _holds_image(prompt: Any) -> bool:
    messages = prompt if isinstance(prompt, list) else ()
    contents = [m.get("content") for m in messages if isinstance(m, Mapping)]
    parts = itertools.chain(*(c for c in contents if isinstance(c, list)))
    return any(isinstance(p, Mapping) and p.get("type") == "image" for p in parts)


def _check_generation_kwargs(trainer: Any) -> None:
    """Fields that vLLM has, and that leave one completion a prompt."""
    given = trainer.args.generation_kwargs or {}
    if not given:
        return
    for name, remedy in _ELSEWHERE.items():
        if given.get(name) is not None and not (name == "n" and given[name] == 1):
            raise TrainerError(f"generation_kwargs[{name!r}]={given[name]!r}: {remedy}")
    with quiet_front_end():
        compat.require_vllm()
        fields = generation_fields(trainer)
    try:
        sampling_params(fields)
    except SamplingError as error:
        theirs = [name for name in given if hasattr(GenerationConfig(), name)]
        hint = ""
        if theirs:
            hint = (
                f". {', '.join(map(repr, theirs))}: of Hugging Face's generate(), which doesn't "
                "sample here; leave out what vLLM's SamplingParams don't have"
            )
        raise TrainerError(f"generation_kwargs={given!r}: {error}{hint}") from error


def _warn_of_bias(trainer: Any) -> None:
    fields = sampling_of(trainer) | dict(trainer.args.generation_kwargs or {})
    biased = [n for n, plain in _WHOLE.items() if n in fields and fields[n] not in plain]
    if not biased:
        return
    text = (
        f"{', '.join(f'{n}={fields[n]!r}' for n in biased)}: completions are sampled from another "
        "distribution than the policy's own, which the trainer computes with. What is cut off is "
        "never sampled, and the importance ratio of what is kept is below 1; watch "
        "rollout/truncated_mass (see 'Cut-off sampling' in docs/trl.md)"
    )
    mode = getattr(trainer, "vllm_importance_sampling_mode", "")
    if getattr(trainer, "vllm_importance_sampling_correction", False) and "sequence" in mode:
        text += (
            f". With vllm_importance_sampling_mode={mode!r} the ratios of a whole completion are "
            "multiplied, so that long ones hardly count; use 'token_truncate'"
        )
    warnings.warn(text, stacklevel=5)
