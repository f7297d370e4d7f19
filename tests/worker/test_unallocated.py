"""With colocate="share" vLLM builds its model without memory for the parameters. No engine."""

import json
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import sharing
import torch

from rollout_server.worker.unallocated import Unallocated, allocate, give_memory

# In a process of its own, since vLLM is initialised in it. Every `torch.empty` is written to, so
# that what is allocated is resident, as it is on a GPU.
SCRIPT = textwrap.dedent("""
    import json, logging, sys
    import torch
    from torch.nn.modules.module import register_module_parameter_registration_hook
    from transformers import AutoTokenizer, Qwen2Config, Qwen2ForCausalLM
    import sharing
    from rollout_server.worker import loader

    logging.getLogger("rollout_server").addHandler(logging.StreamHandler(sys.stdout))
    tokenizer = AutoTokenizer.from_pretrained(sys.argv[1])
    torch.manual_seed(0)
    policy = Qwen2ForCausalLM(Qwen2Config(
        vocab_size=len(tokenizer), hidden_size=384, intermediate_size=1536, num_hidden_layers=4,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=256,
        tie_word_embeddings=True))

    class Kept(loader.Unallocated):
        def __init__(self):
            self.ended = False

        def end(self):
            self.ended = True

    told = {}

    def load(name, dtype="float32"):
        with sharing.shared_load(policy, tokenizer, dtype) as shared:
            if not told:
                sharing.initialise_vllm(shared.config)
            build = loader.PolicyLoader.load_weights
            at_load, before = {}, sharing.private_memory()

            def load_weights(self, model, model_config):
                held = [p for p in model.parameters() if not p.is_meta]
                at_load["held"] = sum(p.numel() * p.element_size() for p in held)
                at_load["grown"] = sharing.private_memory() - before
                return build(self, model, model_config)

            loader.PolicyLoader.load_weights = load_weights
            torch.use_deterministic_algorithms(True)
            torch.utils.deterministic.fill_uninitialized_memory = True
            try:
                model = shared.load()
            finally:
                torch.use_deterministic_algorithms(False)
                loader.PolicyLoader.load_weights = build
            tensors = [*model.named_parameters(), *model.named_buffers()]
            told[name] = at_load | {
                "meta": [n for n, t in tensors if t.is_meta],
                "shared": getattr(model, "rollout_shared", False),
                "why": getattr(model, "rollout_unshareable", ""),
                "apart": sharing.apart(model, policy) if dtype == "float32" else [],
                "loaders": sorted(n for n, p in model.named_parameters()
                                  if not hasattr(p, "weight_loader")),
                "copies": sorted(model.rollout_plan.copies) if dtype == "float32" else [],
            }

    load("first")  # what vLLM imports and allocates once
    load("unallocated")
    meta, loader.Unallocated = loader.Unallocated, Kept
    load("allocated")
    loader.Unallocated = meta
    load("refused", "bfloat16")

    from vllm.model_executor.models.qwen2 import Qwen2ForCausalLM as Vllm
    made = Vllm.__init__

    def reading(self, *, vllm_config, prefix=""):
        made(self, vllm_config=vllm_config, prefix=prefix)
        self.largest = float(self.model.norm.weight.max())

    Vllm.__init__ = reading
    load("reads its weights")
    told["sizes"] = [p.numel() * 4 for p in policy.parameters()]
    print("TOLD" + json.dumps(told))
""")


@pytest.fixture(scope="module")
def run(tiny_folder):
    helpers = str(Path(sharing.__file__).parent)
    done = subprocess.run(
        [
            sys.executable,
            "-c",
            f"import sys; sys.path.insert(0, {helpers!r})" + SCRIPT,
            tiny_folder,
        ],
        capture_output=True,
        text=True,
        timeout=280,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout


@pytest.fixture
def told(run):
    return json.loads(next(line for line in run.splitlines() if line.startswith("TOLD"))[4:])


@pytest.mark.slow
def test_the_weights_are_there_once(told):
    weights = sum(told["sizes"])
    assert told["unallocated"]["held"] == 0 and told["allocated"]["held"] == weights
    # Small ones may stay in the C library's heap, freed.
    assert told["unallocated"]["grown"] < 0.25 * weights
    assert told["allocated"]["grown"] > 0.5 * weights, "the measurement sees nothing"


@pytest.mark.slow
@pytest.mark.parametrize("how", ["unallocated", "reads its weights"])
def test_the_model_is_the_one_that_vllm_builds(told, how):
    for name in ("shared", "apart", "meta", "loaders", "copies"):
        assert told[how][name] == told["allocated"][name], name
    assert told[how]["shared"] and told[how]["apart"] == told[how]["meta"] == []


@pytest.mark.slow
def test_a_model_that_reads_its_weights_is_built_with_them_and_named(told, run):
    assert told["reads its weights"]["held"] == sum(told["sizes"])
    (line,) = [line for line in run.splitlines() if "can't be built without memory" in line]
    assert "Qwen2ForCausalLM" in line and "meta" in line


@pytest.mark.slow
def test_what_cannot_be_shared_gets_memory_and_the_reason(told):
    assert told["refused"]["held"] == 0 and told["refused"]["meta"] == []
    assert "float32, the engine's is bfloat16" in told["refused"]["why"]


def test_a_parameter_stays_the_same_object_with_all_that_hangs_on_it():
    class Own(torch.nn.Parameter):
        pass

    hook = Unallocated()
    try:
        module = torch.nn.Linear(3, 4)
        own = Own(torch.ones(2, 2), requires_grad=False)
        own.weight_loader = len
        module.own, module.tied = own, module.weight
    finally:
        hook.end()
    own.later = 1
    assert all(p.is_meta for p in module.parameters()) and module.tied is module.weight
    assert module.own is own and type(own) is Own and not own.requires_grad
    give_memory(own, torch.full((2, 2), 5.0))
    assert module.own is own and type(own) is Own and not own.requires_grad
    assert (own.weight_loader, own.later, own.tolist()) == (len, 1, [[5.0, 5.0]] * 2)
    allocate(module, torch.device("cpu"))
    assert not any(p.is_meta for p in module.parameters()) and module.tied is module.weight
    assert not torch.nn.Linear(3, 4).weight.is_meta, "the hook is still there"
