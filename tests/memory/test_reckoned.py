"""What is reckoned beside what there is: parameters, optimizers' states, adapters, all real."""

import copy

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.optimization import Adafactor

from rollout_server.errors import ConfigError
from rollout_server.memory.model import (
    engine_bytes,
    lora_shapes,
    parameter_shapes,
    read_config,
    without_weights,
)
from rollout_server.memory.optimizers import NAMES, by_name, of_object, of_trainers_name, tensors_of

OPTIMIZERS = {
    "adamw": lambda p: torch.optim.AdamW(p),
    "adam": lambda p: torch.optim.Adam(p),
    "sgd": lambda p: torch.optim.SGD(p, lr=1e-3),
    "sgd-momentum": lambda p: torch.optim.SGD(p, lr=1e-3, momentum=0.9),
    "adagrad": lambda p: torch.optim.Adagrad(p),
    "rmsprop": lambda p: torch.optim.RMSprop(p),
    "adafactor": lambda p: Adafactor(p),
}


@pytest.fixture(params=["tiny_folder", "smollm2"])
def folder(request):
    return request.getfixturevalue(request.param)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weights(folder, dtype):
    real = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    total = sum(p.numel() * p.element_size() for p in real.parameters())
    made = without_weights(read_config(folder), dtype)
    assert sum(p.nbytes for p in made.parameters()) == total
    # Tied, and a vocabulary that needs no padding: the engine has the same.
    assert engine_bytes(parameter_shapes(made), dtype.itemsize, 1, 2) == total


def test_what_isnt_tied_counts_twice(tiny_folder):
    config = AutoConfig.from_pretrained(tiny_folder)
    tied = sum(p.nbytes for p in without_weights(config, torch.float32).parameters())
    untied_config = copy.deepcopy(config)
    untied_config.tie_word_embeddings = False
    untied = sum(p.nbytes for p in without_weights(untied_config, torch.float32).parameters())
    assert untied - tied == 4 * config.vocab_size * config.hidden_size


def stepped(optimizer, parameters):
    """Bytes of a real optimizer's state after its first step."""
    for p in parameters:
        p.grad = torch.ones_like(p) * 1e-3
    optimizer.step()
    return sum({id(t): t.nbytes for t in tensors_of(optimizer.state)}.values())


def parameters_of(folder, dtype):
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    frozen = next(model.parameters())
    frozen.requires_grad_(False)  # has no state
    return [p for p in model.parameters() if p.requires_grad], list(model.parameters())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_optimizer_state(tiny_folder, name, dtype):
    trained, every = parameters_of(tiny_folder, dtype)
    real = OPTIMIZERS[name](trained)
    reckoned, live = by_name(name, every).state_bytes(), of_object(real).state_bytes()
    assert reckoned == live == stepped(real, trained)


def test_optimizer_state_of_135_million(smollm2):
    trained, every = parameters_of(smollm2, torch.bfloat16)
    real = torch.optim.AdamW(trained)
    assert by_name("adamw", every).state_bytes() == stepped(real, trained)


@pytest.mark.parametrize(
    "options", [{"amsgrad": True}, {"fused": True}, {"foreach": True}, {"capturable": False}]
)
def test_a_live_optimizers_options_count(tiny_folder, options):
    trained, _ = parameters_of(tiny_folder, torch.float32)
    real = torch.optim.AdamW(trained, **options)
    assert of_object(real).state_bytes() == stepped(real, trained)


def test_a_class_that_nothing_is_known_of_is_tried(tiny_folder):
    class Twice(torch.optim.Optimizer):
        def __init__(self, params):
            super().__init__(params, {})

        def step(self):
            for p in self.param_groups[0]["params"]:
                self.state[p]["half"] = torch.zeros(p.shape, dtype=torch.float16, device=p.device)

    trained, _ = parameters_of(tiny_folder, torch.float32)
    real = Twice(trained)
    assert of_object(real).state_bytes() == stepped(real, trained)
    assert of_object(real).state_bytes() == 2 * sum(p.numel() for p in trained)


def test_eight_bits_by_bitsandbytes_layout():
    """It isn't installed here: two bytes a number and two scales a block; small ones in float32."""
    large, small = torch.nn.Parameter(torch.empty(64, 256)), torch.nn.Parameter(torch.empty(100))
    assert by_name("adamw8bit", [large]).state_bytes() == 2 * 64 * 256 + 2 * 4 * 64
    assert by_name("adamw8bit", [small]).state_bytes() == 2 * 4 * 100


@pytest.mark.parametrize(
    ("told", "kind", "known"),
    [
        ("adamw_torch_fused", "AdamW", True),
        ("adamw_bnb_8bit", "AdamW8bit", True),
        ("paged_adamw_8bit", "AdamW8bit", True),
        ("sgd", "SGD", True),
        ("adafactor", "Adafactor", True),
        ("lion_32bit", "Lion", True),
        ("galore_adamw", "AdamW", False),
        (None, "AdamW", False),
    ],
)
def test_transformers_names(told, kind, known):
    found = of_trainers_name(told, [])
    assert (found.name, found.known) == (kind, known)


def test_a_wrong_name_is_refused():
    with pytest.raises(ConfigError, match=r"'adamx'.*adamw, adam"):
        by_name("adamx", [])
    assert {*OPTIMIZERS, "lion", "adamw8bit"} == set(NAMES)


def test_an_adapter_on_every_linear_layer(tiny_folder):
    real = AutoModelForCausalLM.from_pretrained(tiny_folder, dtype=torch.bfloat16)
    shapes = list(lora_shapes(real, 8))
    peft = get_peft_model(real, LoraConfig(r=8, target_modules="all-linear"))
    trained = [p for p in peft.parameters() if p.requires_grad]
    assert sorted(shapes) == sorted(tuple(p.shape) for p in trained)
    assert {p.dtype for p in trained} == {torch.float32}  # as is reckoned


def test_a_model_that_isnt_there_is_named(tmp_path):
    with pytest.raises(ConfigError, match=r"--model='.*no_such.*config\.json"):
        read_config(str(tmp_path / "no_such"))
