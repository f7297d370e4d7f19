"""Start and end: from scripts, twice in a row, and when it goes wrong. Each starts an engine."""

import gc
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import textwrap
import threading
import time
import weakref
from pathlib import Path

import psutil
import pytest
import torch
from support import MIB, eventually, greedy, tiny_sizes, trainer_logprobs, under_way
from transformers import LlamaConfig, LlamaForCausalLM

import rollout_server.vllm_compat as compat
from rollout_server import RolloutConfig, attach
from rollout_server.errors import (
    AlreadyAttachedError,
    ConfigError,
    EngineMissingError,
    EngineStartError,
    OutOfMemoryError,
    PortInUseError,
    StateError,
    UnsupportedModelError,
)
from rollout_server.weights.policy import Policy

QUICK = {"kv_cache_memory_bytes": 32 * MIB, "progress": False}


def engines():
    """Engine processes of this process."""
    children = psutil.Process().children(recursive=True)
    return [
        p.pid for p in children if "spawn_main" in " ".join(p.cmdline()) or "EngineCore" in p.name()
    ]


def files(folder):
    """What is in a folder, but for torch's own cache, which processes share on purpose."""
    return [p for p in folder.iterdir() if not p.name.startswith("torchinductor_")]


@pytest.fixture
def temporary(monkeypatch):
    """The folder for temporary files during this test; short, since sockets are made in it."""
    folder = tempfile.mkdtemp(prefix="t")
    monkeypatch.setenv("TMPDIR", folder)
    monkeypatch.setattr(tempfile, "tempdir", folder)
    yield Path(folder)
    shutil.rmtree(folder)


@pytest.fixture
def nothing_left(temporary):
    """After the test there is no engine, and no file, folder or socket that it made."""
    before = engines()
    yield
    deadline = time.monotonic() + 5
    while (engines() != before or files(temporary)) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert engines() == before
    assert files(temporary) == []


# -- refused before anything starts -----------------------------------------------------------


