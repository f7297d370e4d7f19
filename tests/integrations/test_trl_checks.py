"""Trainers and settings of TRL's that are refused or warned of, without an engine."""

import re
import warnings

import pytest
from datasets import Dataset
from rollout_server.integrations.trl import recognises
from rollout_server.integrations.trl_checks import check
from support import reward_length, trl_settings
from trl import SFTConfig, SFTTrainer

from rollout_server import attach
from rollout_server.config import RolloutConfig
from rollout_server.errors import NotAvailableError, TrainerError

pytestmark = pytest.mark.slow


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
def test_images_for_a_tokenizer_are_refused_at_attach(make_trainer, where):
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
    told = f"{name} holds images in its column '{column}'.*processing_class is a"
    with pytest.raises(TrainerError, match=told):
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
