"""Surgery at a shared representation: ``backward(..., features=z)``."""

import copy
import weakref
from contextlib import nullcontext

import pytest
import torch
from conftest import check_same, task_gradients, wrap
from test_checkpoint import check_equal_trees, saved_and_loaded
from torch import nn
from torch.utils.checkpoint import checkpoint

import gradsurgery as gs
from gradsurgery._features import read_features
from gradsurgery.sources import Autograd
from gradsurgery.sources._backward import Backward

RULES = [
    *(gs.Sum(), gs.Mean(), gs.MGDA(), gs.PCGrad(), gs.GradVac(beta=0.5), gs.UPGrad(), gs.CAGrad(), gs.IMTLG()),
    *(gs.Chain(gs.PCGrad(), gs.MGDA()), gs.GLS(), gs.Chain(gs.GLS(), gs.PCGrad()), gs.CRMOGM(gs.MGDA())),
]


class Forked(nn.Module):
    """A trunk; past it, an adapter that ``a`` and ``b`` share, and a head for each task."""

    def __init__(self, tasks="abc", dtype=torch.float64):
        super().__init__()
        self.trunk = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 5), nn.Tanh())
        self.adapter = nn.Linear(5, 5)
        self.heads = nn.ModuleDict({task: nn.Linear(5, 1) for task in tasks})
        self.to(dtype)

    def losses(self, z, tasks=None):
        result = {}
        for k, (task, head) in enumerate(self.heads.items()):
            if tasks is None or task in tasks:
                own = torch.tanh(self.adapter(z)) if task in ("a", "b") else z
                result[task] = (head(own)[:, 0] - (-1) ** k * (k + 1)).square().mean()
        return result


def batch(number=0):
    return torch.randn(8, 4, generator=torch.Generator().manual_seed(number), dtype=torch.float64)


def naive(model, losses, features, rule):
    """Name → gradient: coefficients from the rows at the features, then one backward pass of the weighted loss.

    Parameters past the features that one task alone reaches have that task's gradient.
    """
    named = dict(model.named_parameters())
    gradients = task_gradients(losses, named)
    rows = []
    for loss in losses.values():
        found = torch.autograd.grad(loss, features, retain_graph=True, allow_unused=True)
        pairs = zip(found, features, strict=True)
        rows.append(torch.cat([(torch.zeros_like(z) if g is None else g).flatten() for g, z in pairs]))
    rows = torch.stack(rows)
    generator, count = torch.Generator().manual_seed(0), len(losses)
    state, weights = rule.init(list(losses), ["model"]), torch.ones(count, dtype=rows.dtype)
    weights, state = rule.weigh(torch.stack(list(losses.values())).detach(), state, generator=generator)
    gram = (rows @ rows.T) * weights[:, None] * weights
    mixing, _ = rule.mix(gram[None], state, generator=generator)
    coefficients = mixing[0].sum(0) * weights
    total = sum(c * loss for c, loss in zip(coefficients, losses.values(), strict=True))
    found = torch.autograd.grad(total, list(named.values()), retain_graph=True, allow_unused=True)
    expected = dict(zip(named, found, strict=True))
    for name in named:
        reached = [task for task in losses if gradients[task][name] is not None]
        if len(reached) == 1 and not name.startswith("trunk"):
            expected[name] = weights[list(losses).index(reached[0])] * gradients[reached[0]][name]
    return expected, gram


def check(model, expected):
    for name, parameter in model.named_parameters():
        if expected[name] is None:
            assert parameter.grad is None, name
        else:
            torch.testing.assert_close(parameter.grad, expected[name], msg=lambda m, name=name: f"{name}: {m}")


# --- Against the naive version ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("source", ["autograd", "batched"])
@pytest.mark.parametrize("rule", RULES, ids=repr)
def test_is_what_it_says(rule, source):
    model = Forked()
    z = model.trunk(batch())
    losses = model.losses(z)
    expected, gram = naive(model, losses, [z], rule)
    opt = wrap(model, rule, source=source)
    opt.backward(losses, features=z)
    opt.combine()
    check(model, expected)
    assert opt.last.groups == ("features",)
    torch.testing.assert_close(opt.last.gram[0], gram)
    assert not opt.due


