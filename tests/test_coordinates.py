"""Coordinate rules: their laws, naive versions from the papers, and what becomes of them in a step."""

import copy
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from conftest import TASKS, Bent, Heads, batch, check_same, task_gradients, wrap
from hypothesis import given, settings
from hypothesis import strategies as st
from test_buffer import Lookup
from test_checkpoint import check_equal_trees, saved_and_loaded
from torch import nn

import gradsurgery as gs
from gradsurgery import _buffer, _catalogue
from gradsurgery._bench.bench import rule_named
from gradsurgery._buffer import Rows
from gradsurgery._coordinates import added

RULES = {
    "graddrop": gs.GradDrop(),
    "graddrop, leak": gs.GradDrop(0.3),
    "graddrop, a leak": gs.GradDrop({"b": 1.0, "a": 0.25}),
    "mean": gs.TrimmedMean(0),
    "trimmed mean": gs.TrimmedMean(1),
    "trimmed mean of five": gs.TrimmedMean(2),
}
every_rule = pytest.mark.parametrize("rule", RULES.values(), ids=RULES)
both = pytest.mark.parametrize("rule", [gs.GradDrop(), gs.TrimmedMean(1)], ids=repr)


# --- Naive versions ---------------------------------------------------------------------------------------------------


def graddrop(rows, noise, leaks):
    """Chen et al. 2020, Algorithm 1, coordinate by coordinate."""
    result = []
    for column, u in zip(rows.T.tolist(), noise.tolist(), strict=True):
        total = sum(abs(g) for g in column)
        purity = 0.5 * (1 + sum(column) / total) if total else 0.5
        masks = [(purity > u) * (g > 0) + (purity < u) * (g < 0) for g in column]
        result.append(sum((leak + (1 - leak) * mask) * g for g, mask, leak in zip(column, masks, leaks, strict=True)))
    return torch.tensor(result, dtype=rows.dtype)


def trimmed_mean(rows, trim):
    """Yin et al. 2018, Definition 2, coordinate by coordinate."""
    result = []
    for column in rows.T.tolist():
        left = sorted(column)[trim : len(column) - trim]
        result.append(sum(left) / len(left))
    return torch.tensor(result, dtype=rows.dtype)


def random(tasks, count=200, seed=0):
    generator = torch.Generator().manual_seed(100 * tasks + seed)
    rows = torch.randn(tasks, count, generator=generator, dtype=torch.float64)
    rows[:, ::5] = rows[:, ::5].abs()
    rows[torch.rand(tasks, count, generator=generator) < 0.2] = 0.0
    return rows, torch.rand(count, generator=generator, dtype=torch.float64)


@pytest.mark.parametrize("tasks", [1, 2, 3, 8])
@pytest.mark.parametrize("leaks", [None, 0.3, (1.0, 0.0, 0.5)], ids=str)
def test_graddrop_is_the_papers(tasks, leaks):
    rows, noise = random(tasks)
    names = [str(k) for k in range(tasks)]
    each = [leaks or 0.0] * tasks if not isinstance(leaks, tuple) else [leaks[k % 3] for k in range(tasks)]
    rule = gs.GradDrop() if leaks is None else gs.GradDrop(dict(zip(names, each, strict=True)))
    torch.testing.assert_close(rule.combine(rows, tasks=names, noise=noise), graddrop(rows, noise, each))


@pytest.mark.parametrize("trim", [0, 1, 2, 5])
@pytest.mark.parametrize("tasks", [1, 3, 5, 11, 16])
def test_trimmed_mean_is_the_papers(tasks, trim):
    rows, _ = random(tasks)
    if tasks > 2 * trim:
        found = gs.operate(rows, gs.TrimmedMean(trim))
        torch.testing.assert_close(found, trimmed_mean(rows, trim))
        rows[0] = 1e30  # anything at all
        if trim:
            assert gs.operate(rows, gs.TrimmedMean(trim)).abs().max() < 10
    else:
        with pytest.raises(ValueError, match=f"`trim={trim}` needs at least {2 * trim + 1} tasks. Found {tasks}"):
            gs.operate(rows, gs.TrimmedMean(trim))


