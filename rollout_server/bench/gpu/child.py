"""One part's process: `python -m rollout_server.bench.gpu.child PARENT TARGET FILE SCALE`."""

import sys
from pathlib import Path

from rollout_server.bench.gpu.companion import end_with, resolve
from rollout_server.bench.gpu.findings import Findings


def main() -> None:
    """Measure, and write what was found to the file."""
    parent, target, path, scale = sys.argv[1:]
    end_with(int(parent))
    found = Findings(Path(path))
    with found.whole():
        from rollout_server.bench.gpu.scale import Scale

        resolve(target)(Scale(tiny=scale == "tiny"), found)


if __name__ == "__main__":
    main()
