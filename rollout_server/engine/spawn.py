"""How vLLM's child processes are started from inside a training script.

While `engine_children` is active, children that the calling thread spawns through
`multiprocessing`:

- don't run the user's script again: `multiprocessing` tells a child to import the parent's
  `__main__`, which for a script without a `__main__` guard, a notebook or `python -` trains twice
  or fails. vLLM's targets need nothing from it, so `__main__`'s origin is hidden at that moment;
- die with the thread that started them (`PR_SET_PDEATHSIG`), whatever kills this process;
- are a process group of their own: a terminal's Ctrl-C and Jupyter's "interrupt kernel" go to all
  of the trainer's group, and vLLM's processes end on SIGINT. Until they are, they have it blocked;
- write their standard output and error to a log file;
- don't see the launcher's variables (`RANK`, `MASTER_PORT`, ...): vLLM would take itself for a
  member of the trainer's process group. They take them out of their environment themselves, so that
  a trainer that goes on meanwhile has its own.
"""

import contextlib
import os
import signal
import sys
import threading
from collections.abc import Iterator, Mapping
from multiprocessing import popen_spawn_posix, resource_tracker, spawn
from typing import Any

# Set by accelerate and torchrun for the trainer's own process group.
LAUNCHER_VARIABLES = (
    "RANK",
    "LOCAL_RANK",
    "WORLD_SIZE",
    "LOCAL_WORLD_SIZE",
    "GROUP_RANK",
    "GROUP_WORLD_SIZE",
    "ROLE_RANK",
    "ROLE_WORLD_SIZE",
    "ROLE_NAME",
    "NODE_RANK",
    "MASTER_ADDR",
    "MASTER_PORT",
)
LAUNCHER_PREFIXES = ("ACCELERATE_", "TORCHELASTIC_", "FSDP_", "MEGATRON_LM_", "PMI_", "OMPI_")

# Sent to a whole process group by terminals, notebooks and launchers.
_OF_GROUPS = (signal.SIGINT, signal.SIGHUP, signal.SIGTSTP)

# Run by the child before anything else. PR_SET_PDEATHSIG is 1; the parent may already be gone.
# Ignoring a signal drops one that came while it was blocked.
_PROLOGUE = (
    "import ctypes, os, signal, sys; "
    "os.setpgid(0, 0); "
    "before = [(n, signal.signal(n, signal.SIG_IGN)) for n in {blocked!r}]; "
    "signal.pthread_sigmask(signal.SIG_UNBLOCK, {blocked!r}); "
    "[signal.signal(n, handler) for n, handler in before]; "
    "sys.platform == 'linux' and ctypes.CDLL(None).prctl(1, 9); "
    "os.getppid() == {parent} or os._exit(1); "
    "log = os.open({log!r}, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600); "
    "os.dup2(log, 1); os.dup2(log, 2); os.close(log); "
    "[os.environ.pop(name, None) for name in {hidden!r}]; "
    "os.environ.update({variables!r}); "
)
_LEVEL = "VLLM_LOGGING_LEVEL"

# `multiprocessing` and the environment belong to the whole process: one start at a time.
_one_start = threading.RLock()


@contextlib.contextmanager
def engine_children(log: str, variables: Mapping[str, str], pids: list[int]) -> Iterator[None]:
    """Start children as described above.

    log: the file they write to; variables: go into their environment, and vLLM's own of them and
    the C library's, which reads them before anything runs, into this process's meanwhile; pids:
    takes their process ids.
    """
    thread = threading.get_ident()

    def hidden_launch(started: Any, process: Any) -> None:
        if threading.get_ident() != thread:
            launch(started, process)
            return
        resource_tracker.ensure_running()  # its start would unblock signals again
        with _main_hidden(), _blocked(_OF_GROUPS):
            launch(started, process)
        pids.append(started.pid)

    def logged_command_line(**kwargs: Any) -> list[str]:
        line = command_line(**kwargs)
        if threading.get_ident() == thread and "-c" in line:
            at = line.index("-c") + 1
            prologue = _PROLOGUE.format(
                parent=os.getpid(),
                log=log,
                hidden=_launcher_variables(),
                variables=own,
                blocked=[int(number) for number in _OF_GROUPS],
            )
            line[at] = prologue + line[at]
        return line

    popen: Any = popen_spawn_posix.Popen  # typeshed doesn't know what is inside
    own = {**variables, _LEVEL: os.environ.get(_LEVEL, "INFO")}
    early = {n: v for n, v in variables.items() if n.startswith(("VLLM_", "GLIBC_"))}
    with _one_start, set_variables(early), quiet_front_end():
        launch, command_line = popen._launch, spawn.get_command_line
        popen._launch = hidden_launch
        spawn.get_command_line = logged_command_line
        try:
            yield
        finally:
            popen._launch = launch
            spawn.get_command_line = command_line


@contextlib.contextmanager
def engine_environment(variables: Mapping[str, str]) -> Iterator[None]:
    """What vLLM's children see, for this process too: for its config, which looks around.

    All is restored on the way out, with whatever vLLM itself wrote into it: nothing else may change
    the environment meanwhile.
    """
    with _one_start:
        saved = dict(os.environ)
        for name in _launcher_variables():
            del os.environ[name]
        os.environ.update(variables)
        try:
            yield
        finally:
            for name in os.environ.keys() - saved.keys():
                del os.environ[name]
            os.environ.update({n: v for n, v in saved.items() if os.environ.get(n) != v})


@contextlib.contextmanager
def set_variables(variables: Mapping[str, str]) -> Iterator[None]:
    """Of the environment, meanwhile."""
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    try:
        yield
    finally:
        for name, value in before.items():
            os.environ.pop(name, None)
            if value is not None:
                os.environ[name] = value


def _launcher_variables() -> list[str]:
    names = list(os.environ)
    return [n for n in names if n in LAUNCHER_VARIABLES or n.startswith(LAUNCHER_PREFIXES)]


@contextlib.contextmanager
def quiet_front_end() -> Iterator[None]:
    """vLLM configures its logging in here: keep it off the trainer's screen, unless asked for.

    The engine's own processes say everything, to their log.
    """
    with set_variables({} if _LEVEL in os.environ else {_LEVEL: "ERROR"}):
        yield


@contextlib.contextmanager
def _main_hidden() -> Iterator[None]:
    main = sys.modules["__main__"]
    hidden = {n: getattr(main, n) for n in ("__file__", "__spec__") if hasattr(main, n)}
    main.__spec__ = None
    if "__file__" in hidden:
        del main.__file__
    try:
        yield
    finally:
        for name, value in hidden.items():
            setattr(main, name, value)


@contextlib.contextmanager
def _blocked(signals: tuple[signal.Signals, ...]) -> Iterator[None]:
    """For this thread, and for good for children that it starts meanwhile."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, signals)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
