"""Many copies at the speed of one: what is copied together, and in which pieces."""

import mmap

import pytest
import torch

from rollout_server.weights.wire import STREAMED_BYTES
from rollout_server.worker import copier
from rollout_server.worker.copier import Copier
from rollout_server.worker.pages import move_to_pages, paged

MIB = 1 << 20


def memory(nbytes, at=0):
    """Bytes that begin `at` bytes into a page."""
    storage = paged(nbytes + mmap.PAGESIZE)
    return torch.empty(0, dtype=torch.uint8).set_(storage, at, (nbytes,))


@pytest.mark.parametrize(
    "sizes", [[0], [1], [3 * MIB + 1], [9 * MIB], [100, MIB, 5, 4 * MIB + 4096, 700_001] * 7]
)
@pytest.mark.parametrize("at", [0, 64, 3072])
def test_every_byte_is_copied_once(sizes, at):
    to, sources = [memory(n, at) for n in sizes], [memory(n) for n in sizes]
    for source in sources:
        source.random_()
    copies = Copier(to, sources)
    copies.run()
    assert all(torch.equal(*pair) for pair in zip(to, sources, strict=True))
    shares = [piece for share in copies._shares for piece in share]
    assert sum(size for _, _, size in shares) == sum(sizes)


def pieces_of(to, source):
    return [size for _, _, size in copier._pieces(to, source)]


def test_pieces_go_past_the_cache_where_that_is_fast():
    """Not where a load would wait for the store before it."""
    size = 9 * MIB
    for at in (0, 1024, 3072, 4032):
        assert min(pieces_of(memory(size, at), memory(size))) >= STREAMED_BYTES
    for at in (16, 64, 1008):
        assert max(pieces_of(memory(size, at), memory(size))) < STREAMED_BYTES


def test_pieces_of_a_tensor_are_of_one_size():
    sizes = pieces_of(memory(4 * MIB + 8192), memory(4 * MIB + 8192))
    assert len(sizes) == 2 and max(sizes) - min(sizes) <= 4096


def test_small_pieces_are_taken_together_and_large_ones_first():
    sizes = [3072] * 100 + [2 * MIB, 8 * MIB]
    shares = copier._shares([(0, 0, size) for size in sizes])
    assert [len(share) for share in shares] == [1, 1, 100]
    assert [shares[0][0][2], shares[1][0][2]] == [8 * MIB, 2 * MIB]


def test_what_is_laid_out_otherwise_slows_nothing_else(monkeypatch):
    """Of a GPU: large ones are copied alone, the rest in a list for each kind."""
    monkeypatch.setattr(copier, "_is_memory", lambda to, source: False)
    whole, small = torch.ones(MIB // 4 + 1), torch.ones(8, 4)
    turned, cast = torch.ones(4, 8).t(), torch.ones(8, 4, dtype=torch.bfloat16)
    sources = [whole, small, turned, small * 2, cast, cast * 2]
    to = [torch.zeros(s.shape) for s in sources]
    calls, each = [], torch._foreach_copy_

    def noted(*lists):
        calls.append([s.data_ptr() for s in lists[1]])
        each(*lists)

    monkeypatch.setattr(torch, "_foreach_copy_", noted)
    Copier(to, sources).run()
    assert all(torch.equal(a, b.float()) for a, b in zip(to, sources, strict=True))
    places = [s.data_ptr() for s in sources]
    assert calls == [[places[1], places[3]], [places[2]], places[4:]]


def test_parameters_are_moved_to_pages_with_what_they_hold():
    model = torch.nn.ModuleDict({"a": torch.nn.Linear(300, 300), "b": torch.nn.Linear(300, 300)})
    model["b"].weight = model["a"].weight  # tied
    model["c"] = torch.nn.Linear(1024, 1024)
    model["c"].bias = torch.nn.Parameter(model["c"].weight.data[3], requires_grad=False)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    kept = list(model.parameters())
    move_to_pages(model)
    assert all(a is b for a, b in zip(kept, model.parameters(), strict=True))
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    assert model["a"].weight.data_ptr() % mmap.PAGESIZE == 0
    assert model["c"].weight.data_ptr() % (2 * MIB) == 0
    assert model["c"].bias.data_ptr() == model["c"].weight[3].data_ptr()  # still a view of it


@pytest.mark.slow  # it imports vLLM's worker
def test_pages_that_are_given_back_come_back_zeroed():
    from rollout_server.worker.cpu_worker import _give_back

    storage = paged(5 * MIB)
    tensor = torch.empty(0, dtype=torch.uint8).set_(storage)
    tensor.fill_(7)
    _give_back(storage)
    assert not tensor.any()
