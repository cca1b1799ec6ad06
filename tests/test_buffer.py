"""Rows of any layout, dtype and size: sparse, complex, half precision, tiny and huge gradients, tied parameters."""

import copy
import gc
import weakref

import pytest
import torch
from conftest import Bent, Heads, batch, check_gradients, check_same, combined, pcgrad, task_gradients, wrap
from torch import nn

import gradsurgery as gs
from gradsurgery import _buffer

# --- Sparse gradients -------------------------------------------------------------------------------------------------


class Lookup(nn.Module):
    """Two tasks look up overlapping words, and share a linear layer. With ``tied``, ``b`` also uses the whole table."""

    def __init__(self, sparse, tied=False):
        super().__init__()
        self.table = nn.Embedding(10, 3, sparse=sparse)
        self.linear = nn.Linear(3, 3)
        self.tied = tied

    def losses(self, step=0):
        generator = torch.Generator().manual_seed(step)
        words = torch.randint(0, 10, (2, 6), generator=generator)
        words[1, :2] = words[0, :2]
        hidden = torch.tanh(self.linear(self.table(words)))
        losses = {"a": (hidden[0] - 1).square().mean(), "b": (hidden[1].sum(1) + 1).square().mean()}
        if self.tied:
            losses["b"] = hidden[1].square().mean() + (hidden[1] @ self.table.weight.T).square().mean()
        return losses


def sparse_and_dense(**settings):
    dense = Lookup(sparse=False, **settings)
    sparse = Lookup(sparse=True, **settings)
    sparse.load_state_dict(dense.state_dict())
    return dense, sparse


@pytest.mark.parametrize("rule", [gs.PCGrad(), gs.MGDA(), gs.GradVac(beta=0.5)], ids=repr)
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("groups", ["model", "tensor"])
def test_sparse_is_dense(rule, tied, groups):
    dense, sparse = sparse_and_dense(tied=tied)
    opts = [wrap(model, rule, groups=groups) for model in (dense, sparse)]
    for number in range(4):
        for model, opt in zip((dense, sparse), opts, strict=True):
            opt.backward(model.losses(number))
            opt.combine()
        gradient = sparse.table.weight.grad
        assert gradient.is_sparse == (not tied)
        torch.testing.assert_close(gradient.to_dense(), dense.table.weight.grad, rtol=1e-5, atol=1e-7)
        torch.testing.assert_close(opts[1].last.gram, opts[0].last.gram, rtol=1e-5, atol=1e-9)
        for opt in opts:
            opt.step()
            opt.zero_grad()
    for parameter, twin in zip(sparse.parameters(), dense.parameters(), strict=True):
        torch.testing.assert_close(parameter, twin, rtol=1e-5, atol=1e-6)


def test_sparse_rows_add_up():
    dense, sparse = sparse_and_dense()
    opts = [wrap(model, gs.MGDA(), tasks=("a", "b")) for model in (dense, sparse)]
    for start in (0, 10):
        for model, opt in zip((dense, sparse), opts, strict=True):
            for number in range(3):
                opt.backward(model.losses(start + number))
            opt.backward({"b": model.losses(start + 3)["b"]})
            opt.combine()
        assert sparse.table.weight.grad.is_sparse
        torch.testing.assert_close(sparse.table.weight.grad.to_dense(), dense.table.weight.grad, rtol=1e-5, atol=1e-7)
        for opt in opts:
            opt.zero_grad()


def test_sparse_gradient_of_one_task():
    dense, sparse = sparse_and_dense()
    for model in (dense, sparse):
        opt = wrap(model, gs.MGDA(), tasks=("a", "b"))
        opt.backward({"b": model.losses()["b"]})
        opt.combine()
    assert sparse.table.weight.grad.is_sparse
    assert torch.equal(sparse.table.weight.grad.to_dense(), dense.table.weight.grad)