def test_sum_is_the_gradient_of_the_sum():
    model, twin = Forked(), Forked()
    twin.load_state_dict(model.state_dict())
    opt = wrap(model, gs.Sum())
    z = model.trunk(batch())
    opt.backward(model.losses(z), features=z)
    opt.combine()
    sum(twin.losses(twin.trunk(batch())).values()).backward()
    check(model, {name: parameter.grad for name, parameter in twin.named_parameters()})


@pytest.mark.parametrize("rule", [gs.MGDA(), gs.PCGrad(), gs.UPGrad(), gs.NashMTL(), gs.AlignedMTL()], ids=repr)
def test_equals_surgery_at_the_parameters_where_the_trunk_is_orthogonal(rule):
    """Rows of W are XᵀZ for rows Z at the features: with X Xᵀ = 9 I, the two Gram matrices differ by a factor of 9."""
    factor = 3 if rule.scale_equivariant else 1
    model = nn.ModuleDict({"trunk": nn.Linear(6, 3, bias=False), **{t: nn.Linear(3, 2) for t in "abc"}}).double()
    twin = copy.deepcopy(model)
    x = factor * torch.linalg.qr(torch.randn(6, 6, dtype=torch.float64)).Q
    opts = [wrap(m, rule) for m in (model, twin)]
    for m, opt in zip((model, twin), opts, strict=True):
        z = m["trunk"](x)
        losses = {task: (m[task](z) + k - 1).square().mean() for k, task in enumerate("abc")}
        opt.backward(losses, features=z if m is model else None)
        opt.combine()
    torch.testing.assert_close(opts[1].last.gram, factor**2 * opts[0].last.gram)
    check(model, {name: parameter.grad for name, parameter in twin.named_parameters()})


@pytest.mark.parametrize("as_tensor", [False, True])
def test_losses_without_names(as_tensor):
    model = Forked()
    z = model.trunk(batch())
    losses = model.losses(z)
    expected, _ = naive(model, losses, [z], gs.MGDA())
    opt = wrap(model, gs.MGDA())
    opt.backward(torch.stack(list(losses.values())) if as_tensor else list(losses.values()), features=z)
    opt.combine()
    check(model, expected)


class Scales(nn.Module):
    """Features of two resolutions, that tasks use as they like."""

    def __init__(self):
        super().__init__()
        self.trunk = nn.ModuleDict({"stem": nn.Linear(4, 6), "fine": nn.Linear(6, 5), "coarse": nn.Linear(6, 3)}).double()
        self.heads = nn.ModuleDict({"a": nn.Linear(5, 1), "b": nn.Linear(3, 1), "c": nn.Linear(8, 1)}).double()

    def features(self, x):
        stem = self.trunk["stem"](x).tanh()
        return [self.trunk["fine"](stem), self.trunk["coarse"](stem)]

    def losses(self, z):
        inputs = {"a": z[0], "b": z[1], "c": torch.cat(z, 1)}
        return {task: (self.heads[task](inputs[task]) + k).square().mean() for k, task in enumerate("abc")}


@pytest.mark.parametrize("source", ["autograd", "batched"])
@pytest.mark.parametrize("rule", [gs.MGDA(), gs.PCGrad(), gs.Sum()], ids=repr)
def test_several_features(rule, source):
    model = Scales()
    z = model.features(batch())
    expected, gram = naive(model, model.losses(z), z, rule)
    opt = wrap(model, rule, source=source)
    opt.backward(model.losses(z), features=z)
    opt.combine()
    check(model, expected)
    torch.testing.assert_close(opt.last.gram[0], gram)


def test_parts_of_one_tensor_are_features_too():
    model = Forked()
    hidden = model.trunk(batch())
    z = hidden.chunk(2)
    losses = model.losses(torch.cat(z))
    expected, _ = naive(model, losses, list(z), gs.MGDA())
    opt = wrap(model, gs.MGDA())
    opt.backward(losses, features=(*z, z[0]))
    opt.combine()
    check(model, expected)


# --- One pass ---------------------------------------------------------------------------------------------------------


class Token:
    pass