def test_graddrop_picks_signs_as_often_as_they_are_pure():
    rows = torch.tensor([[3.0], [-1.0]]).expand(2, 40_000)
    found = gs.operate(rows, gs.GradDrop(), generator=torch.Generator().manual_seed(0))
    assert set(found.tolist()) == {3.0, -1.0}
    assert (found > 0).double().mean() == pytest.approx(0.75, abs=0.01)


# --- Laws -------------------------------------------------------------------------------------------------------------


@st.composite
def situations(draw, most=6):
    tasks, count = draw(st.integers(1, most)), draw(st.integers(1, 12))
    numbers = st.floats(-10, 10).map(lambda value: value if abs(value) > 1e-100 else 0.0)  # scaled, they stay normal
    values = st.one_of(st.just(0.0), numbers, st.sampled_from([1e-30, -1e-30, 1e12, -1e12]))
    rows = draw(st.lists(st.lists(values, min_size=count, max_size=count), min_size=tasks, max_size=tasks))
    noise = draw(st.lists(st.floats(0, 1, exclude_max=True, width=32), min_size=count, max_size=count))
    return torch.tensor(rows, dtype=torch.float64), torch.tensor(noise, dtype=torch.float64)


def ask(rule, rows, noise, names=None):
    names = list("abcdefgh"[: len(rows)]) if names is None else names
    before = rows.clone()
    result = rule.combine(rows, tasks=names, noise=noise if rule.random else None)
    assert torch.equal(rows, before)  # pure
    assert result.shape == rows.shape[1:]
    assert result.isfinite().all()
    return result


def rounding(rows):
    return 1e-14 * rows.abs().amax(0)


law = settings(max_examples=30, deadline=None)


@every_rule
@given(data=st.data())
@law
def test_elementwise(rule, data):
    rows, noise = data.draw(situations())
    whole = ask(rule, rows, noise)
    order = torch.tensor(data.draw(st.permutations(range(rows.shape[1]))))
    assert torch.equal(ask(rule, rows[:, order], noise[order]), whole[order])
    at = data.draw(st.integers(0, rows.shape[1]))
    pieces = [ask(rule, rows[:, part], noise[part]) for part in (slice(at), slice(at, None))]
    assert torch.equal(torch.cat(pieces), whole)


@every_rule
@given(data=st.data())
@law
def test_symmetric(rule, data):
    rows, noise = data.draw(situations())
    order = data.draw(st.permutations(range(len(rows))))
    names = "abcdefgh"[: len(rows)]
    moved = names if rule.symmetric else [names[k] for k in order]
    assert ((ask(rule, rows[order], noise, moved) - ask(rule, rows, noise)).abs() <= rounding(rows)).all()


@every_rule
@given(situation=situations(), exponent=st.integers(-40, 40))
@law
def test_scale_equivariant(rule, situation, exponent):
    assert rule.scale_equivariant
    rows, noise = situation
    assert torch.equal(ask(rule, 2.0**exponent * rows, noise), 2.0**exponent * ask(rule, rows, noise))


@every_rule
@given(situation=situations())
@law
def test_zero(rule, situation):
    rows, noise = situation
    assert (ask(rule, torch.zeros_like(rows), noise) == 0).all()


@every_rule
@given(situation=situations(), sign=st.sampled_from([-1, 1]))
@law
def test_idle_where_gradients_agree(rule, situation, sign):
    rows, noise = situation
    if isinstance(rule, gs.GradDrop):
        rows = sign * rows.abs()
        torch.testing.assert_close(ask(rule, rows, noise), rows.sum(0), rtol=1e-14, atol=0)
    else:
        same = rows[:1].expand_as(rows)
        torch.testing.assert_close(ask(rule, same, noise), rows[0], rtol=1e-14, atol=0)


@given(situation=situations())
@law
def test_nothing_trimmed_is_the_mean(situation):
    rows, noise = situation
    assert ((ask(gs.TrimmedMean(0), rows, noise) - rows.mean(0)).abs() <= rounding(rows)).all()


@every_rule
@given(situation=situations(most=1))
@law
def test_one_task_keeps_its_gradient(rule, situation):
    rows, noise = situation
    torch.testing.assert_close(ask(rule, rows, noise), rows[0])


