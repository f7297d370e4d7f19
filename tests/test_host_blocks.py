"""Host memory for the optimizer's state: what torch would round up to, by its own rule."""

import pytest
import torch

from rollout_server.offload import OptimizerOffload, cut, host_blocks

MIB = 1 << 20


def rounded(sizes):
    """Torch's allocator of pinned memory rounds a block up to a power of two."""
    return sum(1 << (size - 1).bit_length() for size in sizes)


@pytest.mark.parametrize("nbytes", [1, MIB, 3 * MIB - 1, 100 * MIB + 5])
def test_blocks_are_hardly_more_than_what_is_asked_for(nbytes):
    sizes = [len(block) for block in host_blocks(nbytes, pin=False)]
    assert sum(sizes) == rounded(sizes), "torch would make a block larger"
    assert nbytes <= sum(sizes) < nbytes + MIB


def test_tensors_that_were_rounded_up_one_by_one_took_more():
    state = [65 * MIB] * 2  # of two moments
    assert rounded(state) == 256 * MIB
    assert sum(len(block) for block in host_blocks(sum(state), pin=False)) == 130 * MIB


def test_parts_go_over_the_ends_of_blocks():
    blocks = [torch.arange(n, n + size, dtype=torch.uint8) for n, size in ((0, 8), (8, 4), (12, 2))]
    parts = list(cut(blocks, [3, 7, 0, 4]))
    assert [torch.cat(p).tolist() if p else [] for p in parts] == [
        [0, 1, 2], list(range(3, 10)), [], [10, 11, 12, 13]
    ]  # fmt: skip
    assert [len(p) for p in parts] == [1, 2, 0, 2]


def test_state_larger_than_a_block_comes_back_as_it_was():
    torch.manual_seed(0)
    model = torch.nn.Linear(1000, 300)  # 1.2 MB a moment: it goes over the end of a block
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.randn(2, 1000)).sum().backward()
    optimizer.step()
    before = [v.clone() for s in optimizer.state.values() for v in s.values()]
    parking = OptimizerOffload(lambda: optimizer, lambda: None, movable=lambda _: True)
    for _ in range(2):
        parking.park()
        held = {part.untyped_storage().data_ptr() for _, parts in parking._parked for part in parts}
        assert len(held) > 1
        parking.restore()
        after = [v for s in optimizer.state.values() for v in s.values()]
        assert all(torch.equal(one, other) for one, other in zip(before, after, strict=True))
    parking.close()
