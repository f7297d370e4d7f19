"""What a trainer that is killed leaves behind: nothing."""

import pytest
from killing import Doomed

pytestmark = [pytest.mark.slow, pytest.mark.timeout(400)]


def test_nothing_is_left_of_a_trainer_that_is_killed(tiny_folder, tmp_path):
    folder = tmp_path / "t"
    folder.mkdir()
    trainer = Doomed(tiny_folder, folder)
    trainer.wait_for("cycle 2")
    assert trainer.left(), "it has nothing that could be left"
    left, _ = trainer.kill()
    assert not left, left