@given(situation=situations())
@law
def test_graddrop_leaks_all_or_picks_one_sign(situation):
    rows, noise = situation
    assert ((ask(gs.GradDrop(1.0), rows, noise) - rows.sum(0)).abs() <= rounding(rows)).all()
    found = ask(gs.GradDrop(), rows, noise)
    assert ((found == added(rows.clamp(min=0))) | (found == added(rows.clamp(max=0)))).all()


# --- Rows -------------------------------------------------------------------------------------------------------------


@every_rule
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.complex64])
@pytest.mark.parametrize("together", [True, False])
def test_pieces_make_no_difference(rule, dtype, together, monkeypatch):
    def run():
        generator = torch.Generator().manual_seed(1)
        block = torch.randn(5, 30, 7, generator=generator).to(dtype)
        rows = Rows()
        if together:
            rows.add_block(range(5), block)
        else:
            for task, row in enumerate(block):
                rows.add(task, row)
        noise = torch.rand(rows.coordinates, generator=generator, dtype=rows.precision)
        sizes = []

        def function(chunk, noise):
            sizes.append(chunk.numel())
            return rule.combine(chunk, tasks=list("abcde"), noise=noise)

        return rows.reduce(function, noise), sizes

    whole, sizes = run()
    assert len(sizes) == 1
    assert whole.shape == (30, 7)
    assert whole.dtype == dtype
    monkeypatch.setattr(_buffer, "_CPU_CHUNK", 64)
    pieces, sizes = run()
    assert torch.equal(pieces, whole)
    assert max(sizes) <= 64  # the memory that a rule may take


# --- A step -----------------------------------------------------------------------------------------------------------


def by_hand(gradients, rule):
    """Name → gradient, for a rule that draws nothing."""
    result = {}
    for name in next(iter(gradients.values())):
        there = [task for task in gradients if gradients[task][name] is not None]
        rows = [gradients[task][name] for task in there]
        result[name] = rows[0] if len(rows) == 1 else rule.combine(torch.stack(rows).flatten(1), tasks=there, noise=None)
    return result


@pytest.mark.parametrize("source", ["autograd", "batched"])
@pytest.mark.parametrize("spec", ["model", "tensor"])
@pytest.mark.parametrize("rule", [gs.TrimmedMean(0), gs.TrimmedMean(1)], ids=repr)
def test_a_step_is_what_it_says(rule, spec, source):
    model = Heads().double()
    named = dict(model.named_parameters())
    opt = wrap(model, rule, groups=spec, source=source)
    for number in range(2):
        x = batch(number).double()
        expected = by_hand(task_gradients(model.losses(x), named), rule)
        opt.backward(model.losses(x))
        opt.combine()
        for name, parameter in named.items():
            torch.testing.assert_close(parameter.grad, expected[name].view_as(parameter))
        opt.zero_grad()


@pytest.mark.parametrize("source", ["autograd", "batched"])
def test_a_step_picks_signs(source):
    model = Heads().double()
    named = dict(model.named_parameters())
    opt = wrap(model, gs.GradDrop(), source=source)
    gradients = task_gradients(model.losses(batch().double()), named)
    opt.backward(model.losses(batch().double()))
    opt.combine()
    picked = []
    for name, parameter in named.items():
        rows = torch.stack([g[name] for g in gradients.values() if g[name] is not None])
        sums = torch.stack([rows.clamp(min=0).sum(0), rows.clamp(max=0).sum(0)])
        near = torch.isclose(parameter.grad, sums, rtol=1e-9, atol=1e-12)
        assert near.any(0).all(), name
        picked.append(near[:, (sums != 0).all(0)])
    shares = torch.cat([near.flatten(1) for near in picked], 1).double().mean(1)
    assert (shares > 0.2).all()


@both
def test_groups_make_no_difference(rule):
    results = []
    for spec in ("model", "layer", "tensor"):
        torch.manual_seed(0)
        model = Heads()
        opt = wrap(model, rule, groups=spec)
        for number in range(2):
            opt.backward(model.losses(batch(number)))
            opt.step()
            opt.zero_grad()
        results.append(model)
    for other in results[1:]:
        check_same(results[0], other)


