"""What a trainer that is killed leaves behind: nothing."""

import signal

import pytest
from killing import Doomed

pytestmark = [pytest.mark.slow, pytest.mark.timeout(400)]


@pytest.mark.parametrize(
    ("moment", "how"), [("cycle 2", signal.SIGKILL), ("cycle 2", signal.SIGTERM)]
)
def test_nothing_is_left_of_a_trainer_that_is_killed(tiny_folder, tmp_path, moment, how):
    folder = tmp_path / "t"
    folder.mkdir()
    trainer = Doomed(tiny_folder, folder)
    trainer.wait_for(moment)
    assert trainer.left(), "it has nothing that could be left"
    left, _ = trainer.kill(how)
    assert not left, left
