"""Several processes: real process groups, an engine each, and what happens when one fails."""

import multiprocessing
import os
import signal
import socket
import subprocess
import sys
import time
from datetime import timedelta
from pathlib import Path

import pytest
import torch.distributed as dist
from told import told

from rollout_server.errors import DeadlineError, RankError
from rollout_server.ranks import Ranks

SCRIPTS = Path(__file__).parent / "ranks"
ROOT = Path(__file__).parents[1]
HELPERS = str(ROOT / "tests" / "helpers")
MIB = 1 << 20


def start(script, *args, told):
    """A script of tests/ranks on two ranks."""
    env = os.environ | {
        "TOLD": str(told),
        "OMP_NUM_THREADS": "1",
        "DS_ACCELERATOR": "cpu",
        "PYTHONPATH": os.pathsep.join((str(Path(sys.prefix) / "deepspeed"), HELPERS)),
    }
    return subprocess.Popen(
        [
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--standalone",
            "--nproc_per_node",
            "2",
            str(SCRIPTS / script),
            *map(str, args),
        ],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        env=env,
        cwd=ROOT,
    )


@pytest.fixture
def port():
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return sock.getsockname()[1]


KINDS = ("fsdp2", "ddp", "fsdp1", "zero3")


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_each_rank_has_the_policy_after_each_step(tiny_folder, tmp_path):
    """For each kind three optimizer steps on each rank's own data; `verify_weights` after each.
    Then engines die in syncs."""
    bucket = 8 * MIB
    process = start("train.py", ",".join(KINDS), tiny_folder, bucket, "", told=tmp_path)
    _, errors = process.communicate(timeout=380)
    assert process.returncode == 0, errors[-4000:]
    first, second = told(tmp_path)
    for kind in KINDS:
        mine, other = first["kinds"][kind], second["kinds"][kind]
        print(kind, mine)
        assert mine["version"] == other["version"]
        assert mine["answers"] == other["answers"]
        assert mine["answers"][0] != mine["answers"][-1], "the steps changed nothing"
        for line in (mine, other):
            assert line["greedy"] and line["gap"] < 1e-3
            assert line["path"] == "plan"
    sharded = [line["kinds"]["fsdp2"] for line in (first, second)]
    assert min(line["tensors"] for line in sharded) > 26, "nothing came in pieces"
    assert max(line["peak"] for line in sharded) <= 2 * bucket + MIB
    assert first["urls"] == second["urls"] == [first["own"], second["own"]]
    newest = first["kinds"][KINDS[-1]]["version"]
    assert first["reached"] == second["reached"] == [newest, newest]
    assert first["key"] == second["key"]
    for mine, other in zip(first["mended"], second["mended"], strict=True):
        assert mine["ids"] == other["ids"] and mine["versions"] == other["versions"]
        assert mine["versions"][1] > mine["versions"][0]
        assert mine["state"] == other["state"] == "awake"
    assert [[step["another"] for step in line["mended"]] for line in (first, second)] == [
        [False, True],
        [True, False],
    ]