class Watched(torch.autograd.Function):
    """Counts its backward passes, multiplies gradients, and keeps a token alive as long as its graph."""

    passes = 0
    factor = 1.0
    token = None

    @staticmethod
    def forward(ctx, x):
        ctx.token = Watched.token
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        Watched.passes += 1
        return gradient * Watched.factor


@pytest.fixture
def watched():
    Watched.passes, Watched.factor, Watched.token = 0, 1.0, None
    return Watched


class Guarded(Forked):
    """The watched function is in the middle of the trunk."""

    def features(self, x):
        return self.trunk[2:](Watched.apply(self.trunk[:2](x)))


@pytest.mark.parametrize("source", ["autograd", "batched"])
def test_one_pass_goes_through_the_trunk(watched, source):
    model = Guarded()  # whose function vmap does not take: a vectorised pass must not get there
    opt = wrap(model, gs.MGDA(), source=source)
    z = model.features(batch())
    opt.backward(model.losses(z), features=z)
    assert watched.passes == 0
    opt.combine()
    assert watched.passes == 1


@pytest.mark.parametrize("end", ["step", "zero_grad", "error"])
def test_graphs_are_released(watched, end):
    model = Guarded()
    opt = wrap(model, gs.MGDA())
    watched.token = Token()
    alive = weakref.ref(watched.token)
    z = model.features(batch())
    watched.token = None
    opt.backward(model.losses(z), features=z)
    del z
    assert alive() is not None
    if end == "error":
        with pytest.raises(ValueError, match="has no graph"):
            opt.backward({"a": torch.ones(())}, features=model.trunk(batch()))
        opt.zero_grad()
    else:
        getattr(opt, end)()
    assert alive() is None


def test_the_graph_is_kept_if_asked():
    model = Forked()
    opt = wrap(model, gs.MGDA())
    z = model.trunk(batch())
    losses = model.losses(z)
    for _ in range(2):
        opt.backward(losses, features=z, retain_graph=True)
        opt.combine()
    sum(losses.values()).backward()


def test_a_graph_that_is_gone_is_an_error():
    model = Forked()
    opt = wrap(model, gs.MGDA())
    z = model.trunk(batch())
    opt.backward(model.losses(z), features=z)
    z.sum().backward()
    model.zero_grad()
    with pytest.raises(RuntimeError, match="was freed before combine"):
        opt.step()
    assert not opt.due
    assert all(parameter.grad is None for parameter in model.parameters())
    z = model.trunk(batch())
    opt.backward(model.losses(z), features=z)
    opt.step()


def test_activation_checkpointing():
    model = Forked()
    expected, _ = naive(model, model.losses(z := model.trunk(batch())), [z], gs.MGDA())
    opt = wrap(model, gs.MGDA())
    z = checkpoint(model.trunk, batch(), use_reentrant=False)
    opt.backward(model.losses(z), features=z)
    opt.combine()
    check(model, expected)


def test_gradients_do_not_share_memory():
    model = nn.ParameterDict({name: torch.zeros(3) for name in "xyz"})
    opt = wrap(model, gs.Sum())
    z = model["x"] + model["y"] + model["z"]
    opt.backward([z.sum(), (2 * z).sum()], features=z)
    opt.combine()
    assert len({parameter.grad.data_ptr() for parameter in model.values()}) == 3
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    assert torch.cat([parameter.grad for parameter in model.values()]).norm() == pytest.approx(1.0, abs=1e-5)


# --- Steps of several passes ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rule", [gs.MGDA(), gs.PCGrad(), gs.GLS(), gs.GradVac(beta=0.5)], ids=repr)
def test_passes_add_up(rule):
    model = Forked()
    z = [model.trunk(batch(number)) for number in range(2)]
    parts = [model.losses(one) for one in z]
    expected, gram = naive(model, {task: parts[0][task] + parts[1][task] for task in "abc"}, z, rule)
    opt = wrap(model, rule)
    for number in range(2):
        z = model.trunk(batch(number))
        opt.backward(model.losses(z), features=z)
    opt.combine()
    check(model, expected)
    torch.testing.assert_close(opt.last.gram[0], gram)
    assert opt.last.groups == ("features",)