@both
def test_no_gram_matrix(rule, monkeypatch):
    def never(*args):
        raise AssertionError("a Gram matrix")

    monkeypatch.setattr("gradsurgery._plan.gram", never)
    monkeypatch.setattr(Rows, "products", never)
    for whole in (rule, gs.Chain(gs.GLS(), rule)):
        model = Heads()
        opt = wrap(model, whole)
        recorder = gs.Recorder(opt)
        opt.backward(model.losses(batch()))
        opt.step()
        assert opt.last.groups == ()
        assert opt.last.tasks == TASKS
        assert opt.last.losses.isfinite().all()
        assert set(opt.last.figures()) == {f"surgery/loss/{task}" for task in TASKS}
        assert recorder.cosines.shape == (1, 0, 3, 3)
        assert repr(opt.last) == "Step(3 tasks, 0 groups: 0 of 0 pairs in conflict, 0 of 0 pairs operated on)"
    opt = wrap(model, gs.Chain(gs.PCGrad(), rule))
    opt.backward(model.losses(batch()))
    with pytest.raises(AssertionError, match="a Gram matrix"):
        opt.step()


def test_random_numbers_are_the_steps_and_the_seeds():
    def run(seed, steps):
        torch.manual_seed(0)
        model = Bent()
        opt = wrap(model, gs.GradDrop(), seed=seed)
        for _ in range(steps):
            opt.zero_grad()
            opt.backward(model.losses(batch()))
            opt.combine()
        return torch.cat([parameter.grad.flatten() for parameter in model.parameters()])

    assert torch.equal(run(0, 1), run(0, 1))
    assert not torch.equal(run(0, 1), run(1, 1))
    assert not torch.equal(run(0, 1), run(0, 2))


def test_a_rule_without_random_numbers_draws_none():
    model = Bent()
    opt = wrap(model, gs.TrimmedMean(1), seed=3)
    opt.backward(model.losses(batch()))
    opt.step()
    assert torch.equal(opt.state_dict()["surgery"]["generator"], torch.Generator().manual_seed(3).get_state())
    generator = torch.Generator().manual_seed(3)
    gs.operate(torch.ones(3, 4), gs.TrimmedMean(1), generator=generator)
    assert torch.equal(generator.get_state(), torch.Generator().manual_seed(3).get_state())


@pytest.mark.parametrize("value", [torch.inf, -torch.inf, torch.nan])
@both
def test_one_value_that_is_not_finite_shows(rule, value):
    rows = torch.arange(12.0).view(4, 3)
    rows[1, 2] = value
    assert gs.operate(rows, rule).isfinite().tolist() == [True, True, False]


@both
def test_a_checkpoint_continues_bit_for_bit(rule):
    def train(model, opt, numbers):
        for number in numbers:
            opt.backward(model.losses(batch(number)))
            opt.step()
            opt.zero_grad()

    rule = gs.Chain(gs.GradVac(beta=0.3), rule)
    model = Bent()
    opt = wrap(model, rule, seed=4)
    train(model, opt, range(3))
    saved = saved_and_loaded({"model": model.state_dict(), "opt": opt.state_dict()})
    twin = Bent()
    other = wrap(twin, rule)
    twin.load_state_dict(saved["model"])
    other.load_state_dict(saved["opt"])
    train(model, opt, range(3, 6))
    train(twin, other, range(3, 6))
    check_same(model, twin)
    check_equal_trees(other.state_dict(), opt.state_dict())
    assert copy.deepcopy(opt).rule == opt.rule == rule
    with pytest.raises(ValueError, match=r"The checkpoint's rule is Chain\(GradVac.*, this optimizer's is GradDrop"):
        wrap(Bent(), gs.GradDrop()).load_state_dict(saved["opt"])


# --- Mixed batches ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rule", [*RULES.values(), gs.Chain(gs.GLS(), gs.PCGrad(), gs.GradDrop())], ids=repr)
def test_streaming_gives_the_same_bits(rule):
    if isinstance(rule, gs.TrimmedMean) and rule.trim > 1:
        pytest.skip("needs more tasks")
    results = []
    for stream in (False, None):
        torch.manual_seed(0)
        model = Bent()
        opt = wrap(model, rule, groups="tensor", tasks=["a", "b", "c"], stream=stream)
        for number in range(4):
            with opt.split(torch.arange(8) % 3):
                losses = (model.layers(batch(number)).sum(1) - 1).square()
            opt.backward(losses)
            assert opt.due == (stream is False or number == 0)  # surgery is done already
            opt.step()
            opt.zero_grad()
        results.append((model, opt))
    assert results[1][1].streaming
    check_same(results[0][0], results[1][0])
    check_equal_trees(results[0][1].state_dict()["surgery"], results[1][1].state_dict()["surgery"])


