"""The rows of one parameter against a plain dictionary of dense tensors, whatever came in which order."""

import random

import pytest
import torch

from gradsurgery import _buffer
from gradsurgery._arena import Arena
from gradsurgery._buffer import Rows, Sparse, gram
from gradsurgery._gradients import apart

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.complex64, torch.complex128]


def real(tensor):
    return (torch.view_as_real(tensor.resolve_conj()) if tensor.is_complex() else tensor).double().flatten()


def check(rows, expected, tolerance):
    """Rows are what they should be, and so is all that is made of them."""
    assert rows.tasks == tuple(sorted(expected))
    if not expected:
        return
    for task, row in rows.of.items():
        assert torch.equal(row.to_dense(), expected[task])
    like = next(iter(expected.values()))
    vectors = torch.stack([real(expected[task]) for task in rows.tasks])
    rows.align()
    assert rows.coordinates == vectors.shape[1]
    assert rows.double == (like.dtype in (torch.float64, torch.complex128))
    assert rows.precision == (torch.float64 if rows.double else torch.float32)
    torch.testing.assert_close(gram([rows]), vectors @ vectors.T, rtol=tolerance, atol=tolerance)
    coefficients = torch.arange(1.0, len(vectors) + 1, dtype=torch.float64)
    found = rows.combine(coefficients)
    assert found.shape == like.shape
    torch.testing.assert_close(real(found.to_dense()), coefficients @ vectors, rtol=tolerance, atol=tolerance)
    added = rows.reduce(lambda chunk, noise: chunk.sum(0), None)
    torch.testing.assert_close(real(added.to_dense()), vectors.sum(0), rtol=tolerance, atol=tolerance)
    for task, row in expected.items():
        assert bool(rows.finite(task)) == bool(row.isfinite().all())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(7,), (3, 4), (), (2, 0)], ids=str)
@pytest.mark.parametrize("sparse", [False, True])
def test_whatever_comes(shape, dtype, sparse):
    choose, tolerance = random.Random(f"{shape}{dtype}"), {torch.float64: 1e-12, torch.complex128: 1e-12}.get(dtype, 2e-2)
    sparse = sparse and len(shape) > 0 and 0 not in shape
    rows, arena, seen = None, Arena(), set()
    for _ in range(40):
        if rows is None or choose.random() < 0.1:
            rows, expected = Rows(arena), {}
        action, given = choose.choice(["add", "add", "add", "block", "owned", "drop", "clear", "expect"]), []
        seen.add(action)
        tasks = sorted(choose.sample(range(4), choose.randint(1, 4)))
        gradients = {task: torch.randint(-3, 4, shape).to(dtype) for task in tasks}
        if action == "add":
            for task, gradient in gradients.items():
                given.append((gradient.to_sparse(1) if sparse and choose.random() < 0.7 else gradient, gradient))
                rows.add(task, given[-1][0])
        elif action == "block":
            block = torch.stack(list(gradients.values()))
            if choose.random() < 0.3:
                block = block.expand(2, *block.shape)[1] if len(shape) == 0 else block.mT.contiguous().mT
            given.append((block, block.clone()))
            rows.add_block(tasks, block)
        elif action == "owned":
            block = arena.take((len(tasks), *shape), dtype, torch.device("cpu"))
            rows.add_block(tasks, block.copy_(torch.stack(list(gradients.values()))), owned=True)
        elif action == "drop":
            rows.drop(tasks[0])
            expected.pop(tasks[0], None)
        elif action == "clear":
            rows.clear()
            expected = {}
        else:
            rows.expect(tasks)
        if action in ("add", "block", "owned"):
            expected |= {task: expected.get(task, 0) + gradient for task, gradient in gradients.items()}
        check(rows, expected, tolerance)
        assert all(torch.equal(tensor.to_dense(), before) for tensor, before in given)  # nobody's tensor is written to
    assert len(seen) == 6


@pytest.mark.parametrize("dims", [1, 2])
def test_a_sparse_gradient_is_added_where_the_row_is(dims):
    rows, place = Rows(), torch.tensor([[0.0, 5.0], [7.0, 0.0]])
    for _ in range(2):  # in the second step there is a block
        rows.clear()
        rows.expect((0, 1, 2))
        for task in range(3):
            rows.add(task, torch.full((2, 2), float(task)))
    rows.add(1, place.to_sparse(dims))
    for task in range(3):
        assert torch.equal(rows.of[task], torch.full((2, 2), float(task)) + (place if task == 1 else 0))


def test_what_comes_after_a_look_counts():
    rows = Rows()
    for _ in range(2):
        for task in range(2):
            rows.add(task, torch.eye(3)[:2].to_sparse(1))
        rows.align()
    rows.add_block([0, 1], torch.ones(2, 2, 3))
    rows.align()
    assert torch.equal(rows.combine(torch.tensor([1.0, 10.0])).to_dense(), 11 * (2 * torch.eye(3)[:2] + 1))


# --- Products ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [1, 2, 3, 4, 5, 7])
@pytest.mark.parametrize("length", [0, 3, 4, 7, 8, 9, 12, 15])
def test_products_piece_by_piece(count, length, monkeypatch):
    monkeypatch.setattr(_buffer, "_PIECE", 4)
    monkeypatch.setattr(_buffer, "_MANY", 4)
    chunk = torch.randint(-3, 4, (count, length)).double()
    assert torch.equal(_buffer._inner_products(chunk), chunk @ chunk.T)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("exact", [True, False])