@pytest.mark.slow
@pytest.mark.timeout(400)
@pytest.mark.parametrize("peft", ["merge", "adapter"])
def test_adapters_that_are_sharded(tiny_folder, tmp_path, peft):
    """As above, of LoRA models with a module trained as it is; `verify_weights` after each step."""
    kinds = ("fsdp2-lora", "zero3-lora")
    process = start("train.py", ",".join(kinds), tiny_folder, MIB, peft, told=tmp_path)
    _, errors = process.communicate(timeout=380)
    assert process.returncode == 0, errors[-4000:]
    first, second = told(tmp_path)
    for kind in kinds:
        mine, other = first["kinds"][kind], second["kinds"][kind]
        print(kind, mine)
        assert mine["answers"] == other["answers"]
        assert mine["answers"][0] != mine["answers"][-1], "the steps changed nothing"
        for line in (mine, other):
            assert line["greedy"] and line["gap"] < 1e-3


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_what_ranks_with_one_engine_do_to_each_other(tiny_folder, tmp_path):
    process = start("group.py", tiny_folder, told=tmp_path)
    _, errors = process.communicate(timeout=280)
    assert process.returncode == 0, errors[-4000:]
    first, second = told(tmp_path)
    assert first["urls"] == second["urls"] and len(first["urls"]) == 1
    for line in (first, second):
        assert [step[0] for step in line["steps"]] == [1, 2, 3]
        assert all(greedy and gap < 1e-3 for _, _, greedy, gap in line["steps"])
        assert line["adapter_bytes"] < MIB, "more went than the adapter"
        assert line["asleep"] == "asleep" and line["healed"]
        assert line["served_on"] == [True, True]
        assert line["nan"][0] < 10 and "hold NaN or infinity in" in line["nan"][1]
        assert line["dead"][0] < 10 and line["dead"][1].startswith("EngineDeadError")
        assert line["dead_sync"][0] < 10 and "EngineDeadError" in line["dead_sync"][1]
        assert not line["children"] and not line["threads"]
    slept_after = first["asked"] < second["rolled_out"] < first["slept"]
    assert slept_after, "it slept in the other's rollout"
    assert "rank 1 failed" in first["nan"][1]
    assert first["ran"] and first["finish"] is None and second["finish"] is None
    assert first["finished_by"] == [first["newest"] - 1]


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.parametrize("together", [1, 2], ids=["an engine each", "one engine"])
def test_grpo_under_fsdp2(tiny_folder, tmp_path, together):
    """TRL's own loop; accelerate wraps the model after attach()."""
    said = tmp_path / "told"
    said.mkdir()
    run = subprocess.run(
        [
            sys.executable,
            "-m",
            "accelerate.commands.launch",
            "--config_file",
            str(SCRIPTS / "fsdp2.yaml"),
            str(SCRIPTS / "grpo.py"),
            tiny_folder,
            str(tmp_path),
            str(together),
        ],
        capture_output=True,
        text=True,
        timeout=280,
        cwd=ROOT,
        env=os.environ
        | {
            "OMP_NUM_THREADS": "1",
            "GLOO_SOCKET_IFNAME": "lo",
            "TOLD": str(said),
            "PYTHONPATH": HELPERS,
        },
    )
    assert run.returncode == 0, run.stderr[-4000:]
    first, second = told(said)
    for line in (first, second):
        assert line["model"].startswith("FSDP") and line["version"] == 3
        assert len(line["ratios"]) == 2
        assert all(0.95 < ratio < 1.05 for ratio in line["ratios"])
        assert max(line["differences"]) < 1e-3


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_a_rank_that_is_killed_in_a_sync_fails_the_other_in_time(tiny_folder, tmp_path, port):
    # Not by torchrun, which ends the others itself.
    launched = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    launched |= {"TOLD": str(tmp_path), "PYTHONPATH": HELPERS}
    processes = [
        subprocess.Popen(
            [sys.executable, str(SCRIPTS / "train.py"), "killed", tiny_folder, str(8 * MIB), ""],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            cwd=ROOT,
            env=os.environ | launched | {"RANK": str(rank), "OMP_NUM_THREADS": "1"},
        )
        for rank in range(2)
    ]
    _, errors = processes[0].communicate(timeout=280)
    assert processes[1].wait(5) == -signal.SIGKILL
    (line,) = told(tmp_path)
    assert line["error"] == "WeightSyncError", errors[-3000:]
    assert "another rank may have ended" in line["text"]
    assert line["seconds"] < line["deadline"]
    assert line["state"] == "broken", "half of the new weights are served"


# -- agreement, without an engine -------------------------------------------------------------


def _rank(rank, port, script, results, over):
    store = dist.TCPStore("127.0.0.1", port, 2, rank == 0, timeout=timedelta(seconds=60))
    dist.init_process_group("gloo", store=store, rank=rank, world_size=2)
    ranks = Ranks.join()
    try:
        results.put((rank, script(ranks)))
    except Exception as error:
        results.put((rank, error))
    if rank == 0:
        over.wait(20)  # it keeps the store
    else:
        over.set()
    dist.destroy_process_group()


def together(script, port):
    context = multiprocessing.get_context("fork")
    results, over = context.Queue(), context.Event()
    processes = [
        context.Process(target=_rank, args=(rank, port, script, results, over), daemon=True)
        for rank in range(2)
    ]
    for process in processes:
        process.start()
    found = dict(results.get(timeout=60) for _ in range(2))
    for process in processes:
        process.join(20)
        process.kill()
    return found[0], found[1]


def test_a_process_alone_needs_nobody():
    ranks = Ranks.join()
    assert (ranks.rank, ranks.size, ranks.local_rank) == (0, 1, 0)
    assert ranks.gather("x", 5, 0.1) == [5]
    with ranks.together("x", 0.1):
        pass
    with pytest.raises(KeyError), ranks.together("x", 0.1):
        raise KeyError


def test_values_come_in_the_order_of_the_ranks(port):
    first, second = together(lambda r: [r.gather("x", r.rank + i, 20) for i in range(5)], port)
    assert first == second == [[i, i + 1] for i in range(5)]


def _one_fails(ranks):
    with ranks.together("sync", 20):
        pass
    with ranks.together("sync", 20):
        if ranks.rank == 1:
            raise ValueError("no memory left")


def test_a_failure_of_one_is_a_failure_of_all_with_its_reason(port):
    first, second = together(_one_fails, port)
    assert isinstance(second, ValueError)
    assert isinstance(first, RankError)
    assert "rank 1 failed: ValueError: no memory left" in str(first)


def _one_is_absent(ranks):
    if ranks.rank == 1:
        time.sleep(2.5)
        return None
    started = time.monotonic()
    try:
        ranks.gather("sync_weights()", None, 1.0)
    except DeadlineError as error:
        return time.monotonic() - started, str(error)


def test_a_rank_alone_is_told_who_is_missing(port):
    (seconds, text), _ = together(_one_is_absent, port)
    assert 0.9 < seconds < 2.4
    assert "sync_weights(): rank 1 didn't come within 1 s" in text


def test_ranks_that_call_different_things_are_told(port):
    first, second = together(lambda r: r.gather(["sync", "verify"][r.rank], None, 20), port)
    assert isinstance(first, RankError) and "rank 1 called verify" in str(first)
    assert isinstance(second, RankError) and "rank 0 called sync" in str(second)
