"""What is removed when a trainer was killed: its folder, and torch's files that it noted."""

import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

from support import eventually

from rollout_server.weights.exports import Exports
from rollout_server.weights.wire import COUNTERS

TRAINER = textwrap.dedent("""
    import os, sys, time
    from rollout_server.engine.temporary import TemporaryFolder
    from rollout_server.weights.exports import Exports

    class Handle:
        def __init__(self, name):
            self.counter_file = name

    folder = TemporaryFolder()
    exports = Exports()
    exports.note_in(folder.path)
    names = [f"torch_{os.getpid()}_{number}_0" for number in range(2)]
    for name in [*names, f"other_{os.getpid()}"]:
        open(f"/dev/shm/{name}", "w").close()
    exports.give(0, [Handle(names[0]), Handle(None)])
    exports.give(1, [Handle(names[0]), Handle(names[1])])
    exports.give(2, [Handle(f"other_{os.getpid()}"), Handle("../dev/shm/torch_1_2")])
    print(folder.path, flush=True)
    time.sleep(60)
""")


def test_torchs_files_are_removed_after_a_kill_and_no_others():
    process = subprocess.Popen([sys.executable, "-c", TRAINER], stdout=subprocess.PIPE, text=True)
    folder = Path(process.stdout.readline().strip())
    pid = process.pid
    other = Path(f"/dev/shm/other_{pid}")
    ours = [Path(f"/dev/shm/torch_{pid}_{number}_0") for number in range(2)]
    try:
        assert all(path.exists() for path in [*ours, other])
        assert len((folder / COUNTERS).read_text().split()) == 4, "a name is written twice"
        process.send_signal(signal.SIGKILL)
        process.communicate(timeout=20)
        eventually(lambda: not folder.exists(), within=10)
        assert not any(path.exists() for path in ours)
        assert other.exists()
    finally:
        for path in [*ours, other]:
            path.unlink(missing_ok=True)


def test_without_a_folder_nothing_is_noted(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    exports = Exports()
    exports.give(0, [type("H", (), {"counter_file": "torch_1_2"})])
    assert os.listdir(tmp_path) == []
