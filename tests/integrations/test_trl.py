"""TRL's trainers with an attached server."""

import itertools
import re
import warnings
from collections import defaultdict
from types import SimpleNamespace

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from rollout_server.integrations.trl import recognises
from rollout_server.integrations.trl_agents import AgentRollouts
from rollout_server.integrations.trl_checks import check
from rollout_server.integrations.trl_generation import EngineGeneration
from rollout_server.integrations.trl_measures import logp_difference, truncated_mass
from support import MIB, trl_settings
from transformers import AutoModelForCausalLM
from trl import GRPOConfig, GRPOTrainer, RLOOConfig, RLOOTrainer, SFTConfig, SFTTrainer

from rollout_server import attach
from rollout_server.config import RolloutConfig
from rollout_server.errors import AlreadyAttachedError, NotAvailableError, TrainerError
from rollout_server.trajectories.session import Session

pytestmark = pytest.mark.slow
QUICK = {"kv_cache_memory_bytes": 64 * MIB, "progress": False}


def reward_length(completions, **_):
    return [float(len(set(text)) % 7) for text in completions]


@pytest.fixture
def make_trainer(tiny_folder, tokenizer, tmp_path):
    def make(trainer=GRPOTrainer, config=GRPOConfig, evaluate=False, peft=None, **options):
        data = Dataset.from_list([{"prompt": f"Say {i} times {i}"} for i in range(32)])
        settings = trl_settings(tmp_path, max_steps=3, per_device_train_batch_size=4)
        return trainer(
            model=AutoModelForCausalLM.from_pretrained(tiny_folder, dtype=torch.float32),
            args=config(**settings | options),
            train_dataset=data,
            eval_dataset=data.select(range(4)) if evaluate else None,
            reward_funcs=reward_length,
            processing_class=tokenizer,
            peft_config=peft,
        )

    return make


def values(trainer, key):
    return [log[key] for log in trainer.state.log_history if key in log]


@pytest.mark.parametrize(
    ("trainer", "config", "options"),
    [
        # Two optimizer steps per rollout, accumulation, evaluation.
        (
            GRPOTrainer,
            GRPOConfig,
            dict(
                num_iterations=2,
                gradient_accumulation_steps=2,
                max_steps=4,
                eval_strategy="steps",
                eval_steps=2,
                per_device_eval_batch_size=4,
                temperature=0.9,
            ),
        ),
        # Generates while it trains.
        (RLOOTrainer, RLOOConfig, {}),
    ],
    ids=["grpo", "rloo-resident"],
)
def test_training(make_trainer, trainer, config, options):
    trainer = make_trainer(trainer, config, evaluate="eval_strategy" in options, **options)
    begin = {n: p.detach().clone() for n, p in trainer.model.named_parameters()}
    states = []
    sleeps = config is GRPOConfig
    with attach(trainer, colocate="sleep" if sleeps else "resident", **QUICK) as server:
        with pytest.raises(AlreadyAttachedError):
            attach(trainer)
        loss = trainer.compute_loss
        trainer.compute_loss = lambda *a, **k: (states.append(str(server.state)), loss(*a, **k))[1]
        trainer.train()
        assert any((p != begin[n]).any() for n, p in trainer.model.named_parameters())
        # Asleep while the trainer computes, awake with the trained weights afterwards.
        assert set(states) == {"asleep" if sleeps else "awake"}
        assert server.state == "awake"
        server.verify_weights()
        assert server.policy_version >= 2
        for key in (
            "tokens_per_second",
            "policy_version",
            "seconds_sync",
            "seconds_wake",
            "kv_cache_usage",
            "logp_difference",
        ):
            assert values(trainer, f"rollout/{key}"), key
        assert bool(values(trainer, "rollout/seconds_sleep")) == sleeps
        assert max(values(trainer, "rollout/logp_difference")) < 1e-3
        name = 'rollout_server_logprob_mean_absolute_difference_nats{sampled="free"}'
        logged = values(trainer, "rollout/logp_difference")
        assert server.metrics()[name] == pytest.approx(logged[-1], abs=1e-5)
        assert min(values(trainer, "rollout/kv_cache_usage")) > 0
        versions = values(trainer, "rollout/policy_version")
        assert versions == sorted(versions) and versions[-1] > versions[0]
        if sleeps:
            for ratio in values(trainer, "sampling/importance_sampling_ratio/mean"):
                assert 0.95 < ratio < 1.05
            assert values(trainer, "eval_rollout/tokens_per_second")
            # Evaluated twice without a step between, from an engine that was asleep.
            server.sleep()
            versions = [server.policy_version]
            for _ in range(2):
                assert "eval_reward" in trainer.evaluate()
                assert server.state == "awake"
                versions.append(server.policy_version)
            assert versions[0] < versions[1] < versions[2]
    # The trainer generates by itself again.
    assert trainer.use_vllm is False
    assert "_generate" not in vars(trainer) and not hasattr(trainer, "vllm_generation")


