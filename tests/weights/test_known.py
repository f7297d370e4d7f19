"""A policy's source, which isn't walked for anew where nothing has changed."""

import gc
import weakref

import pytest
import torch

from rollout_server.weights.sources.base import Source
from rollout_server.weights.sources.kinds import source_of
from rollout_server.weights.sources.known import Sources


@pytest.fixture
def model():
    inner = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.BatchNorm1d(4), torch.nn.ReLU())
    return torch.nn.ModuleDict({"inner": inner, "out": torch.nn.Linear(4, 2, bias=False)})


def told(source):
    return {name: id(tensor) for name, tensor in source.tensors.items()}, source.specs


CHANGES = {
    "a parameter is another": lambda m: setattr(
        m.out, "weight", torch.nn.Parameter(torch.ones(2, 4))
    ),
    "past torch's setters": lambda m: m.out._parameters.update(
        weight=torch.nn.Parameter(torch.ones(2, 4))
    ),
    "a bias where none was": lambda m: setattr(m.out, "bias", torch.nn.Parameter(torch.ones(2))),
    "a parameter of a module that had none": lambda m: m.inner[2].register_parameter(
        "slope", torch.nn.Parameter(torch.ones(1))
    ),
    "a buffer is another": lambda m: setattr(m.inner[1], "running_mean", torch.ones(4)),
    "a module is another": lambda m: m.inner.__setitem__(0, torch.nn.Linear(4, 4)),
    "a module more": lambda m: m.inner.append(torch.nn.Linear(4, 4)),
    "a module less": lambda m: m.inner.__delitem__(0),
    "another shape": lambda m: setattr(m.out.weight, "data", torch.ones(3, 4)),
    "another dtype": lambda m: m.double(),
    "another name": lambda m: m.update({"last": m.pop("out")}),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_what_changes_is_seen(model, change):
    sources = Sources()
    assert told(sources.of(model, "merge")) == told(source_of(model))
    change(model)
    assert told(sources.of(model, "merge")) == told(source_of(model))
    assert {id(p) for p in sources.parameters(model)} == {id(p) for p in model.parameters()}


def test_it_isnt_walked_for_again(model, monkeypatch):
    sources = Sources()
    first = sources.of(model, "merge")
    monkeypatch.setattr("rollout_server.weights.sources.known.source_of", None)
    model.out.weight.data = torch.zeros(2, 4)  # other values
    again = sources.of(model, "merge")
    assert type(again) is Source and again.specs is first.specs
    assert again.tensors["out.weight"] is model.out.weight
    assert [id(p) for p in sources.parameters(model)] == [id(p) for p in model.parameters()]


def test_nothing_is_kept_alive(model):
    sources = Sources()
    sources.of(model, "merge")
    gone = weakref.ref(model.out.weight)
    model.out.weight = torch.nn.Parameter(torch.ones(2, 4))
    gc.collect()
    assert gone() is None
    # Asked without a look, as a sync does that has just looked.
    assert {id(p) for p in sources.parameters(model, looked=True)} == {
        id(p) for p in model.parameters()
    }


def test_another_model_is_walked(model):
    sources = Sources()
    sources.of(model, "merge")
    other = torch.nn.Linear(2, 2)
    assert told(sources.of(other, "merge")) == told(source_of(other))
