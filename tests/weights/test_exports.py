"""GPU memory that an engine has open: when it is freed, by a model of torch's bookkeeping.

torch's own needs a GPU. Its rules, of torch/csrc/CudaIPCTypes.cpp: each sharing of a storage has a
count of 1 in a file, which the process that opened it lowers as it lets go; memory that is freed
while the count is above 0 waits, until `ipc_collect` finds it at 0 or below.
"""

import asyncio
import multiprocessing
import os
import signal
from types import SimpleNamespace

import inside
import pytest
import torch

from rollout_server import RolloutConfig
from rollout_server.errors import EngineDeadError
from rollout_server.sync.sender import Sender
from rollout_server.weights import exports as exports_module
from rollout_server.weights import shared as shared_module
from rollout_server.weights import transport
from rollout_server.weights.exports import Exports
from rollout_server.weights.shared import SharedWeights
from rollout_server.weights.transport import CudaIpc, Exporter
from rollout_server.weights.wire import EngineDescription, Layout, Part, Piece, Place, Slot

FILE = b"/torch_1_2_0"


class Cuda:
    """Counts in memory that a second process has too; `waiting`: freed while still counted."""

    def __init__(self):
        self.counts = multiprocessing.get_context("spawn").Array("q", 64)
        self.shared = 0
        self.waiting = set()
        self.freed = set()
        self.calls = []

    def share(self, storage):
        self.counts[self.shared] = 1
        self.shared += 1
        nothing = (None,) * 11
        return CudaIpc(print, (*nothing, FILE, self.shared - 1, None, None))

    def free(self, number):
        """The trainer lets go of what was shared as `number`."""
        self.calls.append(f"free {number}")
        (self.waiting if self.counts[number] > 0 else self.freed).add(number)

    def release(self, file, number):
        assert file == FILE
        self.calls.append(f"release {number}")
        self.counts[number] -= 1

    def collect(self):
        self.calls.append("ipc_collect")
        done = {number for number in self.waiting if self.counts[number] <= 0}
        self.waiting -= done
        self.freed |= done


@pytest.fixture
def cuda(monkeypatch):
    cuda = Cuda()
    monkeypatch.setattr(transport, "handle", cuda.share)
    monkeypatch.setattr(shared_module, "handle", cuda.share)
    monkeypatch.setattr(torch.UntypedStorage, "_release_ipc_counter", cuda.release)
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "ipc_collect", cuda.collect)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: cuda.calls.append("empty_cache"))
    return cuda


def part(number, tensor=None):
    tensor = torch.ones(4) if tensor is None else tensor
    return Part(number, True, [Piece("w", 0, tensor)])


def _open(counts, opened, let_go):
    """Another process: has everything open, and lowers the counts of what it is told to."""
    opened.set()
    while (number := let_go.get()) is not None:
        counts[number] -= 1


def test_what_a_killed_engine_had_open_is_freed_with_the_model(cuda):
    exports = Exports()
    exporter = Exporter(exports)
    for number in range(3):
        exporter.export(part(number))
    context = multiprocessing.get_context("spawn")
    opened, let_go = context.Event(), context.Queue()
    engine = context.Process(target=_open, args=(cuda.counts, opened, let_go), daemon=True)
    engine.start()
    assert opened.wait(60)
    os.kill(engine.pid, signal.SIGKILL)
    engine.join(20)
    cuda.free(0)
    cuda.collect()
    assert cuda.waiting == {0}, "freed without the count being lowered: nothing is tested"
    exports.engine_ended()
    assert (cuda.waiting, cuda.freed) == (set(), {0})
    cuda.free(1)
    assert cuda.freed == {0, 1}
    assert cuda.calls[-5:] == ["release 0", "release 1", "release 2", "ipc_collect", "free 1"]
    exports.engine_ended()
    assert cuda.calls[-1] == "free 1", "released twice"


def test_what_an_engine_has_let_go_of_itself_is_not_counted_again(cuda):
    exports = Exports()
    exporter = Exporter(exports)
    exporter.export(part(0))
    exporter.export(part(1))
    exports.let_go(lambda number: number >= 1)
    exports.engine_ended()
    assert "release 1" not in cuda.calls and cuda.counts[0] == 0


def test_a_part_that_moves_at_each_sync_does_not_pile_up(cuda):
    exports = Exports()
    exporter = Exporter(exports)
    for _ in range(20):
        exporter.export(part(0, torch.ones(4)))
        exporter.forget()
    exports.engine_ended()
    assert [call for call in cuda.calls if "release" in call] == ["release 19", "release 18"]


def test_each_engine_that_shares_the_weights_is_counted(cuda):
    """Restarts: the slots are the same, each engine has opened them."""
    exports = Exports()
    shared = SharedWeights(exports)
    layout = Layout([Slot(4, "float32")], {"w": Place(0, 0, (4,), (1,))}, [])
    tensors = {"w": torch.ones(4)}
    shared._move(layout, tensors)
    exports.engine_ended()
    shared._move(layout, tensors)
    exports.engine_ended()
    assert list(cuda.counts[:2]) == [0, 0] and cuda.shared == 2


class Loop:
    """The server's loop, of this thread."""

    def submit(self, work, what):
        return work

    def result(self, work, timeout, what):
        return asyncio.run(work)


class Engine:
    description = EngineDescription([SimpleNamespace(**{
        "device": "cuda", "repacked": [], "unsupported_reasons": [], "splittable": [], "dtypes": {}
    })])  # fmt: skip

    def __init__(self, cuda, dead=False):
        self._cuda = cuda
        self._dead = dead

    async def forget_weights(self, first):
        if self._dead:
            raise EngineDeadError("it has ended")
        self._cuda.calls.append("forget")
        for number in range(self._cuda.shared):
            self._cuda.counts[number] -= 1


class Staging:
    def __init__(self, cuda):
        self._cuda = cuda

    def release(self):
        for number in range(self._cuda.shared):
            self._cuda.free(number)


def after_a_sync(cuda, dead=False):
    """A sender that has sent two buckets and releases them. Its exports."""
    exports = Exports()
    sender = Sender(RolloutConfig(), Loop(), Engine(cuda, dead), None, exports)
    sender._staging = Staging(cuda)
    exporter = inside.exporter(sender)
    exporter.export(part(0))
    exporter.export(part(1))
    sender.release(SimpleNamespace(staged_from=0))
    return exports


def test_the_engine_forgets_buckets_before_they_are_freed(cuda):
    after_a_sync(cuda)
    assert cuda.calls == ["forget", "free 0", "free 1", "ipc_collect"]
    assert cuda.freed == {0, 1} and not cuda.waiting
    exports_module.give_back()
    assert cuda.calls[-2:] == ["ipc_collect", "empty_cache"]


def test_buckets_of_an_engine_that_died_are_free_when_it_is_gone(cuda):
    exports = after_a_sync(cuda, dead=True)
    assert cuda.waiting == {0, 1}
    exports.engine_ended()
    assert cuda.freed == {0, 1} and not cuda.waiting
