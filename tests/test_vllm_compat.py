"""Differences between vLLM versions that the installed one doesn't show."""

from dataclasses import dataclass
from types import SimpleNamespace

import pytest
import vllm.outputs
import vllm.v1.engine.output_processor as processor

import rollout_server.vllm_compat as compat


@dataclass
class Output:
    """vLLM's before 0.32, which tells no versions."""

    finish_reason: str | None


class State:
    """vLLM's of a request: what is sampled so far, and what makes outputs of it."""

    def __init__(self):
        self.detokenizer = SimpleNamespace(output_token_ids=[])

    def _new_completion_output(self, ids, finish_reason):
        return Output(finish_reason)

    def sample(self, count, finish_reason=None):
        self.detokenizer.output_token_ids += [0] * count
        return compat.weight_spans(self._new_completion_output([], finish_reason))


@pytest.fixture
def old(monkeypatch):
    """A client of a vLLM before 0.32, with one running request."""
    monkeypatch.setattr(vllm.outputs, "CompletionOutput", Output)
    monkeypatch.setattr(processor, "RequestState", type("RequestState", (State,), {}))
    compat._tells_versions.cache_clear()
    state = processor.RequestState()
    client = SimpleNamespace(output_processor=SimpleNamespace(request_states={"a": state}))
    yield client, state
    compat._tells_versions.cache_clear()


async def test_outputs_tell_their_versions_where_vllm_does_not(old):
    client, state = old
    await compat.set_weight_version(client, 7)
    assert state.sample(3) is None  # told at the end alone
    await compat.set_weight_version(client, 7)  # an engine that was started anew
    await compat.set_weight_version(client, 8)
    await compat.set_weight_version(client, 9)  # none by 8
    assert state.sample(2, "length") == [(7, 0, 3), (9, 3, 5)]
    later = client.output_processor.request_states["b"] = processor.RequestState()
    assert later.sample(4, "length") is None  # all by the version that there is
    await compat.set_weight_version(client, 10)
    assert later.sample(1, "length") == [(9, 0, 4), (10, 4, 5)]