def test_no_vllm(monkeypatch, tiny, tokenizer, nothing_left):
    monkeypatch.setattr(compat.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(EngineMissingError, match=r"rollout_server\[cuda\]"):
        attach(tiny, tokenizer, **QUICK)


@pytest.mark.parametrize("version", ["0.25.1", "0.34.0", "1.0.0"])
def test_a_vllm_out_of_range(monkeypatch, tiny, tokenizer, nothing_left, version):
    import vllm

    monkeypatch.setattr(vllm, "__version__", version)
    with pytest.raises(EngineMissingError, match=rf"{version}.*0\.26 to 0\.33"):
        attach(tiny, tokenizer, **QUICK)


@pytest.mark.parametrize("version", ["0.26.0", "0.33.0", "0.33.1+cpu", "0.32.0.post1"])
def test_a_vllm_in_range(monkeypatch, version):
    import vllm

    monkeypatch.setattr(vllm, "__version__", version)
    assert compat.require_vllm() == version


def test_a_port_in_use(tiny, tokenizer, nothing_left):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(PortInUseError, match=f"port={port}"):
            attach(tiny, tokenizer, port=port, **QUICK)
    with pytest.raises(ConfigError, match=r"host='no\.such\.host\.invalid'"):
        attach(tiny, tokenizer, host="no.such.host.invalid", **QUICK)


def test_more_kv_cache_than_memory(tiny, tokenizer, nothing_left):
    with pytest.raises(OutOfMemoryError, match=f"kv_cache_memory_bytes={1 << 50}"):
        attach(tiny, tokenizer, kv_cache_memory_bytes=1 << 50)


def test_an_architecture_that_vllm_lacks(tokenizer, nothing_left):
    class UnheardOf(LlamaForCausalLM):
        pass

    config = LlamaConfig(
        vocab_size=64,
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=2,
        architectures=["UnheardOf"],
    )
    with pytest.raises(UnsupportedModelError, match="UnheardOf"):
        attach(UnheardOf(config), tokenizer, **QUICK)


def test_engine_options_that_vllm_refuses(tiny, tokenizer, nothing_left):
    with pytest.raises(ConfigError, match="no_such_field"):
        attach(tiny, tokenizer, engine_args={"no_such_field": 1}, **QUICK)


# -- engines ----------------------------------------------------------------------------------


@pytest.mark.slow
def test_an_engine_that_cannot_start_says_why(tiny, tokenizer, nothing_left):
    """A KV cache too small for one sequence is found out in the engine's own process."""
    with pytest.raises((EngineStartError, OutOfMemoryError)) as error:
        attach(tiny, tokenizer, kv_cache_memory_bytes=1024, max_model_len=1024, progress=False)
    assert "KV cache" in str(error.value)
    assert "The end of its log:" in str(error.value)


@pytest.mark.slow
def test_an_engine_that_cannot_run_the_model_says_why(tokenizer, nothing_left):
    """vLLM's CPU attention knows no heads of 16: that shows in the first forward pass only."""
    config = LlamaConfig(
        **tiny_sizes(
            len(tokenizer),
            hidden_size=64,
            intermediate_size=64,
            num_hidden_layers=1,
            num_key_value_heads=4,
            max_position_embeddings=64,
        )
    )
    with pytest.raises(EngineStartError, match="head_dim=16"):
        attach(LlamaForCausalLM(config), tokenizer, **QUICK)


@pytest.mark.slow
def test_twice_in_a_row_and_with_a_bf16_engine(tiny, tokenizer, nothing_left, capfd, process_group):
    with attach(tiny, tokenizer, kv_cache_memory_bytes=128 * MIB) as server:
        held = server.memory()
        server.sleep()
        given_back = held["resident"] - server.memory()["resident"]
        assert given_back >= 0.95 * (held["weights"] + held["kv_cache"])
        server.wake()
        shown = capfd.readouterr().err
        for step in ("importing vLLM", "starting the engine", "taking the policy's weights"):
            assert f"{step}" in shown and " s\n" in shown
        with pytest.raises(AlreadyAttachedError, match=server.base_url):
            attach(tiny, tokenizer, **QUICK)
        first = greedy(server, [5, 6, 7])
        port = int(server.base_url.split(":")[2].split("/")[0])
    server.close()  # may be called again
    assert server.state == "closed" and "closed" in repr(server)
    for call in (server.sync_weights, server.sleep, server.wake, server.openai):
        with pytest.raises(StateError, match="closed"):
            call()
    with pytest.raises(StateError, match="closed"):
        server.generate("x")

    # Again: weights untied and in memory only, in a DDP wrapper, fp32 with a bf16 engine, the
    # same port, a key and a name of the user's.
    untied = LlamaForCausalLM(
        LlamaConfig(
            **tiny_sizes(len(tokenizer)),
            tie_word_embeddings=False,
            initializer_range=0.1,
            eos_token_id=tokenizer.eos_token_id,
        )
    )
    with attach(
        torch.nn.parallel.DistributedDataParallel(untied),
        tokenizer,
        dtype="bfloat16",
        port=port,
        api_key="mine",
        in_flight="drain",
        served_model_name="me",
        sampling={"temperature": 0.0, "max_tokens": 3},
        verify_every=1,
        **QUICK,
    ) as server:
        assert f":{port}/" in server.base_url and server.api_key == "mine"
        report = server.sync_weights()
        assert report.verified
        assert report.bytes == sum(p.numel() * 4 for p in untied.parameters())
        answer = greedy(server, [5, 6, 7], tokens=6)
        own = trainer_logprobs(untied, [5, 6, 7], answer.ids)
        assert torch.allclose(torch.tensor(answer.logprobs), own[range(6), answer.ids], atol=0.15)
        assert answer.ids != first.ids
        chats = [
            server.openai().chat.completions.create(
                model="me", messages=[{"role": "user", "content": "Hi"}]
            )
            for _ in range(2)
        ]
        # The server's sampling fields hold where a request gives none.
        assert len({c.choices[0].message.content for c in chats}) == 1
        assert {c.usage.completion_tokens for c in chats} == {3}
        longer = server.openai().chat.completions.create(
            model="me",
            messages=[{"role": "user", "content": "Hi"}],
            max_tokens=7,
            extra_body={"ignore_eos": True},
        )
        assert longer.usage.completion_tokens == 7
        # in_flight="drain": what runs is finished before the engine sleeps.
        version, results = server.policy_version, []
        long = {"max_tokens": 200, "ignore_eos": True}
        thread = threading.Thread(target=lambda: results.extend(server.generate([5, 6], long)))
        thread.start()
        eventually(lambda: under_way(server))
        assert not results
        server.sleep()
        thread.join(5)
        assert results[0].versions == [(version, 0, 200)]
        server.wake()


SCRIPT = """
    import os, sys, time
    print("begins", flush=True)
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from rollout_server import attach

    model = AutoModelForCausalLM.from_pretrained({folder!r}, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained({folder!r})
    server = attach(model, tokenizer, kv_cache_memory_bytes=32 << 20)
    print("engine", server.engine_pid, flush=True)
    print("tokens", len(server.generate("Hello", {{"max_tokens": 4, "ignore_eos": True}})[0].ids))
    {end}
"""


def script(folder, end):
    return textwrap.dedent(SCRIPT).format(folder=folder, end=end)


def gone(pid):
    deadline = time.monotonic() + 10
    while psutil.pid_exists(pid) and time.monotonic() < deadline:
        time.sleep(0.05)
    return not psutil.pid_exists(pid)


@pytest.mark.slow
def test_a_script_without_a_main_guard(tiny_folder, tmp_path, nothing_left):
    """The engine doesn't run the script again, and ends with it, even if it is never closed."""
    path = tmp_path / "train.py"
    path.write_text(script(tiny_folder, "raise KeyError('the script fails here')"))
    # As under accelerate launch, whose variables the engine must not take for its own.
    env = os.environ | {
        "RANK": "0",
        "WORLD_SIZE": "1",
        "LOCAL_RANK": "0",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": "1",
        "ACCELERATE_USE_CPU": "true",
    }
    run = subprocess.run(
        [sys.executable, str(path)], capture_output=True, text=True, timeout=200, env=env
    )
    assert run.stdout.count("begins") == 1, run.stdout
    assert "tokens 4" in run.stdout, run.stderr
    assert "the script fails here" in run.stderr
    assert gone(int(run.stdout.split("engine ")[1].split()[0]))


@pytest.mark.slow
def test_from_standard_input_and_killed(tiny_folder, temporary):
    """`python -`; and SIGKILL of the trainer ends the engine."""
    process = subprocess.Popen(
        [sys.executable, "-"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    process.stdin.write(script(tiny_folder, "time.sleep(600)"))
    process.stdin.close()
    lines = []
    for line in process.stdout:
        lines.append(line)
        if line.startswith("tokens"):
            break
    assert lines[0] == "begins\n" and lines[-1] == "tokens 4\n", lines
    engine = int(lines[1].split()[1])
    assert psutil.pid_exists(engine)
    process.send_signal(signal.SIGKILL)
    process.wait(10)
    assert gone(engine)


def test_a_model_is_freed_after_its_server(monkeypatch):
    """What keeps a second server away keeps nothing alive."""
    module = sys.modules["rollout_server.attach"]

    class Server:
        def __init__(self, policy, config):
            self.policy = policy

    monkeypatch.setattr(module, "RolloutServer", Server)

    def served():
        model = torch.nn.Linear(1, 1)
        module.serve(Policy(model=lambda: model, tokenizer=None, owner=model), RolloutConfig())
        return weakref.ref(model)

    model = served()
    gc.collect()
    assert model() is None
