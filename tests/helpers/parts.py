"""Parts of a benchmark that are there to go wrong; and how parts are run in tests."""

import os
import subprocess
import sys
import time

from rollout_server.bench.gpu.parts import PARTS, Part
from rollout_server.bench.gpu.runner import run_part


def found_by(name, folder, scale):
    """What the part of this name finds, in a process of its own."""
    (part,) = (part for part in PARTS if part.name == name)
    return run_part(part, scale, folder, part.deadlines[scale == "tiny"])


def part(name, seconds=0, deadline=60):
    """One whose function is below."""
    return Part(name, f"{name}, for a test", f"parts:{name}", (seconds,) * 2, (deadline,) * 2)


def quick(scale, found):
    found.figure("time", 2.0, "s", "another", 4.0)
    found.check("it holds", True)


def raising(scale, found):
    quick(scale, found)
    raise ValueError("not today")


def unmet(scale, found):
    found.check("it holds", False, "it doesn't")


def absent(scale, found):
    found.skip("all of it", "there is no moon")


def dying(scale, found):
    found.figure("before", 1.0)
    print("last words", flush=True)
    os._exit(3)


def hanging(scale, found):
    """With a process of its own, whose parent is gone."""
    found.figure("before", 1.0)
    sleeper = "import time; time.sleep(600)"
    starter = f"import subprocess, sys; subprocess.Popen([sys.executable, '-c', {sleeper!r}])"
    subprocess.run([sys.executable, "-c", starter], check=True)
    time.sleep(600)


class Echo:
    """A companion's."""

    def __init__(self, greeting):
        self._greeting = greeting

    def __call__(self, question):
        if question == "sleep":
            time.sleep(60)
        return f"{self._greeting}, {1 / question}"
