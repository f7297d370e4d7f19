"""Folders of models under the user's cache: the same content has the same path.

vLLM's compilation caches go by the model's path, so a model that is attached again must be found at
the path that it had, else all is compiled anew. A folder is named by a hash of what is in it, and
holds a config and a tokenizer, nothing of a server. Whoever uses one holds a lock on a file in it,
which ends with the process; the least recently used of those that nobody uses are removed.
"""

import contextlib
import fcntl
import hashlib
import os
import re
import secrets
import shutil
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

KEPT = 8  # folders that nobody uses; a tokenizer has 2 to 30 MiB
_NAME = re.compile(r"[0-9a-f]{32}")
_LOCK = "in-use.lock"
_TRIES = 100
_STALE = 3600.0  # seconds after which nobody writes a folder any more


class HeldFolder:
    """A folder of the cache, which stays there until `release`, or the end of this process."""

    def __init__(self, path: Path, lock: int):
        self.path = str(path)
        self._lock: int | None = lock

    def release(self) -> None:
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None


def cache_root() -> Path:
    """Where the folders are: below ROLLOUT_SERVER_CACHE, XDG_CACHE_HOME or ~/.cache."""
    own = os.environ.get("ROLLOUT_SERVER_CACHE")
    base = own or os.path.join(os.environ.get("XDG_CACHE_HOME") or "~/.cache", "rollout_server")
    return Path(base).expanduser() / "models"


def held_folder(write: Callable[[str], None]) -> HeldFolder:
    """The folder with what `write` writes into the one it is given.

    Raises `OSError` where the cache can't be used, and what `write` raises.
    """
    root = cache_root()
    root.mkdir(mode=0o700, parents=True, exist_ok=True)
    if root.stat().st_uid != os.geteuid():
        raise PermissionError(f"{root} is another user's")
    work = Path(tempfile.mkdtemp(prefix=".writing-", dir=root))
    try:
        write(str(work))
        held = _hold(work, root / _digest(work))
    finally:
        shutil.rmtree(work, ignore_errors=True)
    _remove_old(root)
    return held


def _hold(work: Path, path: Path) -> HeldFolder:
    """The folder `path`, held; made of `work` if it isn't there."""
    (work / _LOCK).touch(mode=0o600)
    for _ in range(_TRIES):
        with contextlib.suppress(OSError):  # there already
            os.rename(work, path)
        lock = _locked(path, fcntl.LOCK_SH)
        if lock is not None:
            if work.exists():
                _mend(work, path)
            os.utime(path)
            return HeldFolder(path, lock)
        time.sleep(0.01)
    raise TimeoutError(f"{path} can't be locked")


def _locked(path: Path, how: int) -> int | None:
    """A descriptor that locks the folder; None if it isn't there, or locked by another."""
    try:
        lock = os.open(path / _LOCK, os.O_RDWR | os.O_CLOEXEC)
    except FileNotFoundError:
        return None
    try:
        fcntl.flock(lock, how | fcntl.LOCK_NB)
        if os.path.samestat(os.fstat(lock), os.stat(path / _LOCK)):  # else removed meanwhile
            return lock
    except (BlockingIOError, FileNotFoundError):
        pass
    except BaseException:
        os.close(lock)
        raise
    os.close(lock)
    return None


def _mend(work: Path, path: Path) -> None:
    """Bring a folder that somebody has damaged to what its name says."""
    if _digest(path) == path.name:
        return
    for name in _files(path) - _files(work):
        (path / name).unlink(missing_ok=True)
    for name in _files(work):
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        os.replace(work / name, path / name)


def _remove_old(root: Path) -> None:
    """All but the `KEPT` folders that were used last, and those that are in use."""
    with contextlib.suppress(OSError):
        entries = sorted(root.iterdir(), key=lambda entry: entry.stat().st_mtime, reverse=True)
        old = [entry for entry in entries if _NAME.fullmatch(entry.name)][KEPT:]
        for path in old:
            if (lock := _locked(path, fcntl.LOCK_EX)) is not None:
                gone = root / f".removed-{secrets.token_hex(8)}"
                os.rename(path, gone)
                os.close(lock)
        for entry in root.iterdir():
            left = time.time() - entry.lstat().st_mtime > _STALE
            if entry.name.startswith(".removed-") or (left and entry.name.startswith(".writing-")):
                shutil.rmtree(entry, ignore_errors=True)


def _digest(folder: Path) -> str:
    """Of all names and contents."""
    told = hashlib.sha256()
    for name in sorted(_files(folder)):
        content = (folder / name).read_bytes()
        told.update(f"{len(name)} {name} {len(content)} ".encode())
        told.update(content)
    return told.hexdigest()[:32]


def _files(folder: Path) -> set[str]:
    found = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}
    return found - {_LOCK}
