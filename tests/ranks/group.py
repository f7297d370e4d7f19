"""One of two ranks that have an engine together, and train a LoRA adapter under DDP."""

import os
import signal
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import inside
import psutil
import torch
import torch.distributed as dist
from peft import LoraConfig, get_peft_model
from told import tell
from transformers import AutoModelForCausalLM, AutoTokenizer

from rollout_server import attach
from rollout_server.errors import RolloutServerError

RUNNING = "rollout_server_running_generations"
GREEDY = {"temperature": 0, "max_tokens": 8, "ignore_eos": True}


def raised(work):
    """(seconds until it raised, its error); an error of None if it didn't."""
    started = time.monotonic()
    try:
        work()
    except RolloutServerError as error:
        return time.monotonic() - started, f"{type(error).__name__}: {error}"
    return time.monotonic() - started, None


def same_tokens(model, completion):
    """Whether the trainer's own model would have said the same, and the largest gap in log p."""
    ids = completion.ids
    with torch.no_grad():
        tokens = torch.tensor([[*completion.prompt_ids, *ids]])
        start = len(completion.prompt_ids) - 1
        own = model(input_ids=tokens).logits[0, start:-1].float().log_softmax(-1)
    gap = (own[range(len(ids)), ids] - torch.tensor(completion.logprobs)).abs().max()
    return own.argmax(-1).tolist() == ids, float(gap)


def ask_to_finish(server):
    """The versions that sampled the answer to a long request."""
    with server.openai() as client:
        answer = client.completions.create(
            model="policy",
            prompt=[21, 22, 23],
            max_tokens=300,
            extra_body={"ignore_eos": True, "on_sync": "finish"},
        )
    (spans,) = answer.policy_versions
    return [span["version"] for span in spans]


def main():
    (folder,) = sys.argv[1:]
    dist.init_process_group("gloo")
    torch.set_num_threads(1)
    torch.manual_seed(0)
    rank = dist.get_rank()
    lora = LoraConfig(r=8, target_modules="all-linear", init_lora_weights=False)
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32), lora)
    wrapped = torch.nn.parallel.DistributedDataParallel(model)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    server = attach(
        wrapped,
        AutoTokenizer.from_pretrained(folder),
        peft="adapter",
        progress=False,
        kv_cache_memory_bytes=32 << 20,
        sync_timeout=30,
        wake_timeout=10,
        engine_args={"tensor_parallel_size": 2},
    )
    said = {"key": server.api_key, "urls": server.base_urls}
    steps = []
    for step in range(3):
        server.sleep()
        torch.manual_seed(10 * step + rank)
        ids = torch.randint(0, 1000, (2, 32))
        wrapped(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        report = server.wake()
        server.verify_weights()
        # Prompts of each rank's own; rank 1's go through rank 0.
        completions = server.generate([[21 + rank, i, 23] for i in range(4)], GREEDY)
        pairs = [same_tokens(model, completion) for completion in completions]
        greedy, gap = all(p[0] for p in pairs), max(p[1] for p in pairs)
        steps.append([report.version, report.path, greedy, gap])
    said["steps"] = steps
    said["adapter_bytes"] = server.sync_weights().bytes

    # The engine sleeps once both want it: rank 1 is still at its rollout.
    dist.barrier()
    if rank == 0:
        said["asked"] = time.monotonic()  # one clock for all processes of a machine
        server.sleep()
        said["slept"] = time.monotonic()
    else:
        started = time.monotonic()
        while time.monotonic() - started < 2:
            server.generate([5, 6, 7], GREEDY)
        said["rolled_out"] = time.monotonic()
        server.sleep()
    said["asleep"] = server.state
    server.wake()

    # A failure on one rank: the other learns the reason, and the old version serves on.
    parameter = next(p for p in model.parameters() if p.requires_grad)
    before = server.policy_version
    if rank == 1:
        kept = parameter.detach().clone()
        parameter.data.view(-1)[0] = float("nan")
        vars(inside.config(server))["check_finite"] = "always"
    said["nan"] = raised(server.sync_weights)
    if rank == 1:
        parameter.data.copy_(kept)
    (after,) = server.generate([21, 22, 23], GREEDY)
    said["served_on"] = [server.policy_version == before, after.policy_version == before]
    said["healed"] = server.sync_weights().version == before + 1

    # A request that is to finish first does, and the sync of both waits for it.
    with ThreadPoolExecutor(1) as pool:
        if rank == 0:
            asked = pool.submit(ask_to_finish, server)
            while not asked.done() and not server.metrics()[RUNNING]:
                time.sleep(0.005)
            said["ran"] = not asked.done()
        dist.barrier()
        said["finish"] = raised(server.sync_weights)[1]
        if rank == 0:
            said["finished_by"] = asked.result(60)
            said["newest"] = server.policy_version

    # The engine dies: both are told, by a call of either.
    dist.barrier()
    if rank == 0:
        os.kill(server.engine_pid, signal.SIGKILL)
    dist.barrier()
    said["dead"] = raised(lambda: server.generate([1, 2, 3], GREEDY))
    said["dead_sync"] = raised(server.sync_weights)
    dist.barrier()
    server.close()
    said["children"] = [
        line
        for process in psutil.Process().children()
        if "resource_tracker" not in (line := " ".join(process.cmdline()))
    ]
    said["threads"] = [t.name for t in threading.enumerate() if "rollout" in t.name]
    tell(rank, said)
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