@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
def test_training_in_shared_memory(make_trainer, lora):
    """Nothing is sent, or the adapter alone; the engine rests while the trainer computes."""
    trainer = make_trainer(peft=LoraConfig(target_modules=["q_proj", "v_proj"]) if lora else None)
    begin = {n: p.detach().clone() for n, p in trainer.model.named_parameters()}
    reports, states = [], []
    options = {"colocate": "share", "peft": "adapter", "offload_optimizer": True}
    with attach(trainer, **options, **QUICK) as server:
        sync, loss = server.sync_weights, trainer.compute_loss
        server.sync_weights = lambda: (reports.append(sync()), reports[-1])[1]
        trainer.compute_loss = lambda *a, **k: (states.append(str(server.state)), loss(*a, **k))[1]
        trainer.train()
        server.verify_weights()
        assert {n for n, p in trainer.model.named_parameters() if (p != begin[n]).any()} == {
            n for n, p in trainer.model.named_parameters() if p.requires_grad
        }
        assert set(states) == {"asleep"} and len(reports) == 4
        sent = sum(p.numel() * 4 for p in trainer.model.parameters() if p.requires_grad)
        assert {r.bytes for r in reports} == {sent if lora else 0}
        assert max(values(trainer, "rollout/logp_difference")) < 1e-3


def test_rollouts_are_those_the_engine_sampled(make_trainer):
    """Order, repetition, sampling fields and log-probabilities, by the seam itself."""
    trainer = make_trainer(
        max_completion_length=6,
        generation_kwargs={"min_tokens": 6, "stop": None},
        vllm_structured_outputs_regex="[ab]{1,40}",
    )
    with attach(trainer, **QUICK) as server:
        prompts = [[7, 8, 9]] * 2 + [[10, 11]] * 2
        out = trainer.vllm_generation.generate(prompts, None, 2)
        prompt_ids, completion_ids, logprobs, logprob_ids = out
        assert prompt_ids == prompts
        assert {len(ids) for ids in completion_ids} == {6}
        for ids, probabilities, tokens in zip(completion_ids, logprobs, logprob_ids, strict=True):
            assert [[i] for i in ids] == tokens
            assert [len(p) for p in probabilities] == [1] * len(ids)
            text = trainer.processing_class.decode(ids)
            assert set(text) <= {"a", "b"}, text
        # Of tokens sampled under a grammar the trainer knows nothing: they are logged apart.
        batch = {
            "completion_mask": torch.ones(4, 6, dtype=torch.long),
            "old_per_token_logps": torch.zeros(4, 6),
            "sampling_per_token_logps": torch.tensor(logprobs)[..., 0],
        }
        trainer.model.train()
        trainer.vllm_generation.log_difference(batch)
        logged = trainer._metrics["train"]
        (difference,) = logged["rollout/logp_difference_masked"]
        assert difference == pytest.approx(-batch["sampling_per_token_logps"].mean().item())
        assert difference > 0 and not logged["rollout/logp_difference"]
        # Asked while asleep, without a new step: woken up again.
        server.sleep()
        assert trainer.vllm_generation.generate(prompts[:1], None, 1)[0] == prompts[:1]
        # An agent's request that leaves fields out is sampled as the trainer does.
        answer = server.openai().chat.completions.create(
            model="policy",
            messages=[{"role": "user", "content": "Hi"}],
            extra_body={"ignore_eos": True},
        )
        assert answer.usage.completion_tokens == 6
        longest = server.max_model_len
        for prompt, echo, count in (
            ([7], False, 6),
            ([7], True, 6),
            ([7] * (longest - 3), False, 3),
        ):
            answer = server.openai().completions.create(
                model="policy", prompt=prompt, echo=echo, extra_body={"ignore_eos": True}
            )
            assert answer.usage.completion_tokens == count