@pytest.mark.parametrize("first", ["sparse", "dense"])
def test_sparse_and_dense_gradients_are_added_to_what_is_there(first):
    dense, sparse = sparse_and_dense()
    present = torch.rand(10, 3)
    for model in (dense, sparse):
        model.table.weight.grad = present.clone()
        if first == "sparse" and model is sparse:
            model.table.weight.grad = present.to_sparse(1)
        opt = wrap(model, gs.MGDA())
        opt.backward(model.losses())
        opt.combine()
    torch.testing.assert_close(sparse.table.weight.grad.to_dense(), dense.table.weight.grad, rtol=1e-5, atol=1e-7)


def test_a_dense_gradient_is_added_to_a_sparse_one():
    dense, sparse = sparse_and_dense(tied=True)
    for model in (dense, sparse):
        model.table(torch.tensor([3, 4])).sum().backward()
        opt = wrap(model, gs.MGDA())
        opt.backward(model.losses())
        opt.combine()
    torch.testing.assert_close(sparse.table.weight.grad, dense.table.weight.grad, rtol=1e-5, atol=1e-7)


def test_sparse_adam():
    model = nn.Embedding(10, 3, sparse=True)
    plain = copy.deepcopy(model)
    opt = wrap(model, gs.MGDA(), torch.optim.SparseAdam(model.parameters(), lr=0.1))
    inner = torch.optim.SparseAdam(plain.parameters(), lr=0.1)
    losses = lambda m, n: {"a": m(torch.tensor([1, 2, n])).square().sum(), "b": m(torch.tensor([2, 5, 5])).sum()}  # noqa: E731
    for number in (1, 7, 8):
        rows = torch.stack(
            [torch.autograd.grad(loss, plain.weight)[0].to_dense().flatten() for loss in losses(plain, number).values()]
        )
        plain.weight.grad = gs.operate(rows, gs.MGDA()).view(10, 3).to_sparse(1)
        inner.step()
        opt.zero_grad()
        opt.backward(losses(model, number))
        opt.step()
        torch.testing.assert_close(model.weight, plain.weight, rtol=1e-5, atol=1e-6)
        assert torch.equal(model.weight[[0, 3, 4, 6, 9]], plain.weight[[0, 3, 4, 6, 9]])  # never looked up


@pytest.mark.parametrize(("shape", "dims"), [((6,), 1), ((2, 5), 2), ((5, 2), 2), ((3, 2, 4), 2), ((2, 3, 4), 3)])
def test_rows_that_are_sparse_in_several_dimensions(shape, dims):
    dense = torch.randn(4, *shape) * (torch.rand(4, *shape) < 0.6)
    rows = _buffer.Rows()
    for task, row in enumerate(dense):
        rows.add(task, row.to_sparse(dims))
    rows.align()
    flat = dense.flatten(1).double()
    torch.testing.assert_close(_buffer.gram([rows]), flat @ flat.T, rtol=1e-5, atol=1e-5)
    weights = torch.tensor([0.5, -1.0, 2.0, 0.0])
    torch.testing.assert_close(rows.combine(weights).to_dense(), (weights @ dense.flatten(1)).view(shape))


@pytest.mark.parametrize("shape", [(0,), (3, 0), (0, 2)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.complex64])
def test_sparse_rows_without_any_entry(shape, dtype):
    rows = _buffer.Rows()
    for task in range(2):
        rows.add(task, torch.zeros(shape, dtype=dtype).to_sparse(1))
    rows.align()
    assert torch.equal(_buffer.gram([rows]), torch.zeros(2, 2, dtype=torch.float64))
    assert rows.combine(torch.ones(2)).shape == shape


