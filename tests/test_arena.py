"""Memory for rows: how a block lies, and which bytes are kept, given and freed."""

import mmap
from itertools import permutations

import pytest
import torch

from gradsurgery._arena import Arena, _Memory, block_strides, is_block, new_block

CPU, META = torch.device("cpu"), torch.device("meta")
PAGE = mmap.PAGESIZE


def inside(arena, tensor):
    start = arena._memory.bytes.data_ptr()
    return start <= tensor.data_ptr() and tensor.data_ptr() + tensor.nbytes <= start + arena._memory.size


def seen(*shapes, keep=0):
    """An arena that knows what a step takes."""
    arena = Arena(keep)
    for shape in shapes:
        arena.take(shape, torch.uint8, CPU)
    arena.reset()
    return arena


# --- How a block lies -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(3,), (1, 5), (3, 2, 4), (2, 0, 3), (0, 4), (2, 3, 0), (4, 16, 64)])
@pytest.mark.parametrize("device", [CPU, META], ids=str)
def test_a_small_block_is_contiguous(shape, device):
    assert block_strides(shape, torch.float32, device) == torch.empty(shape).stride()
    assert new_block(shape, torch.float32, device).is_contiguous()


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32, torch.complex128], ids=str)
@pytest.mark.parametrize("lines", [65, 66, 80, 81, 82, 128, 129, 144, 145, 146])
@pytest.mark.parametrize("more", [0, 1])
def test_rows_are_as_near_as_they_may_be(lines, more, dtype):
    width = lines * 64 // dtype.itemsize + more
    distance = block_strides((3, width // 2, 2), dtype, CPU)[0] * dtype.itemsize
    assert distance == next(d for d in range(0, 1 << 20, 64) if d >= width // 2 * 2 * dtype.itemsize and d // 64 % 64 == 17)
    assert block_strides((3, width), dtype, META) == (width, 1)


def test_what_a_block_is():
    block = torch.zeros(3, 4, 5)
    assert is_block(block)
    assert is_block(block[:, :2])  # rows that are apart
    assert is_block(block[:1])
    assert is_block(block[:0])
    assert is_block(torch.zeros(3))
    for count in (2, 3):
        assert not is_block(torch.zeros(1, 4, 5).expand(count, 4, 5))
    assert not is_block(torch.zeros(9).as_strided((2, 5), (4, 1)))
    assert not is_block(torch.zeros(100).as_strided((3, 5), (4, 1)))
    assert is_block(torch.zeros(100).as_strided((3, 5), (5, 1)))
    assert not is_block(block.transpose(0, 1))
    assert not is_block(block.mT)


# --- What is given and taken ------------------------------------------------------------------------------------------


def test_other_devices_have_memory_of_their_own():
    arena = Arena()
    for _ in range(3):
        assert arena.take((2, 3000), torch.float32, META).is_contiguous()
        arena.reset()
    assert arena._memory is None


@pytest.mark.parametrize("shape", [(1,), (3, 5), (64,), (65,), (2, 2000)])
def test_blocks_begin_at_lines_of_the_cache(shape):
    arena = seen(*[shape] * 5)
    blocks = [arena.take(shape, torch.uint8, CPU) for _ in range(5)]
    assert all(block.data_ptr() % 64 == 0 and inside(arena, block) and block.shape == shape for block in blocks)
    assert len({block.data_ptr() for block in blocks}) == 5


@pytest.mark.parametrize("shape", [(2, 0), (0, 2), (0,)])
def test_blocks_without_elements(shape):
    arena = seen(shape, (PAGE,))
    assert arena.take(shape, torch.uint8, CPU).shape == shape
    assert inside(arena, arena.take((PAGE,), torch.uint8, CPU))


@pytest.mark.parametrize("order", list(permutations(range(4))), ids=str)
def test_neighbours_that_are_given_back_are_one_piece(order):
    size = PAGE // 4
    arena = seen((4 * size,))
    blocks = [arena.take((size,), torch.uint8, CPU) for _ in range(4)]
    assert sorted(b.data_ptr() - blocks[0].data_ptr() for b in blocks) == [0, size, 2 * size, 3 * size]
    for place in order[:-1]:
        arena.give(blocks[place])
    last = order[-1]
    below, above = last * size, (3 - last) * size
    for free, start in ((below, 0), (above, (last + 1) * size)):
        if free:
            assert arena.take((free,), torch.uint8, CPU).data_ptr() == blocks[0].data_ptr() + start
    assert not inside(arena, arena.take((1,), torch.uint8, CPU))  # all of it is taken


@pytest.mark.parametrize("twice", [False, True])
def test_what_is_given_back_twice_is_free_once(twice):
    arena = seen((PAGE,))
    half = [arena.take((PAGE // 2,), torch.uint8, CPU) for _ in range(2)]
    arena.give(half[1])
    if twice:
        arena.give(half[1])
    again = [arena.take((PAGE // 2,), torch.uint8, CPU) for _ in range(2)]
    assert [inside(arena, block) for block in again] == [True, False]


def test_what_is_not_its_own_is_ignored():
    arena = Arena()
    arena.take((PAGE,), torch.uint8, CPU)
    other = torch.zeros(1)
    for _ in range(PAGE):
        arena.give(other)
    arena.take((PAGE,), torch.uint8, CPU)
    arena.reset()
    assert all(inside(arena, arena.take((PAGE,), torch.uint8, CPU)) for _ in range(2))
    assert arena._memory.size == 2 * PAGE


def test_a_step_that_needs_more_has_it_the_next_time():
    arena = seen((PAGE,))
    assert inside(arena, arena.take((PAGE,), torch.uint8, CPU))
    assert not inside(arena, arena.take((2 * PAGE,), torch.uint8, CPU))
    arena.reset()
    blocks = [arena.take((size * PAGE,), torch.uint8, CPU) for size in (1, 2)]
    assert all(inside(arena, block) for block in blocks)
    assert arena._memory.size == 3 * PAGE


def test_memory_is_as_large_as_was_needed_at_one_time():
    arena = Arena()
    for size in (5, 3, 4):  # one after the other
        arena.give(arena.take((size * PAGE,), torch.uint8, CPU))
    arena.take((PAGE,), torch.uint8, CPU)
    assert arena._memory.size == 5 * PAGE


# --- What is kept between steps ---------------------------------------------------------------------------------------


@pytest.mark.skipif(not hasattr(mmap, "MADV_DONTNEED"), reason="the system takes no pages back")
@pytest.mark.parametrize(("keep", "pages"), [(0, 5), (4 * PAGE, 5), (6 * PAGE, 6), (6 * PAGE + 1, 7), (20 * PAGE, 8)])
def test_the_system_has_the_pages_that_are_not_kept(keep, pages):
    arena = seen((8 * PAGE,), keep=keep)
    arena.take((8 * PAGE,), torch.uint8, CPU).fill_(1)
    arena.reset()
    found = arena.take((8 * PAGE,), torch.uint8, CPU)
    assert found.view(8, PAGE).amax(1).tolist() == [1] * pages + [0] * (8 - pages)  # what it gives again is zero


@pytest.mark.skipif(not hasattr(mmap, "MADV_DONTNEED"), reason="the system takes no pages back")
def test_memory_comes_in_pages():
    for size, pages in ((1, 1), (PAGE, 1), (PAGE + 1, 2)):
        memory = _Memory(size)
        assert memory.size == pages * PAGE == memory.bytes.numel()
        assert memory.release(0)
        assert memory.release(memory.size)


def test_where_the_system_takes_no_pages_back_only_small_memory_is_kept(monkeypatch):
    monkeypatch.delattr(mmap, "MADV_DONTNEED", raising=False)
    assert _Memory(100).size == 100 == _Memory(100).bytes.numel()
    assert [_Memory(100).release(keep) for keep in (0, 99, 100, 101)] == [False, False, True, True]
    for keep, kept in ((1024, True), (1023, False)):
        arena = seen((1024,), keep=keep)
        assert inside(arena, arena.take((1024,), torch.uint8, CPU))
        arena.reset()
        assert (arena._memory is not None) == kept
        assert inside(arena, arena.take((1024,), torch.uint8, CPU))
