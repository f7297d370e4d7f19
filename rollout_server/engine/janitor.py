"""Removes a server's temporary folder, and torch's files in shared memory, when its process has
ended without doing so, killed for one.

A process of its own, since nothing runs in one that gets SIGKILL. It needs the standard library
alone: it is started as a script, without the package.
"""

import contextlib
import os
import re
import select
import shutil
import subprocess
import sys
import time

_SHM = "/dev/shm"
_OF_TORCH = re.compile(r"torch_\d+(_\d+)+")
_PATIENCE = 4.0  # seconds, in which processes of the same fate may still write


class Janitor:
    """Waits for the end of this process. `dismiss` it before the folder is removed otherwise.

    names: of a file in the folder, with those of files in shared memory, a line each.
    """

    def __init__(self, folder: str, names: str):
        command = [sys.executable, "-I", "-S", __file__, str(os.getpid()), folder, names]
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
            cwd="/",
        )

    def dismiss(self) -> None:
        self._process.kill()
        self._process.wait()


def main(pid: int, folder: str, names: str) -> None:
    _wait_for_end_of(pid)
    _remove_shared(os.path.join(folder, names))
    until = time.monotonic() + _PATIENCE
    while os.path.lexists(folder) and time.monotonic() < until:
        shutil.rmtree(folder, ignore_errors=True)
        time.sleep(0.05)


def _remove_shared(names: str) -> None:
    with contextlib.suppress(OSError), open(names, encoding="utf-8") as file:
        for name in file.read().split():
            if _OF_TORCH.fullmatch(name):
                with contextlib.suppress(OSError):
                    os.unlink(os.path.join(_SHM, name))


def _wait_for_end_of(pid: int) -> None:
    """The process is this one's parent."""
    with contextlib.suppress(OSError, AttributeError):  # old kernels have no pidfd
        fd = os.pidfd_open(pid)
        if os.getppid() == pid:  # it may have ended before it was opened
            poll = select.poll()
            poll.register(fd, select.POLLIN)
            poll.poll()
        return
    while os.getppid() == pid:
        time.sleep(0.5)


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2], sys.argv[3])
