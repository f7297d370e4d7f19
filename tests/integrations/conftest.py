"""TRL's trainers of a tiny model."""

import pytest
import torch
from datasets import Dataset
from support import reward_length, trl_settings
from transformers import AutoModelForCausalLM
from trl import GRPOConfig, GRPOTrainer


@pytest.fixture
def make_trainer(tiny_folder, tokenizer, tmp_path):
    """Makes one; without options a GRPOTrainer of three steps."""

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