def test_a_sparse_gradient_of_single_numbers():
    # That of gather(sparse_grad=True): every dimension is sparse, so that an entry is a number.
    table = nn.Parameter(torch.randn(5, 4))
    index = torch.tensor([[0, 1, 1, 4], [2, 1, 0, 4]])
    found = []
    for sparse in (False, True):
        picked = torch.gather(table, 0, index, sparse_grad=sparse)
        opt = gs.SurgeryOptimizer(torch.optim.SGD([table], lr=0.1), gs.PCGrad())
        opt.backward({"a": (picked[0] - 1).square().sum(), "b": (picked[:, 1:] + 1).square().sum()})
        opt.combine()
        assert table.grad.is_sparse == sparse
        found.append((table.grad.to_dense(), opt.last.gram))
        table.grad = None
    torch.testing.assert_close(found[1], found[0])


# --- Dtypes -----------------------------------------------------------------------------------------------------------


class Waves(nn.Module):
    """Complex parameters, one of them used as its conjugate only, and a real one."""

    def __init__(self, dtype):
        super().__init__()
        self.first = nn.Parameter(torch.randn(4, 5, dtype=dtype))
        self.second = nn.Parameter(torch.randn(5, 2, dtype=dtype))
        self.real = nn.Parameter(torch.randn(2, dtype=dtype.to_real()))

    def losses(self, x):
        out = x.to(self.first.dtype) @ self.first @ self.second.conj() + self.real
        return {"a": (out[:, 0] - 1j).abs().square().mean(), "b": (out.sum(1) + 2).abs().square().mean()}


@pytest.mark.parametrize("dtype", [torch.complex64, torch.complex128])
@pytest.mark.parametrize("source", ["autograd", "batched"])
def test_complex_parameters(dtype, source):
    model = Waves(dtype)
    opt = wrap(model, gs.PCGrad(), source=source)
    for number in range(2):
        vectors = [
            torch.cat([(torch.view_as_real(g.resolve_conj()) if g.is_complex() else g).flatten() for g in row.values()])
            for row in task_gradients(model.losses(batch(number)), dict(model.named_parameters())).values()
        ]
        opt.backward(model.losses(batch(number)))
        opt.combine()
        found = torch.cat(
            [(torch.view_as_real(p.grad) if p.is_complex() else p.grad).flatten() for p in model.parameters()]
        )
        tolerance = 1e-12 if dtype == torch.complex128 else 1e-5
        torch.testing.assert_close(found, pcgrad(*vectors), rtol=tolerance, atol=tolerance)
        stacked = torch.stack(vectors).double()
        torch.testing.assert_close(opt.last.gram[0], stacked @ stacked.T, rtol=tolerance, atol=tolerance)
        opt.step()
        opt.zero_grad()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("source", ["autograd", "batched"])
def test_other_precisions(dtype, source):
    model = Bent(("a", "b")).to(dtype)
    opt = wrap(model, gs.PCGrad(), source=source)
    for number in range(2):  # in the second step, rows have their place
        x = batch(number).to(dtype)
        opt.backward(model.losses(x))
        rows = [opt._surgery.gradients.rows[p].of for p in range(4)]
        vectors = [torch.cat([row[k].double().flatten() for row in rows]) for k in range(2)]  # as the source left them
        opt.combine()
        found = torch.cat([p.grad.double().flatten() for p in model.parameters()])
        assert all(p.grad.dtype == dtype for p in model.parameters())
        rounding = torch.finfo(dtype).eps
        torch.testing.assert_close(found, pcgrad(*vectors), rtol=2 * rounding, atol=1e-7)
        exact = torch.stack(vectors)
        tolerance = 1e-12 if dtype == torch.float64 else 2e-6  # products in float32, whatever the parameters' dtype
        torch.testing.assert_close(opt.last.gram[0], exact @ exact.T, rtol=tolerance, atol=1e-9)
        opt.zero_grad()


