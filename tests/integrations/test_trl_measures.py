"""What is measured of a step of TRL's trainers, without an engine."""

import itertools
from collections import defaultdict
from types import SimpleNamespace

import pytest
import torch
from rollout_server.integrations.trl_generation import EngineGeneration
from rollout_server.integrations.trl_measures import logp_difference, truncated_mass

pytestmark = pytest.mark.slow


def test_the_mass_that_was_cut_off():
    """Exact where a cut-off is all that differs; without bias where weights differ too."""
    torch.manual_seed(0)
    whole = torch.randn(2, 5, 50).softmax(-1)
    kept = torch.where(whole >= whole.topk(10).values[..., -1:], whole, 0.0)
    engine = kept / kept.sum(-1, keepdim=True)
    ids = torch.multinomial(engine.view(10, 50), 1).view(2, 5, 1)
    mask = torch.tensor([[1, 1, 1, 1, 0], [1, 1, 1, 1, 1]])
    batch = {
        "completion_mask": mask,
        "tool_mask": torch.tensor([[1] * 5, [1, 0, 0, 1, 1]]),
        "old_per_token_logps": whole.gather(2, ids)[..., 0].log(),
        "sampling_per_token_logps": engine.gather(2, ids)[..., 0].log(),
    }
    cut_off = 1 - kept.sum(-1)
    counted = (batch["completion_mask"] * batch["tool_mask"]).bool()
    assert truncated_mass(batch) == pytest.approx(cut_off[counted].mean().item(), abs=1e-6)
    counted[0, 1:3] = False  # under a grammar
    assert truncated_mass(batch, [[(1, 3)], []]) == pytest.approx(
        cut_off[counted].mean().item(), abs=1e-6
    )
    everything = itertools.repeat([(0, None)])
    assert truncated_mass(batch, everything) is None and truncated_mass({}) is None
    assert truncated_mass({"completion_mask": mask, "old_logps": torch.zeros(2)}) is None
    # Other weights in the engine: the policy's mass of what could be sampled, on average.
    other = torch.where(kept > 0, torch.rand_like(kept), 0.0)
    other /= other.sum(-1, keepdim=True)
    many = torch.multinomial(other.view(10, 50), 20000, replacement=True).view(2, 5, 20000)
    batch = {
        "completion_mask": torch.ones(2, 100000),
        "old_per_token_logps": whole.gather(2, many).log().view(2, -1),
        "sampling_per_token_logps": other.gather(2, many).log().view(2, -1),
    }
    assert truncated_mass(batch) == pytest.approx(cut_off.mean().item(), abs=0.02)


def test_the_difference_counts_only_trained_tokens():
    mask = torch.tensor([[1, 1, 0], [1, 0, 0]])
    trained = torch.tensor([[-1.0, -2.0, -9.0], [-3.0, -9.0, -9.0]])
    sampled = torch.tensor([[-1.5, -2.0, 0.0], [float("nan"), 0.0, 0.0]])
    grpo = {
        "completion_mask": mask,
        "old_per_token_logps": trained,
        "sampling_per_token_logps": sampled,
    }
    assert logp_difference(grpo, []) == pytest.approx(0.25)
    rloo = {"completion_mask": mask, "old_logps": torch.tensor([-3.0, -3.0])}
    assert logp_difference(rloo, [[-1.0, -1.0], [-3.5]]) == pytest.approx(0.5)
    assert logp_difference(rloo, [[-1.0], [-3.5]]) is None
    assert logp_difference({}, []) is None


def test_the_difference_of_tokens_under_a_grammar_is_apart():
    mask = torch.tensor([[1, 1, 1], [1, 1, 0]])
    trained = torch.tensor([[-1.0, -2.0, -4.0], [-3.0, -9.0, -9.0]])
    sampled = torch.tensor([[-0.5, -0.0, -4.0], [-2.0, -9.0, -1.0]])
    grpo = {
        "completion_mask": mask,
        "tool_mask": torch.tensor([[1, 0, 1], [1, 1, 0]]),
        "old_per_token_logps": trained,
        "sampling_per_token_logps": sampled,
    }
    runs = [[(1, 3)], [(0, 1)]]
    assert logp_difference(grpo, [], runs) == pytest.approx((0.5 + 0) / 2)
    assert logp_difference(grpo, [], runs, of_masked=True) == pytest.approx((0 + 1) / 2)
    everything = itertools.repeat([(0, None)])
    assert logp_difference(grpo, [], everything) is None
    assert logp_difference(grpo, [], everything, of_masked=True) == logp_difference(grpo, [])
    rloo = {"completion_mask": mask, "old_logps": torch.tensor([-3.0, -3.0])}
    sums = [[-1.0, -1.0, -4.0], [-3.0, -1.0]]
    assert logp_difference(rloo, sums, everything) is None
    assert logp_difference(rloo, sums, everything, of_masked=True) == pytest.approx(0.75)
    assert logp_difference(rloo, sums, [[], [(0, 1)]]) == pytest.approx(1)


def generation(**generation_kwargs):
    """An `EngineGeneration` and the differences that it tells its server."""
    told = {}
    trainer = SimpleNamespace(
        temperature=1.0,
        top_p=1.0,
        top_k=0,
        min_p=None,
        repetition_penalty=1.0,
        max_completion_length=8,
        args=SimpleNamespace(generation_kwargs=generation_kwargs),
        model=SimpleNamespace(training=True),
        processing_class=None,
        _metrics={"train": defaultdict(list)},
    )

    def note(nats, *, grammar):
        told["grammar" if grammar else "free"] = nats

    return EngineGeneration(trainer, SimpleNamespace(note_logprob_difference=note)), told


def test_tokens_under_a_grammar_are_compared_apart():
    """Their log-probabilities are of another distribution than the trainer's."""
    mask = torch.tensor([[1, 1, 1], [1, 1, 0]])
    gaps = torch.tensor([[0.1, 2.0, 4.0], [0.3, 0.2, 9.0]])
    batch = {
        "completion_mask": mask,
        "old_per_token_logps": gaps,
        "sampling_per_token_logps": torch.zeros(2, 3),
    }
    whole = pytest.approx((0.1 + 2.0 + 4.0 + 0.3 + 0.2) / 5)
    one, told = generation()
    one.log_difference(batch)
    assert told == {"free": whole}
    one, told = generation(structured_outputs={"regex": "[ab]+"})
    one.log_difference(batch)
    assert told == {"grammar": whole}
    one, told = generation()
    one.masked = [[(1, 3)], []]  # of an agent's rows
    one.log_difference(batch)
    assert told == {"free": pytest.approx(0.2), "grammar": pytest.approx(3.0)}
    one.masked = [[], []]
    told.clear()
    one.log_difference(batch)
    assert told == {"free": whole}
