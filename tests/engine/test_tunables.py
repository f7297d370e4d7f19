"""The C library of a CPU engine's process copies past the cache from some size on."""

import multiprocessing
from pathlib import Path

import pytest

from rollout_server.engine.arguments import engine_variables, glibc_tunables
from rollout_server.engine.spawn import engine_children
from rollout_server.weights.wire import STREAMED_BYTES

NAME = "glibc.cpu.x86_non_temporal_threshold"


def test_what_is_given_stays():
    own = f"{NAME}={STREAMED_BYTES:#x}"
    assert glibc_tunables("") == own
    assert glibc_tunables("glibc.malloc.check=3") == f"glibc.malloc.check=3:{own}"
    assert glibc_tunables(f"{NAME}=0x100000000") == f"{NAME}=0x100000000"


def test_an_engine_on_a_gpu_has_none():
    assert "GLIBC_TUNABLES" not in engine_variables(False, False, [None], "folder")


def began_with(path):
    """Writes down what the process was started with, whatever it did to its environment then."""
    Path(path).write_bytes(Path("/proc/self/environ").read_bytes())


@pytest.mark.slow
def test_a_process_has_them_before_anything_runs(tmp_path, monkeypatch):
    monkeypatch.delenv("GLIBC_TUNABLES", raising=False)
    variables = engine_variables(True, True, [None], str(tmp_path))
    with engine_children(str(tmp_path / "log"), variables, []):
        process = multiprocessing.get_context("spawn").Process(
            target=began_with, args=(str(tmp_path / "told"),)
        )
        process.start()
    process.join(60)
    told = (tmp_path / "told").read_bytes().split(b"\0")
    assert f"GLIBC_TUNABLES={NAME}={STREAMED_BYTES:#x}".encode() in told
