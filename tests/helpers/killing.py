"""Killing a trainer, and looking for what it leaves behind."""

import contextlib
import ctypes
import fcntl
import functools
import getpass
import os
import pty
import signal
import socket
import subprocess
import sys
import termios
import time
import uuid
from pathlib import Path
from urllib.parse import urlsplit

import psutil

SCRIPT = Path(__file__).parents[1] / "trainers" / "cycling.py"
_LIBC = ctypes.CDLL(None)
_MARK = "ROLLOUT_SERVER_TEST"
CLOSED = "its window is closed"


def _begin(terminal):
    """As a shell in a terminal starts it: where the tests run in the background signals may be
    ignored, which a process has from its parent. It ends with the tests, however they do."""
    _LIBC.prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
    for number in (signal.SIGINT, signal.SIGQUIT, signal.SIGHUP):
        signal.signal(number, signal.SIG_DFL)
    if terminal:
        fcntl.ioctl(0, termios.TIOCSCTTY, 0)


class Doomed:
    """A trainer in a process of its own; `folder` is its temporary folder, empty before and after.

    output: the lines that it has printed go there.
    window: with a terminal, the end of it that the user has.
    """

    def __init__(self, model_folder, folder, colocate="sleep", launcher=(), terminal=False):
        self.mark = uuid.uuid4().hex
        self.folder = Path(folder)
        self._cache = self.folder / f"torchinductor_{getpass.getuser()}"
        self.output = self.folder.with_suffix(".out")
        self._shared = set()
        env = os.environ | {"TMPDIR": str(folder), _MARK: self.mark}
        with open(self.output, "w") as out, open(self.folder.with_suffix(".err"), "w") as err:
            self.window, inside = pty.openpty() if terminal else (None, None)
            self.process = subprocess.Popen(
                [sys.executable, *launcher, str(SCRIPT), str(model_folder), colocate],
                stdin=inside,
                stdout=out,
                stderr=err,
                env=env,
                start_new_session=terminal,
                preexec_fn=functools.partial(_begin, terminal),
            )
            if terminal:
                os.close(inside)

    def wait_for(self, text, seconds=300):
        until = time.monotonic() + seconds
        while text not in self.output.read_text():
            assert self.process.poll() is None, self.folder.with_suffix(".err").read_text()[-2000:]
            assert time.monotonic() < until, self.output.read_text()
            time.sleep(0.05)

    def kill(self, how=signal.SIGKILL, all_of_it=False):
        """What is left five seconds later, as text; empty if nothing is. And how long it took.

        all_of_it: the launcher's children are sent the signal too, as a terminal and a cluster's
        scheduler send it: accelerate leaves its child running when it is ended alone.
        """
        for process in self._processes():
            with contextlib.suppress(psutil.Error):
                self._shared |= {m.path for m in process.memory_maps() if "/dev/shm/" in m.path}
        started = time.monotonic()
        if how is CLOSED:
            os.close(self.window)
        else:
            children = psutil.Process(self.process.pid).children() if all_of_it else []
            for process in [self.process, *children]:
                process.send_signal(how)
        self.process.wait(30)
        while (left := self.left()) and time.monotonic() - started < 5:
            time.sleep(0.05)
        return left, time.monotonic() - started

    def left(self):
        found = [f"process {p.pid}: {' '.join(p.cmdline())[:200]}" for p in self._processes()]
        # torch's cache of what it compiled is meant to stay, torchrun's folder is its own.
        kept = (self._cache, *self.folder.glob("torchelastic_*"))
        files = [p for p in self.folder.rglob("*") if not any(map(p.is_relative_to, kept))]
        found += [f"file {path}" for path in files]
        found += [path for path in self._shared if os.path.exists(path)]
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
