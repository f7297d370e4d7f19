"""Sampling fields, as the user names them, to vLLM's `SamplingParams`."""

import difflib
from collections.abc import Mapping
from typing import Any

from rollout_server.engine.compat import request_errors
from rollout_server.errors import SamplingError


def sampling_params(fields: Mapping[str, Any]) -> Any:
    """vLLM's `SamplingParams`; `SamplingError` names a field that it doesn't know or rejects."""
    from vllm import SamplingParams

    known = [name for name in SamplingParams.__struct_fields__ if not name.startswith("_")]
    for name in fields:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
            hint = f"did you mean {near[0]!r}?" if near else "see vLLM's SamplingParams"
            raise SamplingError(f"sampling field {name!r} is unknown; {hint}")
    try:
        return SamplingParams(**fields)
    except request_errors() as error:
        raise SamplingError(f"vLLM rejects the sampling fields {dict(fields)}: {error}") from error