def test_mixed_precisions_in_one_group():
    model = Bent(("a", "b"))
    model.layers[2].double()

    def losses():
        out = model.layers[2](model.layers[:2](batch()).double())
        return {"a": (out[:, 0] - 1).square().mean(), "b": (out.sum(1) + 2).square().mean()}

    gradients = task_gradients(losses(), dict(model.named_parameters()))
    vectors = [torch.cat([g.double().flatten() for g in row.values()]) for row in gradients.values()]
    opt = wrap(model, gs.PCGrad())
    opt.backward(losses())
    opt.combine()
    assert [p.grad.dtype for p in model.parameters()] == [torch.float32] * 2 + [torch.float64] * 2
    found = torch.cat([p.grad.double().flatten() for p in model.parameters()])
    torch.testing.assert_close(found, pcgrad(*vectors), rtol=1e-6, atol=1e-7)
    exact = torch.stack(vectors)
    torch.testing.assert_close(opt.last.gram[0], exact @ exact.T, rtol=1e-12, atol=1e-12)


# --- Sizes ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scale", [1e-30, 1e-22, 1e-18, 1e-12, 1e12, 1e15, 1e18, 1e30])
@pytest.mark.parametrize("rule", [gs.PCGrad(), gs.MGDA(), gs.GradVac(target=0.5)], ids=repr)
def test_the_size_of_gradients_makes_no_difference(rule, scale):
    plain = Bent(("a", "b"))
    model = copy.deepcopy(plain)
    opts = wrap(plain, rule), wrap(model, rule)
    for _ in range(2):
        opts[0].backward(plain.losses(batch()))
        opts[1].backward({task: loss * scale for task, loss in model.losses(batch()).items()})
        for opt in opts:
            opt.combine()
        torch.testing.assert_close(opts[1].last.cosines, opts[0].last.cosines, rtol=1e-5, atol=1e-5, equal_nan=True)
        for parameter, twin in zip(model.parameters(), plain.parameters(), strict=True):
            torch.testing.assert_close(parameter.grad.double() / scale, twin.grad.double(), rtol=1e-4, atol=1e-5)
        for opt in opts:
            opt.zero_grad()


