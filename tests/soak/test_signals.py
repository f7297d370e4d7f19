"""What ends a trainer in daily life leaves nothing behind, as SIGKILL doesn't."""

import signal

import pytest
from killing import CLOSED, Doomed

TORCHRUN = ("-m", "torch.distributed.run")
ACCELERATE = ("-m", "accelerate.commands.launch", "--cpu")


@pytest.mark.timeout(300)
@pytest.mark.parametrize(
    ("launcher", "how"),
    [
        ((), signal.SIGTERM),
        ((), signal.SIGINT),
        ((), signal.SIGHUP),
        ((), signal.SIGQUIT),
        ((), CLOSED),
        (TORCHRUN, signal.SIGTERM),
        (TORCHRUN, signal.SIGINT),
        (ACCELERATE, signal.SIGTERM),
        (ACCELERATE, signal.SIGINT),
    ],
)
def test_nothing_is_left(launcher, how, tiny_folder, tmp_path):
    folder = tmp_path / "t"
    folder.mkdir()
    trainer = Doomed(tiny_folder, folder, launcher=launcher, terminal=how is CLOSED)
    trainer.wait_for("cycle 2")
    assert trainer.left(), "it has nothing that could be left"
    left, seconds = trainer.kill(how, all_of_it=launcher is ACCELERATE)
    print(f"{' '.join(launcher[1:2])} {how}: nothing left after {seconds:.2f} s")
    assert not left, left