@both
def test_a_single_pass_gives_what_a_pass_for_each_task_does(rule):
    model = Bent().double()
    twin = copy.deepcopy(model)
    opts = [wrap(m, rule, tasks=["a", "b", "c"]) for m in (model, twin)]
    for number in range(3):
        x = batch(number).double()[:6]
        with opts[0].split([0, 1, 2, 0, 1, 2]):
            losses = model.layers(x).square().sum(1)
        opts[0].backward(losses)
        out = twin.layers(x).square().sum(1)
        opts[1].backward({task: out[k::3].mean() for k, task in enumerate("abc")})
        for opt in opts:
            opt.step()
            opt.zero_grad()
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p, q)


# --- Sparse rows ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "rule", [gs.GradDrop(), gs.GradDrop(0.5), gs.TrimmedMean(0), gs.Chain(gs.MGDA(), gs.GradDrop())], ids=repr
)
@pytest.mark.parametrize("tied", [False, True])
def test_sparse_rows_are_as_dense_ones(rule, tied):
    results = []
    for sparse in (False, True):
        torch.manual_seed(0)
        model = Lookup(sparse, tied).double()
        opt = wrap(model, rule, tasks=["a", "b"])
        opt.backward(model.losses())
        opt.combine()
        results.append(model)
    found = results[1].table.weight.grad
    assert found.is_sparse != tied
    torch.testing.assert_close(found.to_dense() if found.is_sparse else found, results[0].table.weight.grad)


# --- Chains -----------------------------------------------------------------------------------------------------------


def test_rows_are_mixed_first():
    model = Bent().double()
    named = dict(model.named_parameters())
    opt = wrap(model, gs.Chain(gs.GLS(), gs.PCGrad(), gs.TrimmedMean(1)), groups="tensor")
    gradients = task_gradients(model.losses(batch().double()), named)
    opt.backward(model.losses(batch().double()))
    opt.combine()
    for mixing, (name, parameter) in zip(opt.last.mixing, named.items(), strict=True):
        rows = torch.stack([gradients[task][name].flatten() for task in "abc"]) * opt.last.loss_weights[:, None]
        torch.testing.assert_close(parameter.grad.flatten(), trimmed_mean(mixing @ rows, 1))


def test_operate_mixes_first():
    rows, _ = random(3)
    mixed = gs.operate(rows, gs.Chain(gs.EqualNorm(), gs.TrimmedMean(1)))
    lengths = rows.norm(dim=1, keepdim=True)
    torch.testing.assert_close(mixed, trimmed_mean(rows / lengths * lengths.mean(), 1))
    losses = torch.tensor([1.0, 2.0, 4.0])
    found, state = gs.operate(rows, gs.Chain(gs.GLS(), gs.TrimmedMean(1)), losses=losses, state={})
    weights, _ = gs.GLS().weigh(losses.double(), {})
    torch.testing.assert_close(found, trimmed_mean(rows * weights[:, None], 1))
    assert state == {"0": {}}


def test_operate_draws_other_random_numbers_each_time():
    rows, generator = random(3)[0], torch.Generator().manual_seed(0)
    found = [gs.operate(rows, gs.GradDrop(), generator=generator) for _ in range(3)]
    assert not torch.equal(found[0], found[1])
    assert not torch.equal(found[1], found[2])
    again = torch.Generator().manual_seed(0)
    assert all(torch.equal(gs.operate(rows, gs.GradDrop(), generator=again), one) for one in found)
    before = generator.get_state()
    gs.operate(rows, gs.TrimmedMean(), generator=generator)  # draws none
    assert torch.equal(generator.get_state(), before)