@pytest.mark.parametrize("rule", [gs.MGDA(), gs.PCGrad(), gs.GradVac(beta=0.5)], ids=repr)
@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("ends", ["combine()", "combine=True"])
def test_joint_losses_of_several_passes(rule, scaled, ends):
    model = Forked()
    z = [model.trunk(batch(number)) for number in range(2)]
    parts = [model.losses(one) for one in z]
    expected, gram = naive(model, {task: (parts[0][task] + parts[1][task]) / 2 for task in "abc"}, z, rule)
    opt = wrap(model, rule)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**9, enabled=scaled)
    for number in range(2):
        z = model.trunk(batch(number))
        last = number == 1 and ends == "combine=True"
        loss = opt.joint_loss(model.losses(z), features=z, scaler=scaler, combine=last) / 2
        if number == 0:
            opt.zero_grad()  # as loops do between forward and backward pass
        scaler.scale(loss).backward()
    if ends == "combine()":
        opt.combine()
    if scaled:
        scaler.unscale_(opt)
    check(model, expected)
    torch.testing.assert_close(opt.last.gram[0], gram)
    assert opt.last.groups == ("features",)


def test_a_joint_loss_looks_at_features_at_once():
    model = Forked()
    z = model.trunk(batch())
    opt = wrap(model, gs.MGDA(), groups="layer")
    with pytest.raises(ValueError, match="`features` needs one surgery group"):
        opt.joint_loss(model.losses(z), features=z)


def test_tasks_with_a_pass_of_their_own():
    model = Forked()
    z = {task: model.trunk(batch(k)) for k, task in enumerate("abc")}
    losses = {task: model.losses(z[task], task)[task] for task in "abc"}
    expected, gram = naive(model, losses, list(z.values()), gs.MGDA())
    opt = wrap(model, gs.MGDA(), tasks=["a", "b", "c"])
    for task in "bca":
        opt.backward({task: losses[task]}, features=z[task])
    opt.combine()
    check(model, expected)
    torch.testing.assert_close(opt.last.gram[0], gram.diagonal().diag())  # of features apart


def test_the_same_tensor_in_several_passes_is_one_feature():
    model = Forked()
    z = model.trunk(batch())
    losses = model.losses(z)
    expected, gram = naive(model, losses, [z], gs.MGDA())
    opt = wrap(model, gs.MGDA(), tasks=["a", "b", "c"])
    for task in "abc":
        opt.backward({task: losses[task]}, features=z, retain_graph=True)
    opt.combine()
    check(model, expected)
    torch.testing.assert_close(opt.last.gram[0], gram)


def test_what_is_past_the_features_of_one_pass_may_be_ahead_of_those_of_another():
    model = Forked(tasks="ac")  # of which a alone reaches the adapter in the first pass

    def passes():
        yield model.losses(z := model.trunk(batch(0))), z
        z = torch.tanh(model.adapter(model.trunk(batch(1))))
        yield {"c": model.heads["c"](z).square().mean()}, z

    opt = wrap(model, gs.MGDA(), tasks=["a", "c"])
    for losses, z in passes():
        opt.backward(losses, features=z)
    opt.combine()
    weights = dict(zip("ac", opt.last.weights[0], strict=True))
    assert min(weights.values()) > 0.01
    total = sum(weights[task] * loss for losses, _ in passes() for task, loss in losses.items())
    for name in ("trunk.0.weight", "adapter.weight"):
        parameter = model.get_parameter(name)
        torch.testing.assert_close(parameter.grad, torch.autograd.grad(total, parameter, retain_graph=True)[0])


# --- Tasks that are not there -----------------------------------------------------------------------------------------


def test_absent_tasks():
    model = Forked()
    z = model.trunk(batch())
    losses = model.losses(z, "ac")
    expected, gram = naive(model, losses, [z], gs.MGDA())
    opt = wrap(model, gs.MGDA(), tasks=["a", "b", "c"])
    opt.backward({**losses, "b": None}, features=z)
    opt.combine()
    check(model, expected)
    assert opt.last.active.tolist() == [[True, False, True]]
    torch.testing.assert_close(opt.last.gram[0][[0, 2]][:, [0, 2]], gram)


