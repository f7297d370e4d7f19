"""Runs the parts, each in a process of its own, within a time, and keeps what they found.

`gpu.json` in the folder is read before and written after each part, so that a run that was cut off,
or had no time for all, is gone on with by the next. What a part's processes print is in `NAME.log`.
"""

import json
import os
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from threading import RLock
from typing import Any

import psutil

from rollout_server.bench.gpu.findings import Findings, write_json
from rollout_server.bench.gpu.parts import Part
from rollout_server.engine.processes import kill

FILE = "gpu.json"
_MARK = "ROLLOUT_SERVER_BENCH_PART"
_LOG_END = 3000  # characters of a log, for errors
_KEPT = ("done", "skipped")


@dataclass
class Results:
    """What is in the folder. Safe to use from several threads."""

    folder: Path
    scale: str
    machine: dict[str, Any]
    parts: dict[str, Findings] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._lock = RLock()
        self.folder.mkdir(parents=True, exist_ok=True)

    def read(self) -> None:
        """What earlier runs left there; `SystemExit` if it is of another machine or scale."""
        path = self.folder / FILE
        if not path.exists():
            return
        told = json.loads(path.read_text(encoding="utf-8"))
        for what, now in (("scale", self.scale), ("machine", self.machine)):
            if told[what] != now:
                raise SystemExit(
                    f"{path} is of another {what} ({_difference(told[what], now)}); give --out "
                    "another folder, or remove it"
                )
        self.parts = {name: Findings.of(one) for name, one in told["parts"].items()}

    def has(self, name: str) -> bool:
        """Whether the part needn't be run again."""
        return name in self.parts and self.parts[name].status in _KEPT

    def add(self, name: str, found: Findings) -> None:
        with self._lock:
            self.parts[name] = found
            write_json(self.folder / FILE, self.as_dict())

    def as_dict(self) -> dict[str, Any]:
        parts = {name: found.as_dict() for name, found in self.parts.items()}
        return {"scale": self.scale, "machine": self.machine, "parts": parts}


def _difference(there: Any, now: Any) -> str:
    if not isinstance(there, dict):
        return f"{there}, not {now}"
    names = [name for name in there.keys() | now.keys() if there.get(name) != now.get(name)]
    return "; ".join(f"{n} {there.get(n)}, not {now.get(n)}" for n in sorted(names))


def run_parts(
    parts: Sequence[Part],
    results: Results,
    seconds: float,
    jobs: int = 1,
    told: Callable[[str, Findings], None] = lambda name, found: None,
) -> None:
    """Run `parts` in their order, `jobs` at a time, in `seconds` in all; told: of each, when done.

    A part for which there isn't time is "left out".
    """
    until = time.monotonic() + seconds

    def one(part: Part) -> None:
        left = until - time.monotonic()
        tiny = results.scale == "tiny"
        needs, deadline = part.seconds[tiny], part.deadlines[tiny]
        if needs > left:
            why = f"it takes about {needs} s, and {max(left, 0):.0f} s were left"
            found = Findings(status="left out", why=why)
        else:
            found = run_part(part, results.scale, results.folder, min(deadline, left))
        if found.status != "left out" or not results.has(part.name):
            results.add(part.name, found)
        told(part.name, found)

    with ThreadPoolExecutor(jobs) as pool:
        try:
            for done in [pool.submit(one, part) for part in parts]:
                done.result()
        except BaseException:  # Ctrl-C, which the part's process has got too
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def run_part(part: Part, scale: str, folder: Path, seconds: float) -> Findings:
    """In a process of its own, which has ended `seconds` later, and all that it started."""
    folder.mkdir(parents=True, exist_ok=True)
    file, log = folder / f"{part.name}.part", folder / f"{part.name}.log"
    file.unlink(missing_ok=True)
    mark = uuid.uuid4().hex
    command = [sys.executable, "-m", "rollout_server.bench.gpu.child"]
    with open(log, "wb") as output:
        process = subprocess.Popen(
            [*command, str(os.getpid()), part.target, str(file), scale],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            env=os.environ | {_MARK: mark},
        )
        try:
            process.wait(seconds)
            end = f"its process ended with status {process.returncode}"
        except subprocess.TimeoutExpired:
            end = f"it wasn't done after {seconds:.0f} s"
        finally:
            kill(_marked(mark))
            process.wait()
    found = Findings()
    if file.exists():
        found = Findings.of(json.loads(file.read_text(encoding="utf-8")))
        file.unlink()
    if found.status == "running":
        text = log.read_text(encoding="utf-8", errors="replace").strip()
        found.why = f"{end}. The end of {log.name}:\n{text[-_LOG_END:]}"
        found.end()
    return found


def _marked(mark: str) -> list[psutil.Process]:
    """A part's processes, also those whose parent has ended."""
    found = []
    for process in psutil.process_iter():
        try:
            if process.environ().get(_MARK) == mark:
                found.append(process)
        except (psutil.Error, OSError):
            continue  # another user's, or gone
    return found
