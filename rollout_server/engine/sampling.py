"""What vLLM's engine is asked with: prompts of tokens, and `SamplingParams` of named fields."""

import difflib
from collections.abc import Mapping
from typing import Any

from rollout_server.errors import SamplingError
from rollout_server.vllm_compat import request_errors

# Fields by which a distribution isn't the model's own; as each is in `SamplingParams()`, it is.
_CHANGING = (
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "repetition_penalty",
    "presence_penalty",
    "frequency_penalty",
    "min_tokens",
    "bad_words",
    "logit_bias",
    "allowed_token_ids",
    "structured_outputs",
    "thinking_token_budget",
    "extra_args",
)


def neutral(params: Any) -> bool:
    """Whether `SamplingParams` sample from the model's own distribution, at temperature 1."""
    from vllm import SamplingParams

    other = SamplingParams()
    return all(getattr(params, f, None) == getattr(other, f, None) for f in _CHANGING)


def token_prompt(ids: list[int]) -> Any:
    """vLLM's prompt of token ids."""
    from vllm.inputs import tokens_input

    return tokens_input(ids)


def set_outputs(params: Any, kind: str) -> None:
    """Set what each output of a generation holds: what is new, "delta"; or all, once, "final"."""
    from vllm.sampling_params import RequestOutputKind

    kinds = {"delta": RequestOutputKind.DELTA, "final": RequestOutputKind.FINAL_ONLY}
    params.output_kind = kinds[kind]


def scoring_params() -> Any:
    """`SamplingParams` that score a prompt's tokens by the model alone, and sample one token, which
    vLLM insists on."""
    from vllm import SamplingParams

    params = SamplingParams(prompt_logprobs=0, max_tokens=1, temperature=0, detokenize=False)
    set_outputs(params, "final")
    return params


def structured_outputs(**fields: Any) -> Any:
    """vLLM's `StructuredOutputsParams`: one of `regex`, `json`, `choice`, `grammar`, ..."""
    from vllm.sampling_params import StructuredOutputsParams

    return StructuredOutputsParams(**fields)


def sampling_params(fields: Mapping[str, Any]) -> Any:
    """vLLM's `SamplingParams`; `SamplingError` names a field that it doesn't know or rejects."""
    import msgspec
    from vllm import SamplingParams

    known = [name for name in SamplingParams.__struct_fields__ if not name.startswith("_")]
    for name in fields:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
            hint = f"did you mean {near[0]!r}?" if near else "see vLLM's SamplingParams"
            raise SamplingError(f"sampling field {name!r} is unknown; {hint}")
    try:
        msgspec.msgpack.encode(dict(fields))  # as it will go to the engine
    except OverflowError as error:
        raise SamplingError(
            f"the sampling fields {dict(fields)} hold a number past 64 bits: {error}"
        ) from error
    except TypeError:  # vLLM's own encoder takes more
        pass
    try:
        return SamplingParams(**fields)
    except request_errors() as error:
        raise SamplingError(f"vLLM rejects the sampling fields {dict(fields)}: {error}") from error
