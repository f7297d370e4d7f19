"""The engine's log, and what it tells of an engine that didn't start or has ended."""

import os
import re

from rollout_server.errors import EngineStartError, OutOfMemoryError, RolloutServerError

LOG_LINES = 40
_READ = 65536  # bytes from the end of the file, at most
_ANSI = re.compile(r"\x1b\[[0-9;]*m")
_OUT_OF_MEMORY = re.compile(
    r"out of memory|MemoryError|less than (requested|desired)|No available memory|"
    r"larger than the (maximum|available)|needed, which is larger"
)


def tail(path: str, lines: int = LOG_LINES) -> str:
    """The last `lines` of a log, without colours; empty where there is none."""
    try:
        with open(path, "rb") as f:
            f.seek(0, os.SEEK_END)
            f.seek(max(0, f.tell() - _READ))
            text = f.read().decode(errors="replace")
    except OSError:
        return ""
    return "\n".join(_ANSI.sub("", text).splitlines()[-lines:])


def cause(log: str) -> str | None:
    """The last line of a log that names an exception."""
    named: list[str] = re.findall(r"((?:\w+\.)*\w*(?:Error|Exception)\b: .+)", log)
    return named[-1].strip() if named else None


def first_lines(text: str, count: int = 4) -> str:
    """What a message has room for."""
    return " ".join(line.strip() for line in text.strip().splitlines()[:count])


def out_of_memory(text: str) -> bool:
    """Whether an error's text says so."""
    return _OUT_OF_MEMORY.search(text) is not None


def start_error(error: Exception, path: str) -> RolloutServerError:
    """What to raise for an engine that didn't start, given vLLM's error and the engine's log."""
    end = tail(path)
    why = cause(end) or first_lines(str(error)) or type(error).__name__
    kind: type[RolloutServerError] = EngineStartError
    if out_of_memory(why):
        kind = OutOfMemoryError
        why += "; ask for a smaller KV cache (kv_cache_memory_bytes) or context (max_model_len)"
    return kind(f"the engine didn't start: {why}\nThe end of its log:\n{end}")
