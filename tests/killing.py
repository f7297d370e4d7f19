"""Killing a trainer, and looking for what it leaves behind."""

import os
import signal
import socket
import subprocess
import sys
import time
import uuid
from pathlib import Path
from urllib.parse import urlsplit

import psutil

SCRIPT = Path(__file__).parent / "trainers" / "cycling.py"
_MARK = "ROLLOUT_SERVER_TEST"


class Doomed:
    """A trainer in a process of its own; `folder` is its temporary folder, empty before and after.

    output: the lines that it has printed go there.
    """

    def __init__(self, model_folder, folder, colocate="sleep"):
        self.mark = uuid.uuid4().hex
        self.folder = Path(folder)
        self.output = self.folder.with_suffix(".out")
        self._before = set(os.listdir("/dev/shm"))
        env = os.environ | {"TMPDIR": str(folder), _MARK: self.mark}
        with open(self.output, "w") as out, open(self.folder.with_suffix(".err"), "w") as err:
            self.process = subprocess.Popen(
                [sys.executable, str(SCRIPT), str(model_folder), colocate], stdout=out, stderr=err,
                env=env,
            )  # fmt: skip

    def wait_for(self, text, seconds=300):
        until = time.monotonic() + seconds
        while text not in self.output.read_text():
            assert self.process.poll() is None, self.folder.with_suffix(".err").read_text()[-2000:]
            assert time.monotonic() < until, self.output.read_text()
            time.sleep(0.05)

    def kill(self, how=signal.SIGKILL):
        """What is left five seconds later, as text; empty if nothing is. And how long it took."""
        started = time.monotonic()
        self.process.send_signal(how)
        self.process.wait(30)
        while (left := self.left()) and time.monotonic() - started < 5:
            time.sleep(0.05)
        return left, time.monotonic() - started

    def left(self):
        found = [f"process {p.pid}: {' '.join(p.cmdline())[:200]}" for p in self._processes()]
        found += [f"file {path}" for path in self.folder.rglob("*")]
        found += [f"/dev/shm/{name}" for name in set(os.listdir("/dev/shm")) - self._before]
        for line in self.output.read_text().splitlines():
            if line.startswith("attached "):
                at = urlsplit(line.split()[1])
                with socket.socket() as sock:
                    if sock.connect_ex((at.hostname, at.port)) == 0:
                        found.append(f"port {at.port}")
        return "\n".join(found)

    def _processes(self):
        """Whoever descends from the trainer."""
        for process in psutil.process_iter():
            try:
                ours = process.environ().get(_MARK) == self.mark
                if ours and process.status() != psutil.STATUS_ZOMBIE:
                    yield process
            except (psutil.Error, OSError):
                continue