def test_gradients_of_very_different_sizes():
    model = Bent(("a", "b"))
    opt = wrap(model, gs.PCGrad())
    losses = model.losses(batch())
    rows = task_gradients(losses, dict(model.named_parameters()))
    small, large = (torch.cat([g.double().flatten() for g in row.values()]) for row in rows.values())
    opt.backward({"a": model.losses(batch())["a"] * 1e-18, "b": model.losses(batch())["b"] * 1e15})
    opt.combine()
    cosine = (small @ large) / small.norm() / large.norm()
    torch.testing.assert_close(opt.last.cosines[0, 0, 1], cosine, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(
        opt.last.norms[0], torch.stack([small.norm() * 1e-18, large.norm() * 1e15]), rtol=1e-6, atol=0
    )


def test_a_lower_precision_of_matrix_products_does_not_reach_the_gram_matrix():
    model = nn.Linear(64, 64)
    x = torch.randn(16, 64)
    losses = {"a": model(x).sum(), "b": (model(x) + x).square().sum(), "c": (x * model(x)).sum()}
    vectors = torch.stack(
        [
            torch.cat([g.flatten() for g in r.values()])
            for r in task_gradients(losses, dict(model.named_parameters())).values()
        ]
    ).double()
    opt = wrap(model, gs.PCGrad())
    opt.backward(losses, retain_graph=True)  # the losses' own products are in full precision
    opt._surgery.gradients.align()
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("medium")
        assert not _buffer._products_are_exact()
        opt.combine()
        gram = opt.last.gram[0]
    finally:
        torch.set_float32_matmul_precision(before)
    torch.testing.assert_close(gram, vectors @ vectors.T, rtol=1e-9, atol=1e-9)
    assert _buffer._products_are_exact()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_rows_that_are_gathered_piece_by_piece(dtype, monkeypatch):
    monkeypatch.setattr(_buffer, "_CPU_CHUNK", 3)
    model = Heads().to(dtype)
    opt = wrap(model, gs.MGDA())
    for number in range(2):
        opt.backward(model.losses(batch(number).to(dtype)))
        gradients = opt._surgery.gradients
        rows = {
            task: {n: r.of.get(k) for n, r in zip(gradients.names, gradients.rows, strict=True)}
            for k, task in enumerate(opt.tasks)
        }
        rows = {t: {n: None if g is None else g.float().clone() for n, g in row.items()} for t, row in rows.items()}
        opt.combine()
        expected = combined(rows, lambda _: "model", gs.MGDA())
        tolerance = 1e-2 if dtype == torch.bfloat16 else 1e-4
        check_gradients(model, {n: g.to(dtype) for n, g in expected.items()}, rtol=tolerance, atol=1e-5)
        opt.zero_grad()


class Shapes(nn.Module):
    """A parameter without elements, one without dimensions, and a channels-last convolution."""

    def __init__(self):
        super().__init__()
        self.empty = nn.Parameter(torch.zeros(0, 3))
        self.scalar = nn.Parameter(torch.tensor(1.5))
        self.conv = nn.Conv2d(3, 4, 3).to(memory_format=torch.channels_last)

    def losses(self, x):
        out = self.conv(x) * self.scalar + self.empty.sum()
        return {"a": out.square().mean(), "b": -out[:, 0].mean()}


@pytest.mark.parametrize("source", ["autograd", "batched"])
@pytest.mark.parametrize("groups", ["model", "tensor"])
def test_odd_shapes(source, groups):
    model = Shapes()
    x = torch.randn(2, 3, 5, 5).to(memory_format=torch.channels_last)
    rows = task_gradients(model.losses(x), dict(model.named_parameters()))
    expected = combined(rows, lambda name: name if groups == "tensor" else "model", gs.MGDA())
    opt = wrap(model, gs.MGDA(), source=source, groups=groups)
    for _ in range(2):
        opt.backward(model.losses(x))
        opt.combine()
        check_gradients(model, expected, rtol=1e-4, atol=1e-6)
        opt.zero_grad()


# --- Identity ---------------------------------------------------------------------------------------------------------


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed, self.out = nn.Embedding(6, 4), nn.Linear(4, 6, bias=False)
        self.out.weight = self.embed.weight

    def losses(self, x):
        out = self.out(torch.tanh(self.embed(torch.tensor([1, 2, 4]))))
        return {"a": nn.functional.cross_entropy(out, torch.tensor([0, 3, 5])), "b": out.square().mean() - out[:, 0].sum()}


def test_tied_parameters_are_operated_on_once():
    model = Tied()
    rows = task_gradients(model.losses(None), {"weight": model.embed.weight})
    expected = pcgrad(*(row["weight"].flatten() for row in rows.values())).view(6, 4)
    opt = wrap(model, gs.PCGrad(), groups="tensor")
    assert dict(opt.groups) == {"embed.weight": ("embed.weight",)}
    opt.backward(model.losses(None))
    opt.combine()
    torch.testing.assert_close(model.out.weight.grad, expected, rtol=1e-5, atol=1e-7)
    assert len(opt.last.groups) == 1


def test_gradients_are_tensors_of_their_own():
    # The backward pass of a sum gives one and the same tensor to everything that was added up.
    model = nn.Module()
    model.first, model.second = nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(3))
    for losses in ({"a": 1.0}, {"a": 1.0, "b": 2.0}):
        opt = wrap(model, gs.Sum())
        for _ in range(2):
            opt.backward({task: factor * (model.first + model.second).sum() for task, factor in losses.items()})
            opt.combine()
            model.first.grad.mul_(10)
            assert torch.equal(model.second.grad, torch.full((3,), sum(losses.values())))
            opt.zero_grad()


def test_what_autograd_returned_is_not_written_to():
    model = nn.Linear(3, 2)
    seen = []
    model.weight.register_hook(lambda gradient: seen.append((gradient, gradient.clone())))
    opt = wrap(model, gs.PCGrad())
    for number in range(3):
        for _ in range(2):
            out = model(torch.randn(4, 3))
            opt.backward({"a": out.sum(), "b": -(number + 1) * out.square().sum()})
        opt.combine()
        model.weight.grad.zero_()
        opt.zero_grad()
    assert len(seen) == 12
    assert all(torch.equal(gradient, copied) for gradient, copied in seen)


