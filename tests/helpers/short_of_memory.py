"""A CPU worker whose wakes run out of memory, as often as a file says. In the engine's process."""

import os
from pathlib import Path

import torch

from rollout_server.worker.cpu_worker import CpuWorker
from rollout_server.worker.extension import WeightReceiver

VARIABLE = "ROLLOUT_TEST_WAKES"  # path of the file: "tag number", and a line for each failure
NAME = f"{__name__}.ShortOfMemory"


class ShortOfMemory(CpuWorker):
    def wake_up(self, tags=None):
        path = Path(os.environ[VARIABLE])
        if path.exists():
            (tag, number), *failed = [line.split() for line in path.read_text().splitlines()]
            if tags == [tag] and len(failed) < int(number):
                with path.open("a") as f:
                    f.write(f"failed {os.getpid()}\n")
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        super().wake_up(tags)

    def load_model(self, *args, **kwargs):
        super().load_model(*args, **kwargs)
        # A method of this class would be in the way of vLLM, which adds the extension to it.
        free = WeightReceiver.rollout_free

        def recorded(self, tag):
            if (path := Path(os.environ[VARIABLE])).exists():
                with path.with_suffix(".freed").open("a") as f:
                    f.write(f"{tag}\n")
            free(self, tag)

        WeightReceiver.rollout_free = recorded