def test_chains_are_flattened():
    inner = gs.Chain(gs.PCGrad(), gs.GradDrop(0.1))
    chain = gs.Chain(gs.GLS(), inner)
    assert repr(chain) == "Chain(GLS(), PCGrad(weights=None), GradDrop(leak=0.1))"
    assert chain == gs.Chain(gs.GLS(), gs.PCGrad(), gs.GradDrop(0.1)) != gs.Chain(gs.GLS(), gs.PCGrad())
    assert gs.Chain(gs.GradDrop()).coordinates == gs.GradDrop()
    assert (chain.random, gs.Chain(gs.Mean(), gs.TrimmedMean()).random) == (True, False)
    for rules in ((gs.GradDrop(), gs.Mean()), (inner, gs.TrimmedMean())):
        with pytest.raises(ValueError, match=r"it must be the last of a `Chain`. GradDrop\("):
            gs.Chain(*rules)


def test_states_are_guarded_without_gram_matrices():
    model = Heads()
    opt = wrap(model, gs.Chain(gs.UncertaintyWeighting(), gs.TrimmedMean(1)))
    for number in range(2):
        losses = model.losses(batch(number))
        before = copy.deepcopy(opt.rule_state)
        opt.backward(losses if not number else {**losses, "a": losses["a"] * torch.tensor(torch.inf)})
        opt.combine()
        opt.zero_grad()
    check_equal_trees(opt.rule_state, before)


# --- With everything else ---------------------------------------------------------------------------------------------


@both
def test_what_is_not_finite_shows(rule):
    model = Bent()
    opt = wrap(model, rule)
    losses = model.losses(batch())
    opt.backward({**losses, "b": losses["b"] * torch.inf})
    opt.combine()
    assert all(not parameter.grad.isfinite().all() for parameter in model.parameters())
    opt = wrap(model, gs.TrimmedMean(0), nonfinite="skip")
    opt.zero_grad()
    named = dict(model.named_parameters())
    losses = model.losses(batch())
    expected = by_hand(task_gradients({task: losses[task] for task in "ac"}, named), gs.TrimmedMean(0))
    opt.backward({**losses, "b": losses["b"] * torch.nan})
    opt.combine()
    for name, parameter in named.items():
        torch.testing.assert_close(parameter.grad, expected[name].view_as(parameter))


@dataclass(frozen=True)
class Clipped(gs.CoordinateRule):
    """The sum of gradients that are clipped to [-0.01, 0.01]."""

    def combine(self, rows, *, tasks, noise):
        assert noise is None
        return rows.clamp(-0.01, 0.01).sum(0)


@pytest.mark.parametrize("rule", [Clipped(), gs.GradDrop(), gs.TrimmedMean(1)], ids=repr)
def test_rules_see_gradients_without_the_scale(rule):
    grads = []
    for scaler in (None, torch.amp.GradScaler("cpu", init_scale=2.0**12)):
        torch.manual_seed(0)
        model = Bent()
        opt = wrap(model, rule)
        opt.backward(model.losses(batch()), scaler=scaler)
        opt.combine()
        scale = 1.0 if scaler is None else 2.0**12
        grads.append(torch.cat([parameter.grad.flatten() for parameter in model.parameters()]) / scale)
    torch.testing.assert_close(grads[0], grads[1])


@dataclass(frozen=True)
class Misshapen(gs.CoordinateRule):
    def combine(self, rows, *, tasks, noise):
        return rows.sum()


def test_a_rule_that_returns_another_shape():
    with pytest.raises(ValueError, match=r"Misshapen\(\) must combine rows \(2, 3\) to \(3,\). Found shape \(\)"):
        gs.operate(torch.ones(2, 3), Misshapen())
    with pytest.raises(NotImplementedError, match="CoordinateRule must override combine"):
        gs.operate(torch.ones(2, 3), gs.CoordinateRule())