def test_a_block_that_autograd_returned_is_not_written_to():
    rows, block = _buffer.Rows(), torch.ones(2, 3)
    rows.add_block([0, 1], block)
    rows.add(1, torch.ones(3))
    rows.add_block([0, 1], torch.ones(2, 3))
    assert torch.equal(block, torch.ones(2, 3))
    assert rows.of[0].tolist() == [2, 2, 2]
    assert rows.of[1].tolist() == [3, 3, 3]


@pytest.mark.parametrize("source", ["autograd", "batched"])
def test_rows_are_freed(source):
    model = Heads()
    opt = wrap(model, gs.PCGrad(), source=source)
    for _ in range(2):
        opt.backward(model.losses(batch()))
        held = [weakref.ref(row) for rows in opt._surgery.gradients.rows for row in rows.of.values()]
        assert all(reference() is not None for reference in held)
        opt.combine()
        gc.collect()
        assert all(reference() is None for reference in held)
        opt.zero_grad()


@pytest.mark.parametrize("source", ["autograd", "batched"])
def test_a_first_step_and_later_ones_are_the_same(source):
    """Rows lie elsewhere once it is known who reaches what; the result is that of an optimizer that has just been made."""
    model = Heads()
    opt = wrap(model, gs.MGDA(), source=source, tasks=("a", "b", "c"))
    for number, tasks in enumerate(["abc", "abc", "ab", "c", "bc", "abc"]):
        twin = copy.deepcopy(model)
        fresh = wrap(twin, gs.MGDA(), source=source, tasks=("a", "b", "c"))
        for one, m in ((opt, model), (fresh, twin)):
            losses = m.losses(batch(number))
            one.backward({task: losses[task] for task in tasks})
            one.combine()
        torch.testing.assert_close(opt.last.gram, fresh.last.gram, rtol=1e-5, atol=1e-8)
        check_gradients(model, {n: p.grad for n, p in twin.named_parameters()}, rtol=1e-4, atol=1e-6)
        opt.step()
        opt.zero_grad()


def test_repeated_runs_are_bitwise_equal():
    results = []
    for _ in range(2):
        torch.manual_seed(0)
        model = Heads()
        opt = wrap(model, gs.PCGrad())
        for number in range(3):
            opt.backward(model.losses(batch(number)))
            opt.step()
            opt.zero_grad()
        results.append(model)
    check_same(*results)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.complex64])
@pytest.mark.parametrize("given", ["one by one", "as a block", "as a padded block", "as one row for all"])
def test_rows_that_lie_apart(given, dtype):
    rows = _buffer.Rows()
    for _ in range(2):  # the second time, a block has place for them
        own = torch.randn(3, 40, 60, dtype=dtype)
        if given == "as one row for all":
            own = own[:1].expand(3, -1, -1)
        rows.expect([0, 2, 5])
        if given == "one by one":
            for task, gradient in zip([0, 2, 5], own, strict=True):
                rows.add(task, gradient)
        else:
            padded = _buffer.new_block(own.shape, dtype, own.device).copy_(own)
            kind = {"as a block": own.clone(), "as a padded block": padded, "as one row for all": own}[given]
            rows.add_block([0, 2, 5], kind, owned=True)
        rows.add_block([0, 2, 5], own.clone())
        flat = (own + own).flatten(1).to(torch.complex128 if dtype.is_complex else torch.float64)
        torch.testing.assert_close(_buffer.gram([rows]), (flat @ flat.mH).real, rtol=1e-6, atol=1e-3)
        coefficients = torch.tensor([0.5, -1.0, 2.0], dtype=torch.float64)
        expected = (coefficients.to(flat.dtype) @ flat).view(40, 60)
        torch.testing.assert_close(rows.combine(coefficients).to(flat.dtype), expected, rtol=1e-5, atol=1e-5)
        rows.clear()