# -- refused, without an engine ---------------------------------------------------------------


def test_use_vllm_is_refused_with_the_remedy(make_trainer):
    trainer = make_trainer()
    trainer.use_vllm = True  # as its constructor sets it
    with pytest.raises(TrainerError, match="use_vllm=False"):
        attach(trainer)


def test_another_generator_is_refused(make_trainer):
    trainer = make_trainer()
    trainer.use_transformers_continuous_batching = True
    with pytest.raises(TrainerError, match="use_transformers_continuous_batching"):
        attach(trainer)


def test_the_constructors_checks_are_repeated(make_trainer):
    trainer = make_trainer(loss_type="vespo", vllm_importance_sampling_mode="sequence_mask")
    with pytest.raises(TrainerError, match="vespo"):
        attach(trainer)
    trainer.vllm_importance_sampling_mode = "nonsense"
    with pytest.raises(TrainerError, match="nonsense"):
        attach(trainer)


def test_a_trainer_that_does_not_generate_is_refused(tiny, tokenizer, tmp_path):
    args = SFTConfig(output_dir=str(tmp_path), use_cpu=True, bf16=False, report_to=[])
    data = Dataset.from_list([{"text": "one"}])
    trainer = SFTTrainer(model=tiny, args=args, train_dataset=data, processing_class=tokenizer)
    assert recognises(trainer) and not recognises(tiny)
    with pytest.raises(TrainerError, match="GRPOTrainer"):
        attach(trainer)


def test_other_trainers_that_generate_are_refused_by_name(make_trainer, tiny, tokenizer, tmp_path):
    from trl.experimental.async_grpo import AsyncGRPOTrainer
    from trl.experimental.online_dpo import OnlineDPOConfig, OnlineDPOTrainer

    settings = trl_settings(tmp_path)
    del settings["num_generations"], settings["max_completion_length"]
    pairs = OnlineDPOTrainer(
        model=tiny,
        args=OnlineDPOConfig(**settings),
        processing_class=tokenizer,
        train_dataset=Dataset.from_list([{"prompt": "one"}]),
        reward_funcs=reward_length,
    )
    with pytest.raises(NotAvailableError, match=r"OnlineDPOTrainer asks for pairs.*GRPOTrainer"):
        attach(pairs)
    # Made without its constructor, which asks a vLLM server for its model.
    trainer = AsyncGRPOTrainer.__new__(AsyncGRPOTrainer)
    trainer.accelerator, trainer.args = pairs.accelerator, pairs.args
    with pytest.raises(NotAvailableError, match=r"AsyncGRPOTrainer trains on what.*GRPOTrainer"):
        attach(trainer)


@pytest.mark.parametrize("where", ["image", "images", "prompt", "evaluation"])
def test_images_are_refused_at_attach(make_trainer, where):
    trainer = make_trainer()
    text = {"prompt": [{"role": "user", "content": "Say"}]}
    parts = [{"type": "image", "text": None}, {"type": "text", "text": "What is it?"}]
    if where == "prompt":
        trainer.train_dataset = Dataset.from_list(
            [{"prompt": [{"role": "user", "content": parts}]}]
        )
    elif where == "evaluation":
        trainer.eval_dataset = {"pictures": Dataset.from_list([text | {"image": "x.png"}])}
    else:
        trainer.train_dataset = Dataset.from_list([text | {where: "x.png"}])
    name = "eval_dataset" if where == "evaluation" else "train_dataset"
    column = "image" if where == "evaluation" else where
    with pytest.raises(NotAvailableError, match=f"{name} holds images in its column '{column}'"):
        attach(trainer)