def test_a_task_by_itself_keeps_its_gradient():
    model = Forked()
    named = dict(model.named_parameters())
    opt = wrap(model, gs.Chain(gs.GLS(), gs.Mean()), tasks=["a", "b", "c"])
    z = model.trunk(batch())
    losses = model.losses(z, "a")
    expected = task_gradients(losses, named)["a"]
    opt.backward(losses, features=z)
    opt.combine()
    weight = opt.last.loss_weights[0]
    check(model, {name: None if g is None else weight * g for name, g in expected.items()})
    assert opt.last.groups == ()


def test_a_task_that_is_not_finite_sits_out():
    model = Forked()
    z = model.trunk(batch())
    losses = model.losses(z)
    expected, _ = naive(model, {task: losses[task] for task in "ac"}, [z], gs.MGDA())
    opt = wrap(model, gs.MGDA(), nonfinite="skip")
    opt.backward({**losses, "b": losses["b"] * torch.inf}, features=z)
    opt.combine()
    check(model, expected)
    assert opt.skipped == {"b": 1}


def test_all_tasks_sit_out():
    model = Forked()
    opt = wrap(model, gs.MGDA(), nonfinite="skip")
    z = model.trunk(batch())
    opt.backward({task: loss * torch.nan for task, loss in model.losses(z).items()}, features=z)
    opt.step()
    assert all(parameter.grad is None for parameter in model.parameters())


def test_raise_names_task_and_features():
    model = Forked()
    opt = wrap(model, gs.MGDA(), nonfinite="raise")
    z = model.trunk(batch())
    losses = model.losses(z)
    opt.backward({**losses, "c": losses["c"] * torch.nan}, features=z)
    with pytest.raises(
        FloatingPointError, match=r"task 'c' for parameter 'heads.c.weight' holds inf or nan, and so do 2 more"
    ):
        opt.combine()
    opt.zero_grad()
    z = model.trunk(batch())
    opt.backward({**losses, "c": (z * torch.nan).sum(), "a": z.sum(), "b": z.sum()}, features=z)
    with pytest.raises(FloatingPointError, match="task 'c' for parameter 'features' holds"):
        opt.combine()


@pytest.mark.parametrize("nonfinite", ["raise", "skip"])
def test_what_the_trunk_makes_infinite_is_an_error(watched, nonfinite):
    model = Guarded()
    opt = wrap(model, gs.MGDA(), nonfinite=nonfinite)
    z = model.features(batch())
    opt.backward(model.losses(z), features=z)
    watched.factor = torch.inf
    with pytest.raises(FloatingPointError, match=r"parameter 'trunk.0.weight' holds inf or nan, though no task's"):
        opt.combine()
    assert all(parameter.grad is None for parameter in model.parameters())


# --- With everything else ---------------------------------------------------------------------------------------------


def test_scaler():
    model = Forked(dtype=torch.float32)
    twin = copy.deepcopy(model)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**9)
    opt, other = wrap(model, gs.GradVac(beta=0.5)), wrap(twin, gs.GradVac(beta=0.5))
    for number in range(3):
        x = batch(number).float()
        z, w = model.trunk(x), twin.trunk(x)
        opt.backward(model.losses(z), features=z, scaler=scaler)
        opt.combine()
        scaler.unscale_(opt)
        other.backward(twin.losses(w), features=w)
        other.combine()
        check(model, {name: parameter.grad for name, parameter in twin.named_parameters()})
        torch.testing.assert_close(opt.last.gram, other.last.gram)
        for o in (opt, other):
            o.optimizer.step()
            o.zero_grad()
        scaler.update()


def test_overflow_in_the_trunk_leaves_the_state(watched):
    model = Guarded(dtype=torch.float32)
    opt = wrap(model, gs.GradVac(beta=0.5))
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    for number in range(2):
        before, parameters = opt.rule_state.get("target"), copy.deepcopy(model)
        watched.factor = (1.0, torch.inf)[number]
        z = model.features(batch(number).float())
        opt.backward(model.losses(z), features=z, scaler=scaler)
        opt.combine()
        scaler.step(opt)
        scaler.update()
        opt.zero_grad()
    assert opt.last.gram.isfinite().all()
    assert torch.equal(opt.rule_state["target"], before)
    check_same(model, parameters)
    assert scaler.get_scale() == 2.0


