"""Sources of per-task gradients: the vectorised pass equals one backward pass per loss, in its values and its reach."""

import copy

import pytest
import torch
from conftest import Bent, Heads, check_gradients, combined, task_gradients, wrap
from torch import nn
from torch.utils.checkpoint import checkpoint

import gradsurgery as gs
from gradsurgery import sources


def batch(step=0, rows=8):
    return torch.randn(rows, 4, generator=torch.Generator().manual_seed(step))


def rows_of(opt):
    """Name → task → gradient, as the source has left it in the buffer."""
    gradients = opt._surgery.gradients
    return {
        name: {task: rows.of[task].clone() for task in rows.tasks}
        for name, rows in zip(gradients.names, gradients.rows, strict=True)
    }


class Conv(nn.Module):
    """Convolution, normalisation, attention and an embedding: operations whose vectorised backward pass is another."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv1d(1, 4, 3, padding=1)
        self.norm = nn.LayerNorm(4)
        self.attention = nn.MultiheadAttention(4, 2, batch_first=True)
        self.embed = nn.Embedding(5, 4)
        self.out = nn.Linear(4, 3)

    def losses(self, x):
        hidden = self.norm(self.conv(x[:, None]).transpose(1, 2)) + self.embed(torch.arange(4))
        hidden = hidden + self.attention(hidden, hidden, hidden, need_weights=False)[0]
        out = self.out(hidden.amax(1))
        targets = torch.arange(len(x)) % 3
        return {"ce": nn.functional.cross_entropy(out, targets), "l2": out.square().mean(), "up": -out[:, 0].mean()}


MODELS = {"heads": Heads, "many": lambda: Bent("abcdefg"), "operations": Conv}


@pytest.mark.parametrize("chunk_size", [1, 2, 3, None])
@pytest.mark.parametrize("name", MODELS)
def test_batched_is_autograd(name, chunk_size):
    model = MODELS[name]()
    plain = wrap(model, gs.Sum())
    batched = wrap(model, gs.Sum(), source="batched", chunk_size=chunk_size)
    expected = task_gradients(model.losses(batch()), dict(model.named_parameters()))
    for opt in (plain, batched):
        opt.backward(model.losses(batch()))
        rows = rows_of(opt)
        for name, parameter in model.named_parameters():
            wanted = {k: row[name] for k, row in enumerate(expected.values()) if row[name] is not None}
            assert rows[name].keys() == wanted.keys(), name  # who reached what
            for k, gradient in wanted.items():
                assert rows[name][k].shape == parameter.shape
                torch.testing.assert_close(rows[name][k], gradient, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("chunk_size", [1, 2, None])
def test_chunks_with_absent_tasks_and_several_steps(chunk_size):
    model = Heads()
    opt = wrap(model, gs.MGDA(), source="batched", chunk_size=chunk_size, tasks=("a", "b", "c"))
    for number, tasks in enumerate(["abc", "ac", "b", "cb", "abc"]):
        losses = {task: model.losses(batch(number))[task] for task in tasks}
        expected = combined(
            task_gradients(dict(sorted(losses.items())), dict(model.named_parameters())), lambda _: "model", gs.MGDA()
        )
        opt.backward({task: model.losses(batch(number))[task] for task in tasks})
        opt.combine()
        check_gradients(model, expected, rtol=1e-4, atol=1e-6)
        opt.step()
        opt.zero_grad()


def test_a_gradient_that_happens_to_be_zero_is_there():
    for source in ("autograd", "batched"):
        model = nn.Linear(4, 2)
        opt = wrap(model, gs.Mean(), source=source)
        opt.backward({"a": model(batch()).sum(), "zero": 0 * model(batch()).sum()})
        opt.combine()
        assert opt.last.active.tolist() == [[True, True]]
        torch.testing.assert_close(model.bias.grad, torch.full((2,), 4.0))


def test_many_nodes_do_not_recurse():
    model = nn.Linear(4, 4)
    opt = wrap(model, gs.Sum(), source="batched")
    hidden = model(batch())
    for _ in range(3000):
        hidden = hidden + 0.001
    opt.backward({"a": hidden.sum(), "b": hidden[:, 0].sum()})
    opt.combine()
    assert model.weight.grad.any()


@pytest.mark.parametrize("source", ["autograd", "batched"])
def test_parameters_that_are_not_trained_now(source):
    model = Heads()
    opt = wrap(model, gs.MGDA(), source=source)
    for frozen in (False, True, False):
        model.trunk[0].requires_grad_(not frozen)
        trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
        expected = combined(task_gradients(model.losses(batch()), trained), lambda _: "model", gs.MGDA())
        opt.backward(model.losses(batch()))
        opt.combine()
        everything = {name: expected.get(name) for name, _ in model.named_parameters()}
        check_gradients(model, everything, rtol=1e-4, atol=1e-6)
        opt.zero_grad()


# --- The graph --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("source", ["autograd", "batched"])
def test_the_graph_is_freed(source):
    model = Heads()
    opt = wrap(model, gs.Sum(), source=source)
    losses = model.losses(batch())
    opt.backward(losses)
    with pytest.raises(RuntimeError, match="second time"):
        losses["a"].backward()


@pytest.mark.parametrize("source", ["autograd", "batched"])
def test_retain_graph(source):
    model = Heads()
    opt = wrap(model, gs.MGDA(), source=source)
    losses = model.losses(batch())
    expected = combined(task_gradients(losses, dict(model.named_parameters())), lambda _: "model", gs.MGDA())
    opt.backward(losses, retain_graph=True)
    opt.combine()
    check_gradients(model, expected, rtol=1e-4, atol=1e-6)
    opt.zero_grad()
    opt.backward(losses)
    opt.combine()
    check_gradients(model, expected, rtol=1e-4, atol=1e-6)


class Checkpointed(Bent):
    def losses(self, x):
        hidden = checkpoint(self.layers[:2], x, use_reentrant=False)
        out = self.layers[2](hidden)
        return {task: (out.sum(1) + k * out[:, k] - 2 * k + 1).square().mean() for k, task in enumerate(self.tasks)}


@pytest.mark.parametrize("shared", [True, False])
def test_activation_checkpointing(shared):
    model = Checkpointed()
    plain = Bent()
    plain.load_state_dict(model.state_dict())
    expected = combined(task_gradients(plain.losses(batch()), dict(plain.named_parameters())), lambda _: "model", gs.MGDA())
    opt = wrap(model, gs.MGDA())
    if shared:
        opt.backward(model.losses(batch()))
    else:
        opt.backward({task: model.losses(batch())[task] for task in model.tasks})
    opt.combine()
    check_gradients(model, expected, rtol=1e-4, atol=1e-6)


def test_one_forward_pass_per_task_and_call():
    model = Heads()
    opt = wrap(model, gs.MGDA(), tasks=("a", "b", "c"))
    expected = combined(task_gradients(model.losses(batch()), dict(model.named_parameters())), lambda _: "model", gs.MGDA())
    for _ in range(2):
        for task in "abc":
            opt.backward({task: model.losses(batch())[task]})
        opt.combine()
        check_gradients(model, expected, rtol=1e-4, atol=1e-6)
        opt.zero_grad()


# --- Compiled models --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shared", [True, False])
def test_a_compiled_model(shared):
    model = Bent().layers
    compiled = torch.compile(model, backend="aot_eager")
    parameters = dict(model.named_parameters())

    def losses(function):
        out = function(batch())
        yield "a", (out.sum(1) - 1).square().mean()
        out = out if shared else function(batch())
        yield "b", (out[:, 0] + 2).square().mean()

    expected = combined(task_gradients(dict(losses(model)), parameters), lambda _: "model", gs.MGDA())
    opt = wrap(compiled, gs.MGDA())
    for _ in range(2):
        opt.backward(dict(losses(compiled)))
        opt.combine()
        check_gradients(model, expected, rtol=1e-4, atol=1e-6)
        opt.zero_grad()


def refusing(monkeypatch):
    """As a compiled model whose backward pass has given its buffers away: it refuses to keep the graph."""
    plain, calls = torch.autograd.grad, []

    def grad(*args, retain_graph=None, **kwargs):
        calls.append(retain_graph)
        if retain_graph:
            raise RuntimeError(
                "This backward function was compiled with non-empty donated buffers which requires create_graph=False and "
                "retain_graph=False. Please keep backward(create_graph=False, retain_graph=False)"
            )
        return plain(*args, retain_graph=retain_graph, **kwargs)

    monkeypatch.setattr(torch.autograd, "grad", grad)
    return calls


def test_donated_buffers_with_one_forward_pass_per_task(monkeypatch):
    model = Bent()
    expected = combined(task_gradients(model.losses(batch()), dict(model.named_parameters())), lambda _: "model", gs.MGDA())
    opt = wrap(model, gs.MGDA())
    losses = {task: model.losses(batch())[task] for task in model.tasks}
    calls = refusing(monkeypatch)
    opt.backward(losses)
    assert calls == [True, False, True, False, False]
    opt.combine()
    check_gradients(model, expected, rtol=1e-4, atol=1e-6)


def test_donated_buffers_with_a_shared_forward_pass(monkeypatch):
    model = Bent()
    opt = wrap(model, gs.MGDA())
    losses = model.losses(batch())
    refusing(monkeypatch)
    with pytest.raises(
        RuntimeError, match=r"task 'b' shares a compiled forward pass .* Set torch._functorch.config.donated_buffer = False"
    ):
        opt.backward(losses)
    assert not opt.due


def test_donated_buffers_when_the_graph_is_to_be_kept(monkeypatch):
    model = Bent()
    opt = wrap(model, gs.MGDA())
    losses = model.losses(batch())
    refusing(monkeypatch)
    with pytest.raises(RuntimeError, match="donated buffers"):  # freeing it silently would break a promise
        opt.backward(losses, retain_graph=True)


# --- Errors -----------------------------------------------------------------------------------------------------------


class NotVectorised(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        return gradient * float(gradient.sum().item() == gradient.sum().item())


def test_a_model_that_cannot_be_vectorised():
    model = Bent()
    losses = lambda: {t: NotVectorised.apply(loss) for t, loss in model.losses(batch()).items()}  # noqa: E731
    opt = wrap(model, gs.MGDA(), source="batched")
    with pytest.raises(RuntimeError, match=r"source='batched' could not vectorise .* Use source='autograd', which works"):
        opt.backward(losses())
    assert not opt.due
    opt = wrap(model, gs.MGDA())
    opt.backward(losses())
    opt.step()


def test_sparse_gradients_cannot_be_vectorised():
    model = nn.Sequential(nn.Embedding(5, 3, sparse=True), nn.Linear(3, 2))
    opt = wrap(model, gs.MGDA(), source="batched")
    out = model(torch.tensor([1, 2]))
    with pytest.raises(RuntimeError, match="Use source='autograd'"):
        opt.backward({"a": out.sum(), "b": out.square().sum()})


@pytest.mark.parametrize("source", ["autograd", "batched"])
def test_an_error_in_a_backward_pass_leaves_nothing_behind(source):
    model = Bent()
    twin = copy.deepcopy(model)
    opt, other = wrap(model, gs.PCGrad(), source=source), wrap(twin, gs.PCGrad(), source=source)
    losses = model.losses(batch())
    losses["c"].register_hook(lambda gradient: 1 / 0)
    with pytest.raises(Exception):  # noqa: B017, PT011
        opt.backward(losses)
    assert not opt.due
    assert all(not rows.of for rows in opt._surgery.gradients.rows)
    opt.backward(model.losses(batch()))
    other.backward(twin.losses(batch()))
    opt.combine()
    other.combine()
    check_gradients(model, {name: parameter.grad for name, parameter in twin.named_parameters()}, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"source": "forward"}, r"`source` must be 'autograd' or 'batched'. Found 'forward'"),
        ({"chunk_size": 2}, r"`chunk_size` belongs to source='batched'. Found chunk_size=2 without it"),
        ({"source": "batched", "chunk_size": 0}, r"`chunk_size` must be at least 1, or None for all at once. Found 0"),
    ],
)
def test_bad_settings(settings, message):
    with pytest.raises(ValueError, match=message):
        wrap(Bent(), gs.PCGrad(), **settings)


def test_sources_are_values():
    assert sources.Batched(2) == sources.Batched(chunk_size=2) != sources.Batched()
    assert repr(sources.Autograd()) == "Autograd()"
