"""The same server on a GPU: vLLM's own sleep, CUDA IPC. Skipped where there is none."""

import pytest
import torch
from support import greedy, large_step, trainer_logprobs

from rollout_server import attach

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.slow,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU"),
]


@pytest.fixture(scope="module")
def gpu_model(tiny_folder):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(tiny_folder, dtype=torch.bfloat16).to("cuda")


@pytest.fixture(scope="module")
def gpu_server(gpu_model, tokenizer):
    with attach(gpu_model, tokenizer, gpu_memory_utilization=0.3, progress=False) as server:
        yield server


def used():
    free, total = torch.cuda.mem_get_info()
    return total - free


def test_each_step_reaches_the_engine(gpu_server, gpu_model):
    prompt = [21, 22, 23, 24]
    for seed in range(3):
        large_step(gpu_model, prompt, seed)
        gpu_server.sync_weights()
        gpu_server.verify_weights()
        answer = greedy(gpu_server, prompt)
        own = trainer_logprobs(gpu_model, prompt, answer.ids).cpu()
        logprobs = torch.tensor(answer.logprobs)
        assert torch.allclose(logprobs, own[range(12), answer.ids], atol=0.15)


def test_sleep_gives_the_memory_back_and_wake_restores_the_answers(gpu_server):
    before, held = greedy(gpu_server, [31, 32]).ids, gpu_server.memory()
    awake = used()
    gpu_server.sleep()
    assert awake - used() >= 0.95 * (held["weights"] + held["kv_cache"])
    marks = []
    for _ in range(20):
        gpu_server.wake()
        assert greedy(gpu_server, [31, 32]).ids == before
        gpu_server.sleep()
        marks.append(used())
    assert max(marks) <= 1.02 * marks[0]
    gpu_server.wake()


def test_trl_trains(tiny_folder, tokenizer, tmp_path):
    from datasets import Dataset
    from transformers import AutoModelForCausalLM
    from trl import GRPOConfig, GRPOTrainer

    trainer = GRPOTrainer(
        model=AutoModelForCausalLM.from_pretrained(tiny_folder, dtype=torch.float32),
        args=GRPOConfig(
            output_dir=str(tmp_path), bf16=True, report_to=[], save_strategy="no", max_steps=3,
            logging_steps=1, num_generations=4, per_device_train_batch_size=4,
            max_completion_length=8, learning_rate=1e-4,
        ),
        train_dataset=Dataset.from_list([{"prompt": f"Say {i}"} for i in range(16)]),
        reward_funcs=lambda completions, **_: [float(len(c)) for c in completions],
        processing_class=tokenizer,
    )  # fmt: skip
    with attach(trainer, gpu_memory_utilization=0.2, progress=False) as server:
        trainer.train()
        server.verify_weights()
        for log in trainer.state.log_history:
            ratio = log.get("sampling/importance_sampling_ratio/mean", 1.0)
            assert 0.9 < ratio < 1.1
