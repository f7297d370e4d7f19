"""`python -m rollout_server.doctor memory`: its answers, its exit status, its refusals."""

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from pages import rows_of
from transformers import Qwen3Config

from rollout_server.doctor.memory import main

GPU = ["--gpu", "80GiB", "--trainer", "adamw-bf16"]


def asked(capsys, folder, *options):
    """(exit status, what it printed, what it printed to standard error)."""
    status = main(["--model", folder, *options])
    return status, *capsys.readouterr()


def number(text, row):
    """The first figure of a row, in MiB."""
    found = re.search(rf"^{re.escape(row)} +([\d.]+) (KiB|MiB|GiB)", text, flags=re.M)
    return float(found[1]) * {"KiB": 2**-10, "MiB": 1, "GiB": 1024}[found[2]]


def test_it_fits(tiny_folder, capsys):
    status, out, _ = asked(capsys, tiny_folder, *GPU)
    assert status == 0 and "It fits: a KV cache of" in out
    assert "qwen2, 0.01 billion parameters; trainer adamw-bf16" in out
    assert number(out, "trainer: optimizer state") == pytest.approx(
        2 * number(out, "trainer: weights"), rel=0.1
    )


def test_a_file_is_as_good_as_its_folder(tiny_folder, capsys):
    by_folder = asked(capsys, tiny_folder, *GPU)
    assert asked(capsys, f"{tiny_folder}/config.json", *GPU) == by_folder


def test_it_doesnt_fit(smollm2, capsys):
    options = ["--gpu", "6GiB", "--trainer", "adamw-fp32", "--kv-cache", "5GiB"]
    status, out, _ = asked(capsys, smollm2, *options)
    assert status == 1 and "It doesn't fit: rollout is over by" in out
    size = re.search(r"kv_cache_memory_bytes=(\d+) would make it fit", out)[1]
    options[-1] = f"{size}B"
    assert asked(capsys, smollm2, *options)[0] == 0
    options[-1] = f"{int(size) + (2 << 20)}B"
    assert asked(capsys, smollm2, *options)[0] == 1, "the largest that fits"


def test_what_the_options_do(smollm2, capsys):
    def row(name, trainer, *options):
        asked_for = asked(capsys, smollm2, "--gpu", "24GiB", "--trainer", trainer, *options)
        return number(asked_for[1], name)

    weights = "trainer: weights"
    assert row(weights, "adamw-fp32") == pytest.approx(2 * row(weights, "adamw-bf16"), rel=0.01)
    assert row("engine: weights", "adamw-bf16-amp") == row("engine: weights", "adamw-bf16")
    assert row(weights, "adamw-bf16-amp") == row(weights, "adamw-fp32")
    assert row(weights, "adamw-bf16", "--ranks", "2") == pytest.approx(
        row(weights, "adamw-bf16") / 2, abs=1
    )
    state = "trainer: optimizer state"
    assert row(state, "lora-adamw-bf16") < row(state, "adamw-bf16") / 5
    assert row(state, "lora-adamw-bf16", "--lora-rank", "32") == pytest.approx(
        2 * row(state, "lora-adamw-bf16"), abs=1
    )
    assert row("engine: KV cache", "adamw-bf16", "--kv-cache", "2GiB") == 2048


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (["--gpu", "80", "--trainer", "adam"], "--trainer='adam'"),
        (["--gpu", "eighty", "--trainer", "adamw-bf16"], "--gpu='eighty': give a size"),
        (["--gpu", "80GiB", "--trainer", "adamw-int4"], "the precision one of bf16-amp"),
        ([*GPU, "--colocate", "shared"], "--colocate='shared': give one of sleep"),
        ([*GPU, "--ranks", "0"], "--ranks=0: give at least 1"),
        ([*GPU, "--dtype", "bf16"], "--dtype='bf16': give auto, bfloat16"),
        ([*GPU, "--kv-cache", "-1GiB"], "--kv-cache"),
        ([*GPU, "--max-model-len", "0"], "max_model_len=0: give a whole number"),
        ([*GPU, "--gpu-memory-utilization", "2"], "gpu_memory_utilization=2.0"),
        ([*GPU, "--colocate", "share", "--ranks", "2"], "use --colocate=sleep"),
        ([*GPU, "--colocate", "resident", "--offload-optimizer"], "offload_optimizer=True with"),
    ],
)
def test_bad_options_are_named(tiny_folder, capsys, options, told):
    try:
        status, out, error = asked(capsys, tiny_folder, *options)
    except SystemExit as end:  # argparse's own
        status, (out, error) = end.code, capsys.readouterr()
    assert status == 2 and not out and told in error


def test_the_table_of_the_page(tmp_path, capsys):
    config = Qwen3Config(
        vocab_size=151936,
        hidden_size=2560,
        intermediate_size=9728,
        num_hidden_layers=36,
        num_attention_heads=32,
        num_key_value_heads=8,
        head_dim=128,
        max_position_embeddings=40960,
        tie_word_embeddings=True,
        architectures=["Qwen3ForCausalLM"],
    )
    config.save_pretrained(tmp_path)
    status, out, _ = asked(capsys, str(tmp_path), *GPU, "--max-model-len", "8192")
    said = [re.split(r" {2,}", line.strip()) for line in out.splitlines()[3:-2]]
    page = (Path(__file__).parents[2] / "docs/memory.md").read_text()
    written = [row for row in rows_of(page) if len(row) == 4][1:]
    assert status == 0 and written == said


@pytest.mark.slow
def test_the_command_of_the_page(tiny_folder):
    """As the page has it, with a model that is there; without a GPU and without vLLM."""
    page = (Path(__file__).parents[2] / "docs/memory.md").read_text()
    line = re.search(r"^(python -m rollout_server\.doctor memory .*?[^\\])$", page, re.M | re.S)[1]
    words = shlex.split(line.replace("\\\n", " "))
    given = ["-m", "rollout_server.doctor", "memory", *words[4:]]
    given[given.index("--model") + 1] = tiny_folder
    code = (
        "import runpy, sys; sys.modules['vllm'] = None; sys.argv = ['doctor', *sys.argv[1:]]\n"
        "runpy.run_module('rollout_server.doctor', run_name='__main__')"
    )
    for command in (given, ["-c", code, *given[2:]]):
        done = subprocess.run([sys.executable, *command], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        assert "It fits" in done.stdout
