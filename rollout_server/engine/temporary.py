"""The folders of one server: its sockets and its log, and the model that vLLM is started from."""

import contextlib
import logging
import os
import shutil
import tempfile
from collections.abc import Callable

from rollout_server.engine.janitor import Janitor
from rollout_server.engine.model_cache import HeldFolder, held_folder
from rollout_server.errors import ConfigError
from rollout_server.weights.wire import COUNTERS

_log = logging.getLogger(__name__)

# A socket's path may have 107 characters; vLLM's names have 36.
SOCKET_FOLDER = 107 - 36 - 1


class TemporaryFolder:
    """A new folder at `path`, short enough for the sockets in it. It is removed by `remove`, or
    when this process has ended, whatever ends it."""

    def __init__(self) -> None:
        self.path = _new_folder()
        self._janitor = Janitor(self.path, COUNTERS)
        self._model: HeldFolder | None = None

    def model(self, write: Callable[[str], None]) -> str:
        """The path of a folder with what `write` writes into the one it is given.

        It is the same path whenever that is the same, so that vLLM finds what it compiled; where
        the user's cache can't be used, a new one, in this folder.
        """
        try:
            self._model = held_folder(write)
            return self._model.path
        except OSError as error:
            _log.info("vLLM will compile the model anew, since it has no lasting path: %s", error)
            path = os.path.join(self.path, "model")
            os.mkdir(path)
            write(path)
            return path

    def remove(self) -> None:
        self._janitor.dismiss()
        shutil.rmtree(self.path, ignore_errors=True)
        if self._model is not None:
            self._model.release()


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
