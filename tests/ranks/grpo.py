"""One rank of TRL's GRPO under accelerate's FSDP2; started by `accelerate launch`.

accelerate never chooses FSDP on a CPU; the first lines have it do so.
"""
# ruff: noqa: E402

import os
import sys

from accelerate.state import PartialState
from accelerate.utils import DistributedType

os.environ["ACCELERATE_TORCH_DEVICE"] = "cpu"
PartialState._prepare_backend = lambda *_, **__: ("gloo", DistributedType.MULTI_GPU)

import torch
from datasets import Dataset
from told import tell
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import GRPOConfig, GRPOTrainer

from rollout_server import attach

folder, output, together = sys.argv[1:]
torch.set_num_threads(1)
tokenizer = AutoTokenizer.from_pretrained(folder)
trainer = GRPOTrainer(
    model=AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32),
    args=GRPOConfig(
        output_dir=output,
        report_to=[],
        save_strategy="no",
        max_steps=2,
        logging_steps=1,
        num_generations=4,
        per_device_train_batch_size=4,
        max_completion_length=8,
        learning_rate=1e-3,
        bf16=False,
        seed=0,
    ),
    train_dataset=Dataset.from_list([{"prompt": f"Say {i}"} for i in range(16)]),
    reward_funcs=lambda completion_ids, **_: [float(sum(c) % 7) for c in completion_ids],
    processing_class=tokenizer,
)
options = {
    "kv_cache_memory_bytes": 32 << 20,
    "sync_bucket_bytes": 8 << 20,
    "progress": False,
    "engine_args": {"tensor_parallel_size": int(together)},
}
with attach(trainer, **options) as server:
    trainer.train()
    server.verify_weights()
    logs = [log for log in trainer.state.log_history if "rollout/policy_version" in log]
    tell(
        trainer.accelerator.process_index,
        {
            "model": type(trainer.model).__name__,
            "version": server.policy_version,
            "ratios": [log["sampling/importance_sampling_ratio/mean"] for log in logs],
            "differences": [log["rollout/logp_difference"] for log in logs],
        },
    )
