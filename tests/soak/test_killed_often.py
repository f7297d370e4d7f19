"""`kill -9` of the trainer at random moments, from its first import to the middle of a sync."""

import random
import time

import pytest
from killing import Doomed
from support import spread

MOMENTS = 20


@pytest.mark.timeout(7200)
def test_twenty_random_moments(tiny_folder, tmp_path):
    print()
    chance, seconds, attaching = random.Random(1), [], 60.0
    for number in range(MOMENTS):
        folder = tmp_path / f"t{number}"
        folder.mkdir()
        started = time.monotonic()
        colocate = ("sleep", "share")[number % 2]
        trainer = Doomed(tiny_folder, folder, colocate)
        if number == 0:
            trainer.wait_for("attached")
            attaching = time.monotonic() - started
        time.sleep(chance.uniform(0, attaching * (0.2 if number == 0 else 1.3)))
        doing = (trainer.output.read_text().splitlines() or ["starting"])[-1]
        left, took = trainer.kill()
        assert not left, f"killed while {doing}:\n{left}"
        seconds.append(took)
        print(f"  {number + 1}: {doing.split(' http')[0]}; nothing left after {took:.2f} s")
    print(f"nothing left after {spread(seconds, 's')}")
