"""The folder of one server: what vLLM is started from, its sockets, and its log."""

import contextlib
import os
import shutil
import tempfile

from rollout_server.engine.janitor import Janitor
from rollout_server.errors import ConfigError

# A socket's path may have 107 characters; vLLM's names have 36.
SOCKET_FOLDER = 107 - 36 - 1


class TemporaryFolder:
    """A new folder at `path`, short enough for the sockets in it. It is removed by `remove`, or
    when this process has ended, whatever ends it."""

    def __init__(self) -> None:
        self.path = _new_folder()
        self._janitor = Janitor(self.path)

    def remove(self) -> None:
        self._janitor.dismiss()
        shutil.rmtree(self.path, ignore_errors=True)


def _new_folder() -> str:
    for parent in (tempfile.gettempdir(), "/tmp", "/var/tmp"):
        with contextlib.suppress(OSError):
            folder = tempfile.mkdtemp(prefix="rollout_server-", dir=parent)
            if len(folder) <= SOCKET_FOLDER:
                return folder
            os.rmdir(folder)
    raise ConfigError(
        f"no folder for temporary files: {tempfile.gettempdir()} can't be written to, or its path "
        "is too long for sockets; set TMPDIR to a short one"
    )
