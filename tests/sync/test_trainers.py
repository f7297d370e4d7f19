"""Every kind of trainer on one rank: after real optimizer steps the engine has the policy."""

import inside
import pytest
import torch
from peft import LoraConfig, get_peft_model
from peft.tuners.tuners_utils import BaseTunerLayer
from support import MIB, greedy, tiny_sizes, trainer_logprobs
from torch.distributed.fsdp import fully_shard
from torch.optim.optimizer import register_optimizer_step_post_hook
from transformers import LlamaConfig, LlamaForCausalLM

from rollout_server import attach
from rollout_server.errors import (
    ConfigError,
    NotAvailableError,
    StateError,
    UnsupportedModelError,
    WeightSyncError,
)
from rollout_server.weights.sources.kinds import source_of
from rollout_server.weights.staging import EngineTensorInfo, Staging

QUICK = {"kv_cache_memory_bytes": 32 * MIB, "progress": False}
PROMPT = [21, 22, 23]


def assert_equal(server, model, tokens=8):
    """What the engine samples greedily is what the trainer's model says, to 1e-3."""
    server.verify_weights()
    answer = greedy(server, PROMPT, tokens)
    own = trainer_logprobs(model, PROMPT, answer.ids)
    assert torch.allclose(torch.tensor(answer.logprobs), own[range(tokens), answer.ids], atol=1e-3)
    best, second = own.topk(2).values.T
    clear = best - second > 1e-3
    assert (own.argmax(-1) == torch.tensor(answer.ids))[clear].all()
    return answer.logprobs