@pytest.mark.parametrize("rule", [gs.MGDA(), gs.Chain(gs.GLS(), gs.PCGrad())], ids=repr)
def test_every(rule):
    model = Forked()
    named = dict(model.named_parameters())
    opt = wrap(model, rule, every=3)
    for number in range(6):
        z = model.trunk(batch(number))
        losses = model.losses(z)
        gradients = task_gradients(losses, named)
        opt.backward(losses, features=z)
        opt.combine()
        if number % 3 == 0:
            last = opt.last
            own = dict(zip("abc", last.loss_weights if last.loss_weights is not None else [1.0] * 3, strict=True))
            weights = {task: own[task] * w for task, w in zip("abc", last.weights[0], strict=True)}
        assert opt.last is last
        for name, parameter in named.items():
            reached = [task for task in "abc" if gradients[task][name] is not None]
            c = own if len(reached) == 1 else weights
            torch.testing.assert_close(parameter.grad, sum(c[task] * gradients[task][name] for task in reached))
        opt.step()
        opt.zero_grad()


def test_without_measuring_it_is_plain_weighting():
    model, twin = Forked(), Forked()
    twin.load_state_dict(model.state_dict())
    opts = [wrap(m, gs.GLS(), measure=False) for m in (model, twin)]
    for m, opt in zip((model, twin), opts, strict=True):
        z = m.trunk(batch())
        opt.backward(m.losses(z), features=z if m is model else None)
        opt.step()
    check_same(model, twin)


def test_closure():
    model, twin = Forked(), Forked()
    twin.load_state_dict(model.state_dict())
    opt, other = wrap(model, gs.MGDA()), wrap(twin, gs.MGDA())

    def closure():
        opt.zero_grad()
        z = model.trunk(batch())
        losses = model.losses(z)
        opt.backward(losses, features=z)
        return sum(losses.values()).item()

    assert opt.step(closure) > 0
    z = twin.trunk(batch())
    other.backward(twin.losses(z), features=z)
    other.step()
    check_same(model, twin)


@pytest.mark.parametrize("every", [1, 2])
def test_a_checkpoint_continues_bit_for_bit(every):
    make = lambda m: wrap(  # noqa: E731
        m, gs.Chain(gs.PCGrad(), gs.GradVac(beta=0.3)), torch.optim.AdamW(m.parameters()), every=every, seed=3
    )

    def train(model, opt, numbers):
        for number in numbers:
            z = model.trunk(batch(number))
            opt.backward(model.losses(z), features=z)
            opt.step()
            opt.zero_grad()

    model = Forked()
    opt = make(model)
    train(model, opt, range(3))
    saved = saved_and_loaded({"model": model.state_dict(), "opt": opt.state_dict()})
    twin = Forked()
    other = make(twin)
    twin.load_state_dict(saved["model"])
    other.load_state_dict(saved["opt"])
    train(model, opt, range(3, 7))
    train(twin, other, range(3, 7))
    check_same(model, twin)
    check_equal_trees(other.state_dict(), opt.state_dict())


def test_copying_forgets_the_step():
    model = Forked()
    opt = wrap(model, gs.MGDA())
    z = model.trunk(batch())
    opt.backward(model.losses(z), features=z)
    other = copy.deepcopy(opt)
    assert opt.due
    assert not other.due


def test_recorder():
    model = Forked()
    opt = wrap(model, gs.PCGrad())
    recorder = gs.Recorder(opt)
    for number in range(3):
        z = model.trunk(batch(number))
        opt.backward(model.losses(z), features=z)
        opt.step()
        opt.zero_grad()
    assert recorder.groups == ("features",)
    assert recorder.cosines.shape == (3, 1, 3, 3)


def test_steps_with_and_without():
    model = Forked()
    opt = wrap(model, gs.GradVac(beta=0.3))
    for number in range(4):
        z = model.trunk(batch(number))
        opt.backward(model.losses(z), features=z if number % 2 else None)
        opt.step()
        opt.zero_grad()
        assert opt.last.groups == (("features",) if number % 2 else ("model", "model [a, b]"))


