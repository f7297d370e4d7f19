"""What a part tells: figures, checks, and what it left out."""

import contextlib
import dataclasses
import json
import os
import time
import traceback
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

_LONGEST = 6000  # characters of an error


@dataclass(frozen=True)
class Figure:
    """A figure, and beside it what it is compared with, `other` in the same unit. Bytes and seconds
    have the units "bytes" and "s"; a share, a ratio or a count has none."""

    what: str
    value: float
    unit: str = ""
    against: str = ""
    other: float | None = None


@dataclass(frozen=True)
class Check:
    """Something that must hold; seen: what was there instead, or in favour of it."""

    what: str
    passed: bool
    seen: str


@dataclass
class Findings:
    """Of one part. Written to the file at `path` with everything that is added: what ends a part
    in its middle takes nothing of it away.

    status: "running", "done", "failed" (it raised, or a check didn't hold), "skipped" (nothing of
    it can be had here), "left out" (there was no time for it).
    """

    path: Path | None = None
    status: str = "running"
    why: str = ""
    seconds: float = 0.0
    figures: list[Figure] = field(default_factory=list)
    checks: list[Check] = field(default_factory=list)
    skipped: dict[str, str] = field(default_factory=dict)

    def figure(
        self, what: str, value: float, unit: str = "", against: str = "", other: float | None = None
    ) -> None:
        self.figures.append(Figure(what, float(value), unit, against, other))
        self._write()

    def check(self, what: str, passed: bool, seen: object = "") -> None:
        self.checks.append(Check(what, bool(passed), str(seen)))
        self._write()

    def skip(self, what: str, why: str) -> None:
        """Tell what isn't measured here, and why."""
        self.skipped[what] = why
        self._write()

    @contextlib.contextmanager
    def step(self, what: str) -> Iterator[None]:
        """What is raised in it is a check that failed, and the part goes on."""
        try:
            yield
        except Exception:
            self.check(what, False, _short(traceback.format_exc()))

    @contextlib.contextmanager
    def whole(self) -> Iterator[None]:
        """The part, from its beginning to its end."""
        started = time.monotonic()
        try:
            yield
        except Exception:
            self.why = _short(traceback.format_exc())
        self.seconds = time.monotonic() - started
        self.end()

    def end(self) -> None:
        """Tell the status by what was found."""
        if self.why or not all(check.passed for check in self.checks):
            self.status = "failed"
        elif self.skipped and not self.figures and not self.checks:
            self.status = "skipped"
        else:
            self.status = "done"
        self._write()

    def value(self, what: str) -> float:
        """A figure's; `KeyError` if it isn't there."""
        return self._of(what).value

    def ratio(self, what: str) -> float:
        """A figure's to what it is compared with."""
        figure = self._of(what)
        if not figure.other:
            raise KeyError(f"{what}: compared with nothing")
        return figure.value / figure.other

    def _of(self, what: str) -> Figure:
        for figure in self.figures:
            if figure.what == what:
                return figure
        raise KeyError(f"{what}: there are {[figure.what for figure in self.figures]}")

    @property
    def failures(self) -> list[str]:
        """Why it failed, and the checks that did."""
        told = [f"{c.what}: {c.seen}" for c in self.checks if not c.passed]
        return [self.why, *told] if self.why else told

    def as_dict(self) -> dict[str, Any]:
        told = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)[1:]}
        for name in ("figures", "checks"):
            told[name] = [dataclasses.asdict(one) for one in told[name]]
        return told

    @classmethod
    def of(cls, told: dict[str, Any]) -> "Findings":
        """From `as_dict`."""
        figures = [Figure(**one) for one in told["figures"]]
        checks = [Check(**one) for one in told["checks"]]
        return cls(**told | {"figures": figures, "checks": checks})

    def _write(self) -> None:
        if self.path is not None:
            write_json(self.path, self.as_dict())


def write_json(path: Path, content: Any) -> None:
    """In the place of what was there, all at once."""
    beside = path.with_name(f"{path.name}.{os.getpid()}")
    beside.write_text(json.dumps(content, indent=1), encoding="utf-8")
    beside.replace(path)


def _short(text: str) -> str:
    return text.strip()[-_LONGEST:]