@pytest.mark.parametrize("rule", [gs.GradDrop(), gs.TrimmedMean(1), gs.Chain(gs.EqualNorm(), gs.TrimmedMean(1))], ids=repr)
def test_at_features(rule):
    model = Heads().double()
    named = dict(model.named_parameters())
    z = model.trunk(batch().double())
    losses = {task: (head(model.adapter(z)) - k).square().mean() for k, (task, head) in enumerate(model.heads.items())}
    rows = torch.stack([torch.autograd.grad(loss, z, retain_graph=True)[0].flatten() for loss in losses.values()])
    adapter = torch.stack([g["adapter.weight"].flatten() for g in task_gradients(losses, named).values()])
    opt = wrap(model, rule)
    opt.backward(losses, features=z)
    opt.combine()
    seen = []
    z.register_hook(seen.append)
    if isinstance(rule, gs.GradDrop):
        sums = rows.clamp(min=0).sum(0), rows.clamp(max=0).sum(0)
        trunk = None
    else:
        mixing = opt.last.mixing[0] if opt.last.groups else torch.eye(3, dtype=torch.float64)
        trunk = trimmed_mean(mixing @ rows, 1)
        torch.testing.assert_close(named["adapter.weight"].grad.flatten(), trimmed_mean(mixing @ adapter, 1))
        z = model.trunk(batch().double())
        expected = torch.autograd.grad(z, list(model.trunk.parameters()), trunk.view_as(z))
        for parameter, gradient in zip(model.trunk.parameters(), expected, strict=True):
            torch.testing.assert_close(parameter.grad, gradient)
        return
    bias = named["trunk.2.bias"].grad  # of a sum over the batch, whose every term is one of two
    z = model.trunk(batch().double())
    low, high = (torch.minimum(*sums), torch.maximum(*sums))
    slope = (1 - z.square()).flatten()
    bounds = [(slope * side).view_as(z).sum(0) for side in (low, high)]
    assert ((bounds[0] <= bias + 1e-12) & (bias <= bounds[1] + 1e-12)).all()


@pytest.mark.parametrize("infinite", [False, True])
def test_states_are_guarded_at_features(infinite):
    model = nn.Linear(4, 3).double()
    opt = wrap(model, gs.Chain(gs.UncertaintyWeighting(), gs.TrimmedMean(1)), tasks=3)
    before = copy.deepcopy(opt.rule_state)
    z = model(batch().double())
    opt.backward([(z + k).square().sum() * (torch.inf if infinite and k == 1 else 1.0) for k in range(3)], features=z)
    opt.combine()
    if infinite:
        check_equal_trees(opt.rule_state, before)
    else:
        with pytest.raises(AssertionError):
            check_equal_trees(opt.rule_state, before)
    assert model.weight.grad.isfinite().all() != infinite


def test_features_that_a_task_does_not_reach_are_zeros_of_it():
    model = nn.ModuleDict({"trunk": nn.Linear(4, 6), **{task: nn.Linear(3, 1) for task in "abc"}}).double()
    z = model["trunk"](batch().double()).chunk(2, 1)
    losses = {task: (model[task](z[k % 2]) + k).square().mean() for k, task in enumerate("abc")}
    rows = []
    for loss in losses.values():
        found = torch.autograd.grad(loss, z, retain_graph=True, allow_unused=True)
        rows.append(torch.cat([torch.zeros_like(z[0]) if g is None else g for g in found], 1).flatten())
    expected = trimmed_mean(torch.stack(rows), 1).view(8, 6)
    opt = wrap(model, gs.TrimmedMean(1))
    opt.backward(losses, features=z)
    opt.combine()
    torch.testing.assert_close(model["trunk"].bias.grad, expected.sum(0))


@pytest.mark.parametrize("rule", [gs.TrimmedMean(1), gs.Chain(gs.Mean(), gs.TrimmedMean(1))], ids=repr)
def test_a_parameter_past_the_features_has_no_rows_of_tasks_that_do_not_reach_it(rule):
    model = nn.ModuleDict({name: nn.Linear(4, 4) for name in ("trunk", "left", "right")}).double()
    z = model["trunk"](batch().double())
    left, right = model["left"](z), model["right"](z)
    losses = {"a": left.square().mean(), "b": (left - 1).square().mean(), "c": (right - 3).square().mean()}
    rows = [torch.autograd.grad(losses[task], model["left"].weight, retain_graph=True)[0] for task in "ab"]
    opt = wrap(model, rule)
    opt.backward(losses, features=z)
    opt.combine()
    scale = 1 / 3 if isinstance(rule, gs.Chain) else 1.0
    torch.testing.assert_close(model["left"].weight.grad, scale * (rows[0] + rows[1]) / 2)  # the median of two


