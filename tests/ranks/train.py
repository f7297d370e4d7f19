"""One rank of a training loop of our own: torchrun ... train.py KINDS FOLDER BUCKET-BYTES PEFT.

PEFT is "merge" or "adapter", or empty for an engine of the base.
"""

import hashlib
import os
import signal
import sys
import threading
import time

import inside
import psutil
import torch
import torch.distributed as dist
from told import tell
from transformers import AutoModelForCausalLM, AutoTokenizer

from rollout_server import RolloutConfig, attach
from rollout_server.attach import serve
from rollout_server.weights.policy import Policy
from rollout_server.weights.sources import fsdp2

MIB = 1 << 20


class Torch:
    """A model and its optimizer, as torch wraps and steps them."""

    def __init__(self, model):
        self.model = model
        self.optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)

    def step(self, ids):
        self.model(input_ids=ids, labels=ids).loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()


class Zero3:
    """The same with DeepSpeed."""

    def __init__(self, model):
        import deepspeed

        settings = {
            "train_micro_batch_size_per_gpu": 2,
            "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0},
            "zero_allow_untested_optimizer": True,
            "zero_force_ds_cpu_optimizer": False,
        }
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        self.model = deepspeed.initialize(model=model, optimizer=optimizer, config=settings)[0]

    def step(self, ids):
        self.model.backward(self.model(input_ids=ids, labels=ids).loss)
        self.model.step()


def with_adapter(model):
    """LoRA on attention and the MLP, and the norms of the last layer trained as they are."""
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(
        r=8,
        target_modules="all-linear",
        init_lora_weights=False,
        modules_to_save=["model.norm"],
    )
    return get_peft_model(model, config)


def wrapped(kind, model):
    kind, _, tuner = kind.partition("-")
    if tuner == "lora":
        model = with_adapter(model)
    if kind == "zero3":
        return Zero3(model)
    return Torch(_wrapped(kind, model))


def _wrapped(kind, model):
    if kind == "ddp":
        return torch.nn.parallel.DistributedDataParallel(model)
    if kind == "fsdp2":
        from torch.distributed.fsdp import fully_shard

        for layer in base_of(model).layers:
            fully_shard(layer)
        return fully_shard(model)
    if kind == "fsdp1":
        from functools import partial

        from torch.distributed.fsdp import FullyShardedDataParallel
        from torch.distributed.fsdp.wrap import transformer_auto_wrap_policy

        policy = partial(
            transformer_auto_wrap_policy, transformer_layer_cls={type(model.model.layers[0])}
        )
        return FullyShardedDataParallel(
            model, auto_wrap_policy=policy, use_orig_params=True, device_id=torch.device("cpu")
        )
    raise ValueError(kind)


def base_of(model):
    """The stack of layers, inside an adapter's model too."""
    return (model.get_base_model() if hasattr(model, "peft_config") else model).model


class Peak:
    """The highest resident memory of this process while it is active, over that at its start."""

    def __enter__(self):
        self._process = psutil.Process()
        self._start = self.extra = self._process.memory_info().rss
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()
        return self

    def _watch(self):
        while not self._over.wait(0.001):
            self.extra = max(self.extra, self._process.memory_info().rss)

    def __exit__(self, *_):
        self._over.set()
        self._thread.join()
        self.extra -= self._start


def run(kind, server, current, folder):
    """Three optimizer steps on this rank's own data; the engine follows."""
    torch.manual_seed(0)
    trained = wrapped(kind, AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32))
    current[0] = model = trained.model
    answers, rank = [], dist.get_rank()
    for step in range(3):
        server.sleep()
        torch.manual_seed(10 * step + rank)
        trained.step(torch.randint(0, 1000, (2, 32)))
        server.wake()
        server.verify_weights()
        (completion,) = server.generate(
            [21, 22, 23], {"temperature": 0, "max_tokens": 8, "ignore_eos": True}
        )
        answers.append(completion.ids)
    server.sync_weights()
    with Peak() as peak:
        report = server.sync_weights()
    # The trainer's own model, as it is now, says the same.
    with torch.no_grad():
        tokens = torch.tensor([[21, 22, 23, *completion.ids]])
        own = model(input_ids=tokens).logits[0, 2:-1].float().log_softmax(-1)
    gap = (own[range(8), completion.ids] - torch.tensor(completion.logprobs)).abs().max()
    return {
        "version": server.policy_version,
        "answers": answers,
        "gap": float(gap),
        "greedy": own.argmax(-1).tolist() == completion.ids,
        "path": report.path,
        "bytes": report.bytes,
        "tensors": report.tensors,
        "seconds": report.seconds,
        "peak": peak.extra,
    }