def train(server, model, between=lambda step: None):
    """Three AdamW steps; after each the engine has other weights, the policy's. The reports."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    before, reports = assert_equal(server, model), []
    for step in range(3):
        between(step)
        torch.manual_seed(step)
        ids = torch.randint(0, 1000, (2, 32))
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        reports.append(server.sync_weights())
        after = assert_equal(server, model)
        assert max(abs(a - b) for a, b in zip(after, before, strict=True)) > 1e-2
        before = after
    return reports


def lora(model, **options):
    torch.manual_seed(0)
    modules = ["q_proj", "v_proj", "o_proj", "gate_proj", "down_proj"]
    options = {"target_modules": modules, "r": 6, "lora_alpha": 12} | options
    return get_peft_model(model, LoraConfig(init_lora_weights=False, **options))


@pytest.mark.slow
def test_wrappers_inside_the_model(tiny, tokenizer):
    """Gradient checkpointing, a compiled layer, and a compiled whole."""
    tiny.gradient_checkpointing_enable()
    tiny.train()
    tiny.model.layers[0] = torch.compile(tiny.model.layers[0], backend="eager")
    with attach(torch.compile(tiny, backend="eager"), tokenizer, **QUICK) as server:
        reports = train(server, tiny)
        assert {r.path for r in reports} == {"plan"}


@pytest.mark.slow
def test_peft_merged(tiny, tokenizer):
    model = lora(tiny, use_dora=True, modules_to_save=["lm_head"])
    untouched = {n: p.clone() for n, p in model.named_parameters()}
    with attach(model, tokenizer, sync_bucket_bytes=MIB, verify_every=2, **QUICK) as server:
        for name, parameter in model.named_parameters():
            assert torch.equal(untouched[name], parameter), f"{name} isn't as it was"
        reports = train(server, model, lambda step: step == 1 and server.sleep())
        assert {r.path for r in reports} == {"plan"}
        assert [r.verified for r in reports] == [False, True, False]


@pytest.mark.slow
@pytest.mark.core
def test_peft_adapter_alone(tiny, tokenizer):
    """Its bytes are all that is sent; the base goes when the engine has lost it."""
    model = lora(tiny, use_rslora=True, rank_pattern={"o_proj": 3}, alpha_pattern={"q_proj": 5})
    adapter = sum(p.numel() * 4 for n, p in model.named_parameters() if "lora_" in n)
    with attach(model, tokenizer, peft="adapter", **QUICK) as server:
        reports = train(server, model)
        assert [r.bytes for r in reports] == [adapter] * 3
        assert {r.path for r in reports} == {"adapter"}
        server.sleep()
        report = server.wake()
        assert report.bytes == sum(p.numel() * 4 for p in model.parameters())
        assert_equal(server, model)
        # By HTTP, by each name, and without one, it is the adapted policy.
        expected = greedy(server, PROMPT, 6).ids
        for name in ("policy", tiny.config._name_or_path, ""):
            choice = (
                server.openai()
                .completions.create(
                    model=name,
                    prompt=PROMPT,
                    max_tokens=6,
                    temperature=0,
                    extra_body={"ignore_eos": True, "return_token_ids": True},
                )
                .choices[0]
            )
            assert choice.token_ids == expected
        with torch.no_grad():
            model.base_model.model.model.layers[0].mlp.up_proj.weight.mul_(1.5)
        with pytest.raises(WeightSyncError, match=r"up_proj"):
            server.verify_weights()
        assert server.sync_weights().bytes > adapter, "a change of the frozen base was overlooked"
        assert_equal(server, model)


@pytest.mark.slow
@pytest.mark.core
def test_shared_memory(tiny, tokenizer, tmp_path):
    """One memory for both: nothing is sent, and the engine rests while the optimizer writes."""
    states = []
    with attach(tiny, tokenizer, colocate="share", **QUICK) as server:
        assert server.memory()["weights"] == 0
        tiny.model.norm.weight.register_post_accumulate_grad_hook(
            lambda _: states.append(str(server.state))
        )
        hook = register_optimizer_step_post_hook(lambda *_: states.append(str(server.state)))
        reports = train(server, tiny)
        hook.remove()
        assert states == ["awake", "asleep"] * 3
        assert {(r.path, r.bytes, r.tensors) for r in reports} == {("share", 0, 0)}
        with pytest.raises(StateError, match="wake"):
            server.sleep()
            server.generate("Hello")
        server.wake()
        # A parameter that was given other memory is brought back.
        up = tiny.model.layers[0].mlp.up_proj.weight
        up.data = torch.randn_like(up) * 0.1
        report = server.sync_weights()
        assert (report.bytes, report.tensors) == (up.numel() * 4, 1)
        assert_equal(server, tiny)
        assert server.sync_weights().bytes == 0
        tiny.model.norm.to(torch.float64)
        with pytest.raises(WeightSyncError, match=r"norm\.weight had torch\.float32, has torch\."):
            server.sync_weights()
        tiny.model.norm.to(torch.float32)
        server.sync_weights()
        # Checkpoints of a policy whose parameters have a memory in common.
        tiny.save_pretrained(tmp_path)
        again = type(tiny).from_pretrained(tmp_path, dtype=torch.float32)
        for mine, theirs in zip(tiny.parameters(), again.parameters(), strict=True):
            assert torch.equal(mine, theirs)
    assert_trains_alone(tiny)


def assert_trains_alone(model):
    before = model.model.norm.weight.clone()
    model(input_ids=torch.tensor([PROMPT]), labels=torch.tensor([PROMPT])).loss.backward()
    torch.optim.SGD(model.parameters(), lr=1.0).step()
    assert not torch.equal(before, model.model.norm.weight)


@pytest.mark.slow
def test_shared_memory_with_an_adapter(tiny, tokenizer):
    model = lora(tiny, modules_to_save=["lm_head"])
    adapter = sum(p.numel() * 4 for n, p in model.named_parameters() if "lora_" in n)
    with attach(model, tokenizer, colocate="share", peft="adapter", **QUICK) as server:
        reports = train(server, model)
        assert {(r.path, r.bytes) for r in reports} == {("adapter", adapter)}


@pytest.mark.slow
def test_what_cannot_be_shared_or_copied(tiny, tokenizer, monkeypatch):
    with pytest.raises(ConfigError, match=r"float32.*bfloat16.*colocate='sleep'"):
        attach(tiny, tokenizer, colocate="share", dtype="bfloat16", **QUICK)
    # vLLM's own CPU worker packs linear weights; its reload leaves the old ones in use.
    worker = {"worker_cls": "vllm.v1.worker.cpu_worker.CPUWorker"}
    with pytest.raises(UnsupportedModelError, match=r"replaced .*qkv_proj.weight.*worker_cls"):
        attach(tiny, tokenizer, colocate="resident", engine_args=worker, **QUICK)
    # Not pure copies: vLLM's layerwise reload, for sleep and for syncs.
    with attach(tiny, tokenizer, sync_path="layerwise", **QUICK) as server:
        torch.manual_seed(0)
        for sleeping in (False, True):
            with torch.no_grad():
                tiny.model.layers[0].mlp.up_proj.weight.add_(0.05)
            if sleeping:
                server.sleep()
            report = server.sync_weights()
            assert (report.path, report.verified) == ("layerwise", False)
            assert "sync_path" in report.reason
            answer = greedy(server, PROMPT, 8)
            own = trainer_logprobs(tiny, PROMPT, answer.ids)[range(8), answer.ids]
            assert torch.allclose(torch.tensor(answer.logprobs), own, atol=1e-3)
        with pytest.raises(NotAvailableError, match="layerwise"):
            server.verify_weights()

        # A failure in the middle: nothing half-new is served.
        async def failing(*_):
            raise WeightSyncError("in the middle")

        monkeypatch.setattr(inside.engine(server), "reload_weights", failing)
        with pytest.raises(WeightSyncError, match="in the middle"):
            server.sync_weights()
        assert server.state == "broken"
        for call in (server.sync_weights, server.wake, lambda: server.generate("Hello")):
            with pytest.raises(StateError, match="in the middle"):
                call()


@pytest.mark.slow
def test_a_model_with_other_tensors_than_the_engines(tokenizer):
    """Refused with the list, before anything is written."""
    config = LlamaConfig(
        **tiny_sizes(
            len(tokenizer), num_hidden_layers=1, num_key_value_heads=4, max_position_embeddings=64
        )
    )
    model = LlamaForCausalLM(config)
    model.value_head = torch.nn.Linear(128, 1)
    model.model.norm.bias = torch.nn.Parameter(torch.zeros(128))
    with pytest.raises(Exception, match=r"(?s)don't have the same tensors") as error:
        attach(model, tokenizer, **QUICK)
    for name in ("value_head.weight (1, 128)", "value_head.bias (1,)", "model.norm.bias (128,)"):
        assert name in str(error.value)


# -- without an engine --------------------------------------------------------------------------


def gathered(source, bucket):
    """All tensors of a source put together from its parts."""
    found = {n: torch.full(s.shape, torch.nan, dtype=s.dtype) for n, s in source.specs.items()}
    for part in source.parts(Staging(bucket, EngineTensorInfo(splittable=set(source.specs)))):
        for name, row, tensor in part.pieces:
            found[name][row : row + tensor.shape[0]] = tensor
    return found


@pytest.mark.parametrize("bucket", [1 << 16, 1 << 30])
def test_merged_weights_are_those_of_peft(tiny, bucket):
    model = lora(tiny, modules_to_save=["lm_head"])
    before = {n: p.clone() for n, p in model.named_parameters()}
    found = gathered(source_of(model), bucket)
    for name, parameter in model.named_parameters():
        assert torch.equal(before[name], parameter), f"{name} isn't as it was"
    merged = model.merge_and_unload()
    expected = dict(merged.named_parameters())
    assert found.keys() >= expected.keys()
    for name, parameter in expected.items():
        assert torch.equal(found[name], parameter), name


def test_policies_that_cannot_be_shared_are_refused(tiny, tokenizer, process_group):
    with pytest.raises(ConfigError, match=r"peft='merge'.*peft='adapter'"):
        attach(lora(tiny), tokenizer, colocate="share", **QUICK)
    sharded = fully_shard(LlamaForCausalLM(_small()))
    with pytest.raises(ConfigError, match=r"sharded.*colocate='sleep'"):
        attach(sharded, tokenizer, colocate="share", **QUICK)


def test_an_adapter_that_is_off_changes_nothing(tiny):
    model = lora(tiny)
    base = {n: p.clone() for n, p in tiny.named_parameters() if "base_layer" in n}
    for layer in model.modules():
        if isinstance(layer, BaseTunerLayer):
            layer.enable_adapters(False)
    found = gathered(source_of(model), 1 << 30)
    for name, parameter in base.items():
        assert torch.equal(found[name.replace(".base_layer", "")], parameter)


def test_a_merge_that_fails_or_is_left_is_undone(tiny, monkeypatch):
    model = lora(tiny)
    before = {n: p.clone() for n, p in model.named_parameters()}
    layer = model.base_model.model.model.layers[1].self_attn.q_proj
    kind = type(layer)
    merge = kind.merge

    def failing(self, *args, **options):
        merge(self, *args, **options)
        if self is layer:
            raise MemoryError("in the middle")

    monkeypatch.setattr(kind, "merge", failing)
    with pytest.raises(MemoryError):
        gathered(source_of(model), 1 << 30)
    parts = source_of(model).parts(Staging(1 << 16, EngineTensorInfo(splittable=set(before))))
    next(parts), next(parts)
    parts.close()
    for name, parameter in model.named_parameters():
        assert torch.equal(before[name], parameter), name
    assert not any(getattr(m, "merged", False) for m in model.modules())


def test_peft_policies_that_cannot_be_served_are_refused(tiny):
    from peft import PromptTuningConfig

    with pytest.raises(NotAvailableError, match=r"q_proj has DoraLinearVariant.*peft='merge'"):
        source_of(lora(tiny, use_dora=True), "adapter")
    prompt = PromptTuningConfig(num_virtual_tokens=2, task_type="CAUSAL_LM")
    with pytest.raises(NotAvailableError, match="isn't in the layers' weights"):
        source_of(get_peft_model(LlamaForCausalLM(_small()), prompt))
    embeddings = get_peft_model(
        LlamaForCausalLM(_small(tie_word_embeddings=True)),
        LoraConfig(target_modules=["embed_tokens"]),
    )
    with pytest.raises(NotAvailableError, match="tied to lm_head"):
        source_of(embeddings)


def _small(**options):
    return LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        **options,
    )
