"""On a GPU: steps, PEFT, an optimizer's state, the allocator, TRL. Skipped without one.

Memory, sleep, `share`, restarts and speed: `test_parts.py`.
"""

import os
import subprocess
import sys
import textwrap

import pytest
import torch
from peft import LoraConfig, get_peft_model
from support import MIB, greedy, large_step, trainer_logprobs
from transformers import AutoModelForCausalLM

from rollout_server import attach

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.slow,
    pytest.mark.timeout(600),
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU"),
]
PROMPT = [21, 22, 23, 24]
SMALL = {"kv_cache_memory_bytes": 512 * MIB, "max_model_len": 1024, "progress": False}


def on_gpu(folder, dtype=torch.bfloat16):
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).to("cuda")


@pytest.fixture(scope="module")
def gpu_model(tiny_folder):
    return on_gpu(tiny_folder)


@pytest.fixture(scope="module")
def gpu_server(gpu_model, tokenizer):
    with attach(gpu_model, tokenizer, gpu_memory_utilization=0.3, progress=False) as server:
        yield server


def assert_equal(server, model, atol=0.15):
    server.verify_weights()
    answer = greedy(server, PROMPT)
    own = trainer_logprobs(model, PROMPT, answer.ids).cpu()
    assert torch.allclose(torch.tensor(answer.logprobs), own[range(12), answer.ids], atol=atol)
    return answer.logprobs


def test_each_step_reaches_the_engine(gpu_server, gpu_model):
    before = assert_equal(gpu_server, gpu_model)
    for seed in range(3):
        large_step(gpu_model, PROMPT, seed)
        report = gpu_server.sync_weights()
        assert report.path == "plan", report.reason
        after = assert_equal(gpu_server, gpu_model)
        assert after != before
        before = after


@pytest.mark.parametrize("how", ["merge", "adapter"])
def test_peft(tiny_folder, tokenizer, how):
    torch.manual_seed(0)
    config = LoraConfig(target_modules=["q_proj", "v_proj", "down_proj"], init_lora_weights=False)
    model = get_peft_model(on_gpu(tiny_folder), config)
    adapter = sum(p.nbytes for n, p in model.named_parameters() if "lora_" in n)
    with attach(model, tokenizer, peft=how, **SMALL) as server:
        for seed in range(3):
            torch.manual_seed(seed)
            with torch.no_grad():
                for name, parameter in model.named_parameters():
                    if "lora_" in name:
                        parameter.add_(torch.randn_like(parameter) * 0.02)
            if seed == 1:
                server.sleep()
            report = server.sync_weights()
            if how == "adapter" and seed != 1:
                assert report.bytes == adapter
            assert_equal(server, model, atol=0.3)


def test_the_optimizers_state_waits_in_host_memory(tiny_folder, tokenizer):
    model = on_gpu(tiny_folder, torch.float32)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)

    def step():
        ids = torch.randint(0, 1000, (2, 32), device="cuda")
        model(ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    step()
    state = sum(v.nbytes for s in optimizer.state.values() for v in s.values() if v.is_cuda)
    options = SMALL | {"offload_optimizer": True, "dtype": "bfloat16"}
    with attach(model, tokenizer, optimizer=optimizer, **options) as server:
        for _ in range(3):
            server.sleep()
            step()
            assert server.memory()["optimizer"] == 0
            training = torch.cuda.memory_allocated()
            server.wake()
            assert server.memory()["optimizer"] == state
            assert training - torch.cuda.memory_allocated() >= 0.95 * state
            greedy(server, PROMPT)
        step()  # the engine is put to sleep by itself, and the state is there
        assert server.state == "asleep"


def test_expandable_segments_are_handled_or_refused_with_the_remedy(tiny_folder, tokenizer):
    """In a process of its own, since the allocator's settings are read at its start."""
    script = textwrap.dedent(f"""
        import torch
        from transformers import AutoModelForCausalLM, AutoTokenizer
        from rollout_server import attach
        model = AutoModelForCausalLM.from_pretrained({tiny_folder!r}, dtype=torch.bfloat16).cuda()
        tokenizer = AutoTokenizer.from_pretrained({tiny_folder!r})
        try:
            with attach(model, tokenizer, kv_cache_memory_bytes=64 << 20) as server:
                server.verify_weights()
                print("HANDLED")
        except Exception as error:
            print("REFUSED", "expandable_segments:False" in str(error))
    """)
    env = os.environ | {"PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True"}
    run = subprocess.run(
        [sys.executable, "-c", script], env=env, capture_output=True, text=True, timeout=500
    )
    assert "HANDLED" in run.stdout or "REFUSED True" in run.stdout, run.stdout + run.stderr[-3000:]


def test_trl_trains(tiny_folder, tokenizer, tmp_path):
    from datasets import Dataset
    from trl import GRPOConfig, GRPOTrainer

    trainer = GRPOTrainer(
        model=AutoModelForCausalLM.from_pretrained(tiny_folder, dtype=torch.float32),
        args=GRPOConfig(
            output_dir=str(tmp_path),
            bf16=True,
            report_to=[],
            save_strategy="no",
            max_steps=3,
            logging_steps=1,
            num_generations=4,
            per_device_train_batch_size=4,
            max_completion_length=8,
            learning_rate=1e-4,
        ),
        train_dataset=Dataset.from_list([{"prompt": f"Say {i}"} for i in range(16)]),
        reward_funcs=lambda completions, **_: [float(len(c)) for c in completions],
        processing_class=tokenizer,
    )
    options = {"gpu_memory_utilization": 0.2, "offload_optimizer": True, "progress": False}
    with attach(trainer, **options) as server:
        trainer.train()
        server.verify_weights()
    name = "sampling/importance_sampling_ratio/mean"
    ratios = [log[name] for log in trainer.state.log_history if name in log]
    assert len(ratios) == 3, f"TRL logs {name} at each step"
    assert all(0.9 < ratio < 1.1 for ratio in ratios)