def mended(server, current, folder, rank):
    """An engine dies in a sync, one at its first write, then the other's when it is to resume."""
    torch.manual_seed(1)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    for layer in model.model.layers[1:]:
        layer.requires_grad_(False)
    current[0] = _wrapped("fsdp2", model)
    server.sync_weights()  # from here on frozen tensors stay where they are
    lines = []
    for dying, step in ((1, "write_weights"), (0, "set_weight_version")):
        if rank == dying:
            dies_at(server, step)
        version, pid = server.policy_version, server.engine_pid
        server.sync_weights()
        server.verify_weights()
        (completion,) = server.generate([21, 22, 23], {"temperature": 0, "max_tokens": 8})
        lines.append(
            {
                "versions": [version, server.policy_version],
                "ids": completion.ids,
                "state": server.state,
                "another": server.engine_pid != pid,
            }
        )
    return lines


def dies_at(server, step):
    """The engine is killed as it is asked for the step, the next time."""
    engine = inside.engine(server)
    whole = getattr(engine, step)

    async def killed(*args):
        setattr(engine, step, whole)
        os.kill(server.engine_pid, signal.SIGKILL)
        return await whole(*args)

    setattr(engine, step, killed)


def main():
    kinds, folder, bucket, peft = sys.argv[1].split(","), sys.argv[2], int(sys.argv[3]), sys.argv[4]
    dist.init_process_group("gloo")
    torch.set_num_threads(1)
    rank = dist.get_rank()
    if kinds == ["killed"]:
        return killed(folder, rank)
    # One engine for all kinds: a trainer, too, wraps its model after attach().
    current = [AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)]
    if peft == "adapter":
        current[0] = with_adapter(current[0])
    policy = Policy(
        model=lambda: current[0], tokenizer=AutoTokenizer.from_pretrained(folder), owner=current[0]
    )
    config = RolloutConfig(
        kv_cache_memory_bytes=32 * MIB,
        progress=False,
        sync_bucket_bytes=bucket,
        sync_timeout=60,
        peft=peft or "merge",
    )
    with serve(policy, config) as server:
        results = {kind: run(kind, server, current, folder) for kind in kinds}
        dist.barrier()  # no request while the other's weights move
        tell(
            rank,
            {
                "urls": server.base_urls,
                "own": server.base_url,
                "kinds": results,
                "reached": [ask(server, url) for url in server.base_urls],
                "key": hashlib.sha256(server.api_key.encode()).hexdigest(),
                "mended": [] if peft else mended(server, current, folder, rank),
            },
        )
        dist.barrier()
    dist.destroy_process_group()


def killed(folder, rank):
    """Rank 1 is killed while it gathers the second bucket: the first is in rank 0's engine."""
    model = _wrapped("fsdp2", AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32))
    tokenizer = AutoTokenizer.from_pretrained(folder)
    server = attach(
        model,
        tokenizer,
        kv_cache_memory_bytes=32 * MIB,
        progress=False,
        sync_timeout=15,
        sync_bucket_bytes=8 * MIB,
    )
    if rank == 1:
        gather, gathered = fsdp2._all_gather, []

        def last_gather(*args, **options):
            if gathered:
                os.kill(os.getpid(), signal.SIGKILL)
            gathered.append(gather(*args, **options))

        fsdp2._all_gather = last_gather
    started = time.monotonic()
    try:
        server.sync_weights()
        outcome = {"error": None, "text": ""}
    except Exception as error:
        outcome = {"error": type(error).__name__, "text": str(error)}
    tell(
        rank,
        outcome
        | {
            "seconds": time.monotonic() - started,
            "deadline": 15,
            "state": server.state,
        },
    )
    server.close()


def ask(server, url):
    answer = server.openai(base_url=url).completions.create(
        model="policy", prompt=[21, 22, 23], max_tokens=4, temperature=0
    )
    return answer.policy_version


if __name__ == "__main__":
    main()