# --- Errors -----------------------------------------------------------------------------------------------------------


def leaf(z):
    return z.detach().requires_grad_()


def hooked(z):
    z.register_hook(lambda gradient: -gradient)
    return z


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda z: "z", TypeError, "must be a tensor, or a sequence of tensors. Found str"),
        (lambda z: {"z": z}, TypeError, "Found dict"),
        (lambda z: [z, None], TypeError, r"`features\[1\]` must be a tensor. Found NoneType"),
        (lambda z: [], ValueError, "is empty"),
        (lambda z: z.detach(), ValueError, r"`features` has no graph \(requires_grad=False\)"),
        (leaf, ValueError, r"has no graph \(it is a leaf\)"),
        (hooked, ValueError, "has a hook, which would run twice"),
        (lambda z: z * 1, ValueError, "loss of task 'a' does not depend on `features`"),
    ],
)
def test_unfit_features(make, error, message):
    model = Forked()
    opt = wrap(model, gs.MGDA())
    z = model.trunk(batch())
    with pytest.raises(error, match=message):
        opt.backward(model.losses(z), features=make(z))
    assert not opt.due
    z = model.trunk(batch())
    opt.backward(model.losses(z))
    opt.step()


def test_features_without_a_trunk():
    model = Forked()
    opt = wrap(model, gs.MGDA())
    z = batch().new_ones(8, 5).requires_grad_() * 2
    with pytest.raises(ValueError, match="No trainable parameter of the optimizer is reached through `features`"):
        opt.backward(model.losses(z), features=z)
    model.trunk.requires_grad_(False)
    z = model.trunk(batch().requires_grad_())
    with pytest.raises(ValueError, match="see that they are not frozen"):
        opt.backward(model.losses(z), features=z)


def test_features_that_depend_on_each_other():
    model = Forked()
    opt = wrap(model, gs.MGDA())
    first = model.trunk[:2](batch())
    second = model.trunk[2:](first)
    losses = model.losses(second)
    losses["c"] = losses["c"] + first.sum()
    with pytest.raises(ValueError, match="One of the `features` depends on another"):
        opt.backward(losses, features=[first, second])
    with pytest.raises(ValueError, match=r"both through `features` and past them: trunk.0.weight, trunk.0.bias"):
        opt.backward(losses, features=second)


def test_one_loss_that_depends_on_no_features():
    model = Forked()
    opt = wrap(model, gs.MGDA())
    z = model.trunk(batch())
    with pytest.raises(ValueError, match="The loss of task 'norm' does not depend on `features`"):
        opt.backward({**model.losses(z), "norm": model.adapter.weight.square().sum()}, features=z)


def test_mixing_passes():
    model = Forked()
    opt = wrap(model, gs.MGDA())
    for first, second in ((True, False), (False, True)):
        z, w = model.trunk(batch()), model.trunk(batch())
        opt.backward(model.losses(z), features=z if first else None)
        with pytest.raises(ValueError, match="passes with `features` and without"):
            opt.backward(model.losses(w), features=w if second else None)
        opt.step()
        opt.zero_grad()


def test_groups_and_mixed_batches():
    model = Forked()
    opt = wrap(model, gs.MGDA(), groups="layer")
    z = model.trunk(batch())
    with pytest.raises(ValueError, match="needs one surgery group.*Found 4; make the optimizer with groups='model'"):
        opt.backward(model.losses(z), features=z)
    opt = wrap(model, gs.MGDA(), tasks=["a", "b", "c"])
    with opt.split([0, 1, 2, 0, 1, 2, 0, 1]):
        z = model.trunk(batch())
        losses = z.square().sum(1)
    with pytest.raises(ValueError, match="Leave it out after split"):
        opt.backward(losses, features=z)


def test_several_processes():
    z = Forked().trunk(batch())
    with pytest.raises(ValueError, match="Found 2 processes; leave"):
        read_features(z, groups=1, ranks=2, mixed=False, source=Autograd())
    with pytest.raises(ValueError, match="sharded by FSDP2; leave"):
        read_features(z, groups=1, ranks=1, mixed=False, source=Backward(nullcontext))