@pytest.mark.parametrize(
    ("fields", "told"),
    [
        ({"do_sample": True}, r"'do_sample'.*Hugging Face"),
        ({"length_penalty": 2.0, "min_tokens": 1}, r"'length_penalty'.*Hugging Face"),
        ({"max_new_tokens": 4}, "max_completion_length"),
        ({"num_return_sequences": 4}, "num_generations"),
        ({"n": 4}, "num_generations"),
        ({"seed": 1}, "the same"),
        ({"top_q": 0.5}, "did you mean 'top_"),
        ({"top_p": 7}, "top_p"),
    ],
    ids=str,
)
def test_generation_kwargs_that_vllm_lacks_are_refused_at_attach(make_trainer, fields, told):
    trainer = make_trainer()
    trainer.args.generation_kwargs = fields
    with pytest.raises(TrainerError, match="generation_kwargs.*" + told):
        attach(trainer)


@pytest.mark.parametrize(
    ("settings", "mode", "told"),
    [
        ({"top_p": 0.9}, "sequence_mask", r"top_p=0\.9: .*truncated_mass.*'token_truncate'"),
        ({"top_k": 5, "min_p": 0.1}, "token_truncate", r"top_k=5, min_p=0\.1: .*trl\.md'?\)$"),
        ({"repetition_penalty": 1.2}, "token_mask", r"repetition_penalty=1\.2: "),
        ({"generation_kwargs": {"min_tokens": 4}}, "token_mask", "min_tokens=4: "),
        ({"top_k": -1, "top_p": 1, "min_p": 0.0}, "sequence_mask", None),
        ({"temperature": 0.7}, "sequence_mask", None),
    ],
    ids=str,
)
def test_sampling_from_another_distribution_is_warned_of(make_trainer, settings, mode, told):
    trainer = make_trainer(vllm_importance_sampling_mode=mode, **settings)
    with warnings.catch_warnings(record=True) as heard:
        warnings.simplefilter("always")
        check(trainer, RolloutConfig())
    texts = [str(w.message) for w in heard if "rollout/truncated_mass" in str(w.message)]
    assert len(texts) == (told is not None)
    assert told is None or re.search(told, texts[0])


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


def test_a_step_of_rollouts_is_one_line_where_no_bar_can_be_drawn(tokenizer, capsys):
    def open_session(**metadata):
        return Session("http://127.0.0.1:9/v1", (None, None), lambda session: None, metadata)

    def agent(session, example):
        if example["prompt"] == "b":
            raise SystemExit("an agent's own")
        return 1.0

    logged = {}
    server = SimpleNamespace(session=open_session, policy_version=3)
    rollouts = AgentRollouts(
        server, RolloutConfig(), agent, SimpleNamespace(log=logged.__setitem__, masked=[])
    )
    main = SimpleNamespace(is_main_process=True)
    trainer = SimpleNamespace(accelerator=main, processing_class=tokenizer)
    rows = rollouts(["a", "b", "c"], trainer)
    assert len(rows["completion_ids"]) == 3 and logged["failed"] == pytest.approx(1 / 3)
    told = capsys.readouterr().err
    lines = [line for line in told.splitlines() if line.startswith("rollout_server: 3 rollouts: ")]
    assert len(lines) == 1 and lines[0].endswith("1 failed") and "\r" not in told
    rollouts = AgentRollouts(server, RolloutConfig(progress=False), agent, rollouts._generation)
    rollouts(["a"], trainer)
    assert "rollouts" not in capsys.readouterr().err
