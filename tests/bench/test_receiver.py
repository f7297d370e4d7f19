"""vLLM's "ipc" transfer in an environment without ray."""

import importlib.util
import subprocess
import sys
import textwrap


def test_a_module_that_imports_ray_is_imported_without(tmp_path):
    """As vLLM 0.26 does at the top of its transfer engine; in a process of its own."""
    (tmp_path / "transfer.py").write_text("import ray\nLOADED = True\n")
    script = textwrap.dedent(f"""
        import sys
        sys.path.insert(0, {str(tmp_path)!r})
        from rollout_server.bench import receiver
        assert "vllm.distributed.weight_transfer.ipc_engine" in sys.modules
        receiver.import_without_ray("transfer")
        import importlib.util, transfer
        print(transfer.LOADED, "ray" in sys.modules, importlib.util.find_spec("ray"))
    """)
    assert importlib.util.find_spec("ray") is None, "this test is of an environment without it"
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=200
    )
    assert done.stdout.split() == ["True", "False", "None"], done.stderr[-3000:]