# --- Elsewhere --------------------------------------------------------------------------------------------------------


def test_catalogue():
    found = {entry.name: entry for entry in _catalogue.entries()}
    entry = found["GradDrop"]
    assert (entry.sees, entry.state, entry.flags["random"]) == ("coordinates", False, True)
    assert np.isnan(_catalogue._seconds(gs.GradDrop, 1, 2))
    assert "Just Pick a Sign" in entry.paper
    assert found["TrimmedMean"].flags["symmetric"]
    assert rule_named("PCGrad+GradDrop") == gs.Chain(gs.PCGrad(), gs.GradDrop())


ERRORS = {
    "leak": (lambda: gs.GradDrop(1.5), ValueError, r"`leak` must be in \[0, 1\]. Found leak=1.5"),
    "a leak": (lambda: gs.GradDrop({"a": -1}), ValueError, r"Found leak=\(\('a', -1.0\),\)"),
    "task": (lambda: wrap(Bent(), gs.GradDrop({"x": 1}), tasks=2), ValueError, r"GradDrop's `leak` names \['x'\]"),
    "trim": (lambda: gs.TrimmedMean(-1), ValueError, "`trim` must be a number of tasks, at least 0. Found trim=-1"),
    "few tasks": (lambda: wrap(Bent(), gs.TrimmedMean(1), tasks=2), ValueError, "`trim=1` needs at least 3 tasks. Found 2"),
    "every": (lambda: wrap(Bent(), gs.GradDrop(), every=2), ValueError, "every=2 needs weights of tasks.*for GradDrop"),
    "measure": (
        lambda: wrap(Bent(), gs.Chain(gs.GLS(), gs.TrimmedMean()), measure=False),
        ValueError,
        "measure=False needs",
    ),
    "smoothing": (lambda: gs.CRMOGM(gs.GradDrop()), TypeError, "must be a rule. Found GradDrop"),
    "smoothing a chain": (
        lambda: gs.CRMOGM(gs.Chain(gs.PCGrad(), gs.GradDrop())),
        TypeError,
        "which a coordinate rule has not",
    ),
    "check": (
        lambda: gs.testing.check_rule(gs.GradDrop()),
        TypeError,
        r"rules of losses and Gram matrices, which GradDrop",
    ),
    "check a chain": (
        lambda: gs.testing.check_rule(gs.Chain(gs.Mean(), gs.TrimmedMean())),
        TypeError,
        "is not, or not alone",
    ),
}


@pytest.mark.parametrize(("make", "error", "message"), ERRORS.values(), ids=ERRORS)
def test_errors(make, error, message):
    with pytest.raises(error, match=message):
        make()


def distributed(rank, rule, settings):
    torch.manual_seed(0)
    model = Heads().double()
    opt = wrap(model, rule, process_group=True, tasks=list(TASKS), **settings)
    for number in range(3):
        opt.backward(model.losses(batch(number).double()[4 * rank : 4 * rank + 4]))
        opt.step()
        opt.zero_grad()
    return [parameter.detach() for parameter in model.parameters()]


@pytest.mark.distributed
@pytest.mark.parametrize(
    "rule", [gs.TrimmedMean(1), gs.Chain(gs.UncertaintyWeighting(), gs.PCGrad(), gs.TrimmedMean(0))], ids=repr
)
def test_several_processes(ranks, rule):
    torch.manual_seed(0)
    model = Heads().double()
    opt = wrap(model, rule)
    for number in range(3):
        opt.backward(model.losses(batch(number).double()))
        opt.step()
        opt.zero_grad()
    for found in ranks(2, distributed, rule, {"check_ranks": True}):
        for parameter, other in zip(model.parameters(), found, strict=True):
            torch.testing.assert_close(parameter.detach(), other)


def refused(rank, rule, settings):
    with pytest.raises(ValueError, match="cannot be used in 2 processes") as error:
        distributed(rank, rule, settings)
    return str(error.value)


@pytest.mark.distributed
def test_several_processes_refused(ranks):
    assert "random numbers" in ranks(2, refused, gs.GradDrop(), {})[0]
    assert "reduce='result' has only sums" in ranks(2, refused, gs.TrimmedMean(1), {"reduce": "result"})[1]
