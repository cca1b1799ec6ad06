"""Adversarial training as surgery, against a gradient reversal layer."""

import copy
import math

import pytest
import torch
from conftest import check_gradients, wrap
from hypothesis import given, settings
from hypothesis import strategies as st
from test_checkpoint import check_equal_trees, saved_and_loaded
from torch import nn
from torch.nn import functional as F

import gradsurgery as gs


class Dann(nn.Module):
    """An encoder, a classifier and two discriminators."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.encoder = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 5), nn.Tanh())
        self.classifier = nn.Linear(5, 3)
        self.discriminator = nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 1))
        self.other = nn.Linear(5, 1)
        self.double()

    def losses(self, number=0, reverse=lambda x: x):
        generator = torch.Generator().manual_seed(number)
        x = torch.randn(8, 4, generator=generator, dtype=torch.float64)
        f, domain = self.encoder(x), torch.arange(8) % 2
        adversary = lambda d: F.binary_cross_entropy_with_logits(d(reverse(f))[:, 0], domain.double())  # noqa: E731
        return {
            "class": F.cross_entropy(self.classifier(f), torch.arange(8) % 3),
            "domain": adversary(self.discriminator),
            "noise": adversary(self.other),
        }


def reversed_gradients(model, tasks, mu, number=0):
    """Name → gradient of the sum of the losses, by a reversal layer."""
    losses = model.losses(number, lambda x: gs.reverse_gradient(x, mu))
    total = sum(losses[task] for task in tasks)
    names = dict(model.named_parameters())
    return dict(zip(names, torch.autograd.grad(total, list(names.values()), allow_unused=True), strict=True))


@pytest.mark.parametrize("groups", ["model", "layer", "tensor"])
@pytest.mark.parametrize("tasks", [("class", "domain"), ("class", "domain", "noise")])
@pytest.mark.parametrize("mu", [0.0, 0.3, 2.0])
def test_it_equals_gradient_reversal(groups, tasks, mu):
    model = Dann()
    opt = wrap(model, gs.Adversary(tasks[1:], mu=mu), groups=groups)
    opt.backward({task: loss for task, loss in model.losses().items() if task in tasks})
    opt.combine()
    check_gradients(model, reversed_gradients(model, tasks, mu))


def test_adversaries_alone_descend():
    model = Dann()
    opt = wrap(model, gs.Adversary(["domain", "noise"]), tasks=["class", "domain", "noise"])
    losses = model.losses()
    opt.backward({"domain": losses["domain"], "noise": losses["noise"]})
    opt.combine()
    check_gradients(model, reversed_gradients(model, ["domain", "noise"], -1.0))


def test_discriminators_that_several_adversaries_share_descend():
    model = Dann()
    model.other = model.discriminator
    opt = wrap(model, gs.Adversary(["domain", "noise"], mu=0.5))
    opt.backward(model.losses())
    opt.combine()
    check_gradients(model, reversed_gradients(model, ["class", "domain", "noise"], 0.5))


def test_at_features_each_adversary_has_a_discriminator_of_its_own():
    """What the note says: a discriminator that two share past the features is reversed as the features are."""
    torch.manual_seed(0)
    model = nn.ModuleDict({name: nn.Linear(3, 3) for name in ("encoder", "classes", "one", "other")}).double()
    x = torch.randn(4, 3, dtype=torch.float64)
    for shared in (False, True):
        opt = wrap(model, gs.Adversary(("a", "b")), tasks=["class", "a", "b"])
        z = model["encoder"](x)
        own = model["one"](z), model["one" if shared else "other"](z)
        losses = {"class": model["classes"](z).square().mean(), "a": own[0].square().mean(), "b": (own[1] - 1).abs().mean()}
        reached = losses["a"] + losses["b"] if shared else losses["a"]
        (expected,) = torch.autograd.grad(reached, model["one"].weight, retain_graph=True)
        opt.backward(losses, features=z)
        opt.combine()
        torch.testing.assert_close(model["one"].weight.grad, -expected if shared else expected)
        opt.zero_grad()


def test_the_strength_follows_the_schedule_of_dann():
    model = Dann()
    opt = wrap(model, gs.Adversary("domain", mu=0.8, steps=4), tasks=["class", "domain"])
    for number in range(6):
        losses = model.losses(number)
        p = min(number / 4, 1)
        mu = 0.8 * (2 / (1 + math.exp(-10 * p)) - 1)
        expected = reversed_gradients(model, ["class", "domain"], mu, number)
        opt.backward({"class": losses["class"], "domain": losses["domain"]})
        opt.combine()
        check_gradients(model, expected)
        opt.step()
        opt.zero_grad()
    assert opt.rule_state["step"] == 6


def test_a_step_that_is_not_finite_does_not_count():
    model = Dann()
    opt = wrap(model, gs.Adversary("domain", steps=4), tasks=["class", "domain"])
    losses = model.losses()
    opt.backward({"class": losses["class"] * float("inf"), "domain": losses["domain"]})
    opt.combine()
    assert opt.rule_state["step"] == 0


@settings(deadline=None, max_examples=25)
@given(data=st.data(), mu=st.sampled_from([0.0, 0.5, 3.0]), count=st.integers(1, 4))
def test_rows_are_those_of_the_definition(data, mu, count):
    tasks = [str(k) for k in range(count)]
    chosen = data.draw(st.lists(st.sampled_from(tasks), min_size=1, unique=True))
    active = torch.tensor(
        data.draw(st.lists(st.lists(st.booleans(), min_size=count, max_size=count), min_size=2, max_size=2))
    )
    rule = gs.Adversary(chosen, mu=mu)
    jacobian = torch.randn(2, count, 5, dtype=torch.float64) * active[:, :, None]
    found, _ = rule.mix(jacobian @ jacobian.mT, rule.init(tasks, ["x", "y"]), active=active)
    for g in range(2):
        for k, task in enumerate(tasks):
            others = any(active[g, j] for j, other in enumerate(tasks) if other not in chosen)
            expected = torch.zeros(count, dtype=torch.float64)
            expected[k] = -mu if task in chosen and active[g, k] and others else 1.0
            assert torch.equal(found[g, k], expected)


def test_surgery_after_it_sees_reversed_gradients():
    jacobian = torch.tensor([[1.0, 0.2, 0.0], [1.0, 1.0, 0.3]], dtype=torch.float64)
    turned = jacobian * torch.tensor([1.0, -0.5]).double()[:, None]
    chain = gs.Chain(gs.Adversary("1", mu=0.5), gs.PCGrad())
    torch.testing.assert_close(gs.operate(jacobian, chain), gs.operate(turned, gs.PCGrad()))


@pytest.mark.parametrize("groups", ["model", "layer"])
def test_it_resumes_bit_for_bit(groups):
    def fresh():
        model = Dann()
        rule = gs.Chain(gs.Adversary("domain", steps=6), gs.PCGrad())
        return model, wrap(model, rule, torch.optim.Adam(model.parameters(), lr=0.05), groups=groups, seed=3)

    def train(model, opt, numbers):
        for number in numbers:
            opt.backward(model.losses(number))
            opt.step()
            opt.zero_grad()

    whole, first, second = fresh(), fresh(), fresh()
    train(*whole, range(6))
    train(*first, range(3))
    for old, new in zip(first, second, strict=True):
        new.load_state_dict(saved_and_loaded(old.state_dict()))
    train(*second, range(3, 6))
    check_equal_trees([part.state_dict() for part in second], [part.state_dict() for part in whole])


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"tasks": ()}, "at least one"),
        ({"tasks": ("a", "a")}, "distinct"),
        ({"tasks": "a", "mu": -1}, "`mu`"),
        ({"tasks": "a", "mu": float("nan")}, "`mu`"),
        ({"tasks": "a", "steps": 0}, "`steps`"),
        ({"tasks": "a", "steps": 2.5}, "`steps`"),
    ],
)
def test_settings_are_checked(given, message):
    with pytest.raises(ValueError, match=message):
        gs.Adversary(**given)
    with pytest.raises(ValueError, match=r"Adversary's `tasks` names \['z'\]"):
        gs.Adversary("z").init(["a"], ["g"])
    assert gs.Adversary("a") == gs.Adversary(["a"])


# --- Gradient reversal ------------------------------------------------------------------------------------------------


def test_reversal_is_the_identity_and_turns_gradients():
    x = torch.randn(3, 4, requires_grad=True)
    for mu in (0.5, torch.tensor(0.5)):
        y = gs.reverse_gradient(x, mu)
        assert torch.equal(y, x)
        (gradient,) = torch.autograd.grad(y.square().sum(), x)
        torch.testing.assert_close(gradient, -0.5 * 2 * x.detach())


def test_reversal_twice_differentiated_and_vectorised():
    x = torch.randn(5, dtype=torch.float64, requires_grad=True)
    (first,) = torch.autograd.grad(gs.reverse_gradient(x, 2.0).pow(3).sum(), x, create_graph=True)
    torch.testing.assert_close(first, -2 * 3 * x.detach() ** 2)
    jacobian = torch.func.jacrev(lambda v: gs.reverse_gradient(v, 2.0) ** 2)(x.detach())
    torch.testing.assert_close(jacobian, torch.diag(-4 * x.detach()))
    per_sample = torch.func.vmap(torch.func.grad(lambda v: gs.reverse_gradient(v, 2.0).square().sum()))
    torch.testing.assert_close(per_sample(x.detach()[:, None])[:, 0], -4 * x.detach())


@pytest.mark.parametrize("source", ["autograd", "batched"])
def test_reversal_in_per_task_gradients(source):
    model = Dann()
    opt = wrap(model, gs.Sum(), source=source)
    opt.backward(model.losses(reverse=lambda x: gs.reverse_gradient(x, 0.7)))
    opt.combine()
    check_gradients(model, reversed_gradients(model, ["class", "domain", "noise"], 0.7))


def test_reversal_in_a_mixed_batch():
    model = Dann()
    x, task_ids = torch.randn(8, 4, dtype=torch.float64), torch.arange(8) % 2

    def losses(model):
        f = model.encoder(x)
        return torch.where(
            task_ids == 0, model.classifier(f).square().sum(1), model.other(gs.reverse_gradient(f, 0.7)).sigmoid()[:, 0]
        )

    opt = wrap(model, gs.Sum(), tasks=["class", "domain"])
    with opt.split(task_ids):
        per_sample = losses(model)
    opt.backward(per_sample)
    opt.combine()
    twin = copy.deepcopy(model)
    twin.zero_grad()
    each = losses(twin)
    (each[task_ids == 0].mean() + each[task_ids == 1].mean()).backward()
    check_gradients(model, {name: p.grad for name, p in twin.named_parameters()})
