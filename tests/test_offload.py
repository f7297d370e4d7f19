"""The optimizer's state in other memory and back; real moves between devices are in tests/gpu."""

import pytest
import torch

from rollout_server.offload import OptimizerOffload


@pytest.fixture
def trained():
    """A model with an optimizer that has a state, and one trained alike that is left alone."""
    pairs = []
    for _ in range(2):
        torch.manual_seed(0)
        model = torch.nn.Linear(8, 8)
        pairs.append((model, torch.optim.AdamW(model.parameters(), lr=0.1)))
        step(*pairs[-1])
    return pairs


def step(model, optimizer):
    model(torch.ones(2, 8)).sum().backward()
    optimizer.step()
    optimizer.zero_grad()


def sizes(optimizer):
    return [
        value.untyped_storage().nbytes()
        for values in optimizer.state.values()
        for value in values.values()
    ]


def offload(optimizer, calls):
    return OptimizerOffload(lambda: optimizer, lambda: calls.append(1), movable=lambda _: True)


def test_state_is_parked_and_comes_back_as_it_was(trained):
    (model, optimizer), (other, untouched) = trained
    parking = offload(optimizer, [])
    before = sizes(optimizer)
    for _ in range(3):
        parking.park()
        parking.park()
        assert parking.parked_bytes == sum(before) and set(sizes(optimizer)) == {0}
        parking.restore()
        parking.restore()
        assert parking.parked_bytes == 0 and sizes(optimizer) == before
        step(model, optimizer)
        step(other, untouched)
        for mine, theirs in zip(model.parameters(), other.parameters(), strict=True):
            assert torch.equal(mine, theirs)
    parking.close()


@pytest.mark.parametrize("use", ["step", "state_dict"])
def test_who_needs_the_state_gets_it(trained, use):
    (model, optimizer), (other, untouched) = trained
    calls = []
    parking = offload(optimizer, calls)
    parking.park()
    if use == "step":
        step(model, optimizer)
        step(other, untouched)
    found, expected = optimizer.state_dict(), untouched.state_dict()
    assert calls == [1]
    for number, values in expected["state"].items():
        for name, value in values.items():
            assert torch.equal(found["state"][number][name], value)
    parking.park()
    parking.close()
    assert 0 not in sizes(optimizer)


def test_before_there_is_an_optimizer_nothing_happens():
    parking = OptimizerOffload(lambda: None, lambda: None)
    parking.park()
    parking.restore()
    parking.close()
    assert parking.parked_bytes == 0


def test_state_in_host_memory_stays(trained):
    (_, optimizer), _ = trained
    parking = OptimizerOffload(lambda: optimizer, lambda: None)
    parking.park()
    assert parking.parked_bytes == 0 and 0 not in sizes(optimizer)
    parking.close()
