"""What a check says."""

from dataclasses import dataclass

OK, WARNING, PROBLEM = "ok", "warning", "problem"


@dataclass(frozen=True)
class Finding:
    """level: "ok", "warning" (it works, with a limit) or "problem" (it won't work); text: what was
    found; remedy: what to do, unless it is ok."""

    level: str
    text: str
    remedy: str = ""


def ok(text: str) -> Finding:
    return Finding(OK, text)


def warning(text: str, remedy: str) -> Finding:
    return Finding(WARNING, text, remedy)


def problem(text: str, remedy: str) -> Finding:
    return Finding(PROBLEM, text, remedy)