def test_what_was_multiplied_while_it_was_warm_is_not_multiplied_again(dtype, exact, monkeypatch):
    monkeypatch.setattr(_buffer, "_products_are_exact", lambda: exact)
    rows = Rows()
    for task in range(3):
        rows.add(task, torch.randn(5, dtype=dtype))
    before = gram([rows])
    rows.warm()
    with monkeypatch.context() as patch:
        patch.setattr(_buffer, "_inner_products", lambda _: pytest.fail("rows are read again"))
        assert torch.equal(gram([rows]), before)
    rows.add(1, torch.ones(5, dtype=dtype))  # they are no longer what they were
    assert not torch.equal(gram([rows]), before)
    for change in (lambda: rows.drop(2), lambda: rows.add_block([0, 1], torch.ones(2, 5, dtype=dtype)), rows.clear):
        rows.warm()
        change()
        assert rows._products is None


def test_nothing_is_multiplied_for_one_task():
    rows = Rows()
    rows.add(0, torch.ones(5))
    rows.warm()
    assert rows._products is None


@pytest.mark.parametrize("size", [1e-13, 1e-10, 1.0, 1e15, 1e19, 1e30])
def test_products_that_leave_the_range_of_float32(size):
    rows = Rows()
    for task in range(2):
        rows.add(task, torch.full((3,), size * (task + 1)))
    expected = torch.tensor([[3.0, 6], [6, 12]], dtype=torch.float64) * torch.tensor(size).double() ** 2
    torch.testing.assert_close(gram([rows]), expected, rtol=1e-6, atol=0)


def test_the_gram_matrix_of_several_parameters():
    parameters = []
    for size, dtype in ((3, torch.float32), (0, torch.float32), (5, torch.float64)):
        own = Rows()
        for task in (1, 4):
            own.add(task, torch.randn(size, dtype=dtype))
        parameters.append(own)
    expected = sum(
        torch.stack([own.of[1], own.of[4]]).double() @ torch.stack([own.of[1], own.of[4]]).double().T for own in parameters
    )
    torch.testing.assert_close(gram(parameters), expected, rtol=1e-6, atol=1e-6)
    assert torch.equal(gram(parameters[1:2]), torch.zeros(2, 2).double())


# --- Sparse rows ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dims", [1, 2])
@pytest.mark.parametrize("tail", [(), (3,)])
@pytest.mark.parametrize("dense", [False, True])
@pytest.mark.parametrize("tasks", [(0,), (0, 1), (2, 5, 7, 8)], ids=str)
def test_sparse_rows_are_dense_ones(dims, tail, dense, tasks):
    shape = (4, 5)[:dims] + tail
    whole = {
        task: torch.randint(-3, 4, shape).double() * (torch.rand(shape[:dims] + (1,) * len(tail)) < 0.5) for task in tasks
    }
    rows = Sparse({task: row.to_sparse(dims).coalesce() for task, row in whole.items()}, dense)
    stacked = torch.stack([whole[task] for task in sorted(whole)])
    assert torch.equal(rows.gram(torch.float64), stacked.flatten(1) @ stacked.flatten(1).T)
    assert rows.gram(torch.float32).dtype == torch.float32
    coefficients = torch.arange(2.0, 2.0 + len(tasks)).double()
    found = rows.combine(coefficients)
    assert found.is_sparse != dense
    assert dense or found.is_coalesced()
    assert torch.equal(found.to_dense(), (coefficients @ stacked.flatten(1)).view(shape))
    noise = torch.rand(stacked[0].numel()).double()
    found = rows.reduce(lambda chunk, noise: chunk.abs().amax(0) * noise, noise, torch.float64)
    assert found.is_sparse != dense
    assert torch.equal(found.to_dense(), stacked.abs().amax(0) * noise.view(shape))


@pytest.mark.parametrize("pieces", [1, 2, 7, 100])
def test_columns_are_reduced_piece_by_piece(pieces, monkeypatch):
    monkeypatch.setattr(_buffer, "_CPU_CHUNK", pieces)
    rows, lengths = Rows(), []
    for task in range(3):
        rows.add(task, torch.randn(4, 5))
    noise = torch.rand(20)

    def function(chunk, noise):
        lengths.append(chunk.shape[1])
        return chunk.amax(0) + noise

    expected = torch.stack(list(rows.of.values())).amax(0) + noise.view(4, 5)
    assert torch.equal(rows.reduce(function, noise), expected)
    assert sum(lengths) == 20
    assert max(lengths) == min(max(pieces // 3, 1), 20)


def test_gradients_that_share_memory_are_copied():
    alone, whole, flowed_in = torch.ones(4), torch.arange(8.0), torch.ones(3)
    sparse = torch.ones(2).to_sparse()
    given = [alone, whole[:4], whole[4:], None, flowed_in, sparse, alone]
    found = list(apart(given, [flowed_in]))
    assert [one is other for one, other in zip(found, given, strict=True)] == [True, False, False, True, False, True, False]
    memory = [gradient.untyped_storage() for gradient in found if gradient is not None and not gradient.is_sparse]
    assert len({its.data_ptr() for its in memory}) == len(memory)
    assert [its.nbytes() for its in memory] == [16, 16, 16, 12, 16]
    for gradient, it in zip(found, given, strict=True):
        assert gradient is it or torch.equal(gradient, it)
