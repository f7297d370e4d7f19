"""Ctrl-C, Ctrl-Z, "interrupt kernel": the engine lives, nothing is held, and all goes on."""

import contextlib
import os
import pty
import signal
import sys
import threading
import time
from pathlib import Path

import psutil
import pytest
from jupyter_client.manager import start_new_kernel

TESTS = Path(__file__).parents[1]
SCRIPT, HELPERS = TESTS / "trainers" / "interrupted.py", TESTS / "helpers"
CTRL_C, CTRL_Z = b"\x03", b"\x1a"
pytestmark = [pytest.mark.slow, pytest.mark.timeout(500)]


class Terminal:
    """A shell with a terminal of its own, which runs one script in the foreground."""

    def __init__(self, folder, *command):
        self.output = folder / "told"
        self.output.touch()
        self.screen = b""
        self.pid, self._end = pty.fork()
        if self.pid == 0:
            for number in (signal.SIGHUP, signal.SIGINT, signal.SIGQUIT):
                signal.signal(number, signal.SIG_DFL)  # nohup and scripts have them ignored
            os.environ |= {"PS1": "$ ", "PYTHONPATH": str(HELPERS)}
            os.execvp("bash", ["bash", "--norc", "--noprofile", "-i"])
        os.set_blocking(self._end, False)
        self.type(" ".join(map(str, (*command, self.output))).encode() + b"\n")

    def type(self, keys):
        os.write(self._end, keys)

    def wait_for(self, line, seconds):
        """The whole line that begins like this."""
        until = time.monotonic() + seconds
        while True:
            self._look()
            lines = self.output.read_text().splitlines()
            if found := [one for one in lines if one.startswith(line)]:
                return found[-1]
            assert time.monotonic() < until, f"no {line!r}: {lines}\n{self.screen.decode()[-3000:]}"
            time.sleep(0.01)

    def _look(self):
        with contextlib.suppress(OSError):  # nothing new, or the shell has ended
            self.screen += os.read(self._end, 65536)

    def close(self):
        """The window is closed: what hangs on it gets SIGHUP."""
        os.close(self._end)
        os.waitpid(self.pid, 0)


@pytest.fixture
def terminal(tmp_path, tiny_folder):
    terminal = Terminal(tmp_path, sys.executable, SCRIPT, tiny_folder)
    children = []
    yield terminal
    shell = psutil.Process(terminal.pid)
    children = shell.children(recursive=True)
    terminal.close()
    _, alive = psutil.wait_procs(children, 10)
    left = [process.cmdline() for process in alive]
    for process in alive:
        process.kill()
    assert not left


def test_at_a_terminal(terminal):
    for name in ("generate", "sync", "sleep", "agents", "threads", "train"):
        terminal.wait_for(f"begin {name}", 200)
        time.sleep(0.7)  # any moment will do
        terminal.type(CTRL_C)
        pressed = time.monotonic()
        assert terminal.wait_for(f"end {name}", 10) == f"end {name} interrupted"
        assert time.monotonic() - pressed < 2
        assert terminal.wait_for(f"then {name}", 60) == f"then {name} well"
    terminal.wait_for("begin stop", 10)
    terminal.type(CTRL_Z)
    time.sleep(6)  # twice its liveness_timeout
    terminal.type(b"fg\n")
    terminal.wait_for("end stop", 20)
    assert terminal.wait_for("then stop", 60) == "then stop well"
    assert terminal.wait_for("then storm", 200) == "then storm well"
    terminal.wait_for("begin close", 10)
    for _ in range(3):
        terminal.type(CTRL_C)
        time.sleep(0.05)


CELLS = {
    "generate": "server.generate('One, two,', {'max_tokens': 900, 'ignore_eos': True, 'n': 32})",
    "sync": "while True: server.sync_weights()",
    "sleep": "while True: server.sleep(); server.wake()",
}
ATTACH = """
import sys
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from rollout_server import attach
sys.path.append({1!r})
from support import every_call
model = AutoModelForCausalLM.from_pretrained({0!r}, dtype=torch.float32)
tokenizer = AutoTokenizer.from_pretrained({0!r})
server = attach(model, tokenizer, kv_cache_memory_bytes=64 << 20, progress=False)
engine = server.engine_pid
"""
WELL = """
every_call(server)
assert (server.state, server.engine_pid) == ("awake", engine)
"""


class Kernel:
    """Jupyter's, as its server starts one."""

    def __init__(self):
        self.manager, self.client = start_new_kernel(kernel_name="python3")

    def run(self, code, timeout):
        """None, or the name of the error that the cell ends with."""
        reply = self.client.execute_interactive(
            code, timeout=timeout, output_hook=lambda message: None
        )
        content = reply["content"]
        return None if content["status"] == "ok" else f"{content['ename']}: {content['evalue']}"

    def interrupt_while_running(self, code):
        """What a cell ends with, and how many seconds after the interrupt."""
        threading.Timer(1.0, self._interrupt).start()
        ended = self.run(code, 60)
        return ended, time.monotonic() - self._interrupted

    def _interrupt(self):
        self._interrupted = time.monotonic()
        self.manager.interrupt_kernel()


def test_in_a_notebook(tiny_folder):
    kernel = Kernel()
    try:
        assert kernel.run(ATTACH.format(tiny_folder, str(HELPERS)), 200) is None
        for name, code in CELLS.items():
            ended, seconds = kernel.interrupt_while_running(code)
            assert ended.startswith("KeyboardInterrupt"), (name, ended)
            assert seconds < 2, (name, seconds)
            assert kernel.run(WELL, 60) is None, name
        assert kernel.run("server.close()", 60) is None
    finally:
        kernel.client.stop_channels()
        kernel.manager.shutdown_kernel()
