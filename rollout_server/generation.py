"""`RolloutServer.generate`: prompts of the training process, sampled without HTTP."""

import asyncio
import itertools
from collections.abc import Mapping, Sequence
from typing import Any

from rollout_server import vllm_compat as compat
from rollout_server.completion import (
    Completion,
    Prompt,
    images_in,
    prompt_list,
    require_decoded,
)
from rollout_server.concurrency.loop import LoopThread
from rollout_server.engine.protocol import EngineProtocol
from rollout_server.engine.sampling import sampling_params
from rollout_server.errors import (
    EngineDeadError,
    EngineStartError,
    PromptTooLongError,
    SamplingError,
    StateError,
)
from rollout_server.lifecycle.gate import Gate, GateTimeout
from rollout_server.lifecycle.lifecycle import Lifecycle
from rollout_server.lifecycle.state import State, StateBox
from rollout_server.sync.weight_sync import WeightSync


class Generation:
    """Samples on one engine, behind the gate that requests over HTTP pass too."""

    def __init__(
        self,
        engine: EngineProtocol,
        loop: LoopThread,
        gate: Gate,
        box: StateBox,
        lifecycle: Lifecycle,
        sync: WeightSync,
    ):
        self._engine = engine
        self._loop = loop
        self._gate = gate
        self._box = box
        self._lifecycle = lifecycle
        self._sync = sync
        self._numbers = itertools.count()

    def completions(
        self,
        prompts: Prompt | Sequence[Prompt],
        tokenizer: Any,
        fields: Mapping[str, Any],
        timeout: float,
        images: Sequence[Sequence[Any] | None] | None = None,
    ) -> list[Completion]:
        """See `RolloutServer.generate`; fields: of vLLM's `SamplingParams`; timeout: seconds."""
        ids = prompt_list(prompts, tokenizer)
        seen = images_in(prompts) if images is None else [list(of_one or ()) for of_one in images]
        if len(seen) != len(ids):
            raise SamplingError(
                f"images has {len(seen)} entries, prompts {len(ids)}; give a list for each prompt"
            )
        for at, of_one in enumerate(seen):
            require_decoded(f"prompts[{at}]", of_one)
        fields = dict(fields)
        sampling_params(fields)
        longest = max((len(p) for p in ids), default=0)
        room = self._engine.max_model_len
        if longest >= room:
            raise PromptTooLongError(
                f"a prompt has {longest} tokens, the engine's maximum context length is {room}; "
                "shorten it or raise max_model_len"
            )
        fields.setdefault("max_tokens", room - longest)
        return self._loop.call(self._sample(ids, fields, seen), timeout, "generate()")

    def try_out(self, timeout: float) -> None:
        """Sample one token, within `timeout` seconds: some models load well and fail at the first
        forward pass. `EngineStartError` then."""
        work = self._sample([[0]], {"max_tokens": 1, "logprobs": 0}, [()])
        try:
            self._loop.call(work, timeout, "sampling a first token")
        except EngineDeadError as error:
            raise EngineStartError(f"the engine can't run this model: {error}") from error

    async def _sample(
        self,
        prompts: list[list[int]],
        fields: Mapping[str, Any],
        images: Sequence[Sequence[Any]],
    ) -> list[Completion]:
        if self._box.state is State.ASLEEP:
            raise StateError("the server is asleep; wake() it before generate()")
        if self._lifecycle.unfinished and not self._sync.readable:
            raise StateError("the last sync was interrupted; call sync_weights() again")
        try:
            await self._gate.passage()
        except GateTimeout as late:
            raise StateError(str(late)) from None
        tasks = [
            asyncio.ensure_future(
                self._engine.generate(ids, fields, f"generate-{next(self._numbers)}", of_one)
            )
            for ids, of_one in zip(prompts, images, strict=True)
        ]
        try:
            results = await asyncio.gather(*tasks)
        finally:
            for task in tasks:  # where one failed, or the caller went away
                task.cancel()
        return [
            self._completion(ids, output)
            for ids, outputs in zip(prompts, results, strict=True)
            for output in outputs
        ]

    def _completion(self, prompt: list[int], output: Any) -> Completion:
        ids = list(output.token_ids)
        versions = compat.weight_spans(output) or [(self._lifecycle.version, 0, len(ids))]
        return Completion(
            prompt_ids=prompt,
            ids=ids,
            text=output.text,
            logprobs=[at[i].logprob for i, at in zip(ids, output.logprobs or [], strict=True)],
            finish_reason=output.finish_reason,
            policy_version=versions[-1][0],
            versions=versions,
        )
