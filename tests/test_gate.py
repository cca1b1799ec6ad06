"""The discriminator gate, each loss and weight against Equations 3.8 to 3.11, and the gate on tasks."""

import copy
import math

import pytest
import torch
from conftest import Bent, batch, check_gradients, wrap
from hypothesis import given, settings
from hypothesis import strategies as st
from test_checkpoint import check_equal_trees, saved_and_loaded
from torch import nn
from torch.nn import functional as F

import gradsurgery as gs
from gradsurgery._transfer.gate import TERMS

FEATURES, CLASSES = 4, 3


def gate(**given):
    torch.manual_seed(1)
    return gs.DiscriminatorGate(FEATURES, CLASSES, hidden=8, **given).double()


def samples(count, seed=0, grad=False):
    generator = torch.Generator().manual_seed(seed)
    features = torch.randn(count, FEATURES, generator=generator, dtype=torch.float64, requires_grad=grad)
    return features, torch.randint(CLASSES, (count,), generator=generator)


def seen_gate(tasks):
    """A gate that has seen samples of each task."""
    result = gate(tasks=tasks)
    features, labels = samples(4 * len(tasks))
    result.see(features, labels, [task for task in tasks for _ in range(4)])
    return result


class Given(nn.Module):
    """A discriminator whose logits are the first feature: the ratio is ``e^feature``."""

    def forward(self, x):
        return x[:, 0]


# --- Weights ----------------------------------------------------------------------------------------------------------

LOGITS = st.lists(st.floats(-40, 40), min_size=1, max_size=8)


@settings(deadline=None, max_examples=40)
@given(
    logits=LOGITS, scale=st.sampled_from([0.0, 0.5, 3.0]), clamp=st.sampled_from([0.5, 20.0, 1e6]), normalise=st.booleans()
)
def test_weights_are_the_clamped_odds(logits, scale, clamp, normalise):
    module = gs.DiscriminatorGate(FEATURES, CLASSES, discriminator=Given(), scale=scale, clamp=clamp, normalise=normalise)
    features = F.pad(torch.tensor(logits, dtype=torch.float64)[:, None], (0, FEATURES - 1))
    found = module.weights(features, torch.zeros(len(logits), dtype=torch.long))
    d = [1 / (1 + math.exp(-logit)) for logit in logits]  # Equation 3.9, line by line
    odds = [min(math.exp(logit), clamp) for logit in logits]
    assert all(o == pytest.approx(min(p / (1 - p), clamp), rel=1e-6) for o, p in zip(odds, d, strict=True) if p < 0.99999)
    mean = sum(odds) / len(odds) if normalise else 1.0
    torch.testing.assert_close(found, torch.tensor([scale * o / mean for o in odds], dtype=torch.float64))
    torch.testing.assert_close(module.last.ratios, torch.tensor(odds, dtype=torch.float64))
    assert module.last.effective.item() == pytest.approx(sum(odds) ** 2 / sum(o * o for o in odds))
    assert 1 - 1e-9 <= module.last.effective <= len(odds) + 1e-9
    assert module.last.weights is found


def test_density_ratios_of_gaussians():
    # Source N(0, 1), target N(1, 1): log P_T / P_S = x - 1/2.
    x = torch.tensor([-1.0, 0.0, 0.5, 2.0], dtype=torch.float64)
    source, target = (torch.distributions.Normal(float(mean), 1.0) for mean in (0, 1))
    module = gs.DiscriminatorGate(1, 1, discriminator=Given(), normalise=False)
    expected = (target.log_prob(x) - source.log_prob(x)).exp()
    torch.testing.assert_close(module.weights((x - 0.5)[:, None]), expected)


def test_the_gate_finds_which_source_labels_are_wrong():
    generator = torch.Generator().manual_seed(0)
    centres = 3 * torch.eye(3, FEATURES)
    module = gs.DiscriminatorGate(FEATURES, 3)
    adam = torch.optim.Adam(module.parameters(), lr=0.01)

    def draw(count):
        labels = torch.randint(3, (count,), generator=generator)
        return centres[labels] + torch.randn(count, FEATURES, generator=generator), labels

    for _ in range(150):
        (f_s, y_s), (f_t, y_t) = draw(64), draw(64)
        wrong = torch.arange(64) % 2 == 0
        adam.zero_grad()
        module.loss(source=(f_s, torch.where(wrong, (y_s + 1) % 3, y_s)), target=(f_t, y_t), unlabelled=f_t).backward()
        adam.step()
    features, labels = draw(400)
    clean, wrong = module.weights(features, labels), module.weights(features, (labels + 1) % 3)
    assert module(features, labels).mean() > module(features, (labels + 1) % 3).mean() + 1
    both = module.weights(torch.cat([features, features]), torch.cat([labels, (labels + 1) % 3]))
    assert both[:400].mean() > 3 * both[400:].mean()
    assert clean.mean().item() == pytest.approx(wrong.mean().item()) == pytest.approx(1)  # each is normalised by itself


def test_weights_have_no_graph_and_leave_none():
    module, (features, labels) = gate(), samples(5, grad=True)
    weights = module.weights(features, labels)
    assert not weights.requires_grad
    (weights * features.sum(1)).sum().backward()
    torch.testing.assert_close(features.grad, weights[:, None].expand_as(features))
    assert all(parameter.grad is None for parameter in module.parameters())


def test_no_samples_have_no_weights():
    module = gate()
    assert module.weights(torch.zeros(0, FEATURES).double()).shape == (0,)
    assert module.last.effective == 0
    assert module.last.figures() == {}


def test_figures():
    module, (features, labels) = gate(), samples(6)
    module.weights(features, labels)
    figures = module.last.figures()
    assert set(figures) == {"gate/effective", "gate/ratio/mean", "gate/ratio/max"}
    assert figures["gate/effective"] == pytest.approx(module.last.effective.item() / 6)
    assert figures["gate/ratio/max"] == pytest.approx(module(features, labels).exp().max().item())


def test_a_gate_in_a_mixed_batch_is_a_gate_on_each_task():
    torch.manual_seed(0)
    encoder = nn.Sequential(nn.Linear(4, FEATURES), nn.Tanh(), nn.Linear(FEATURES, CLASSES)).double()
    twin, module = copy.deepcopy(encoder), gate()
    x, labels = samples(9)
    task_ids = torch.tensor([0, 1, 2, 0, 1, 2, 0, 1, 2])

    def losses(model):
        features = model[:2](x)
        return module.weights(features, labels) * F.cross_entropy(model[2](features), labels, reduction="none")

    opt = wrap(encoder, gs.PCGrad(), tasks=["a", "b", "c"])
    with opt.split(task_ids):
        per_sample = losses(encoder)
    opt.backward(per_sample)
    opt.combine()
    other = wrap(twin, gs.PCGrad())
    each = losses(twin)
    other.backward({task: each[task_ids == k].mean() for k, task in enumerate("abc")})
    other.combine()
    check_gradients(encoder, {name: p.grad for name, p in twin.named_parameters()})


# --- Losses -----------------------------------------------------------------------------------------------------------


def augmented(module, source, target, unlabelled, features_of=lambda term, f: f):
    """``-L_aug`` of Equation 3.10, term by term; ``features_of(term, f)`` may detach."""
    d = lambda f, y: torch.sigmoid(module(f, y))  # noqa: E731
    total = 0.0
    if unlabelled is not None:
        total = total + torch.log(d(features_of("marginal", unlabelled), None)).mean()
        total = total + torch.log(1 - d(features_of("marginal", source[0]), None)).mean()
    if target is not None:
        total = total + torch.log(d(features_of("joint", target[0]), target[1])).mean()
        total = total + torch.log(1 - d(features_of("joint", source[0]), source[1])).mean()
    return -total


SIDES = {"both": (True, True), "labelled only": (True, False), "unlabelled only": (False, True)}


@pytest.mark.parametrize("sides", SIDES.values(), ids=SIDES)
@pytest.mark.parametrize("terms", TERMS)
def test_loss_is_equation_3_10_with_features_in_the_chosen_terms(terms, sides):
    module = gate(terms=terms)
    chosen = ("joint", "marginal") if terms == "both" else (terms,)
    results = []
    for function in ("library", "naive"):
        source, target, unlabelled = samples(6, 1, grad=True), samples(4, 2, grad=True), samples(5, 3, grad=True)[0]
        given = {
            "source": source,
            "target": target if sides[0] else None,
            "unlabelled": unlabelled if sides[1] else None,
        }
        if function == "library":
            loss = module.loss(**given)
        else:
            loss = augmented(module, *given.values(), features_of=lambda term, f: f if term in chosen else f.detach())
        inputs = [source[0], target[0], unlabelled, *module.parameters()]
        results.append([loss, *torch.autograd.grad(loss, inputs, allow_unused=True)])
    for found, expected in zip(*results, strict=True):
        assert (found is None) == (expected is None)
        torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("terms", ["joint", "marginal"])
def test_the_loss_is_the_adversarys_and_the_discriminators(terms):
    module = gate(terms=terms)
    given = {"source": samples(6, 1, grad=True), "target": samples(4, 2), "unlabelled": samples(5, 3)[0]}
    parts = module.adversary_loss(**given), module.discriminator_loss(**given)
    torch.testing.assert_close(sum(parts), module.loss(**given))
    assert torch.autograd.grad(parts[1], given["source"][0], allow_unused=True)[0] is None
    assert torch.autograd.grad(parts[0], given["source"][0])[0].abs().sum() > 0


def test_the_extremes_have_one_part():
    given = {"source": samples(6, 1), "target": samples(4, 2), "unlabelled": samples(5, 3)[0]}
    torch.testing.assert_close(gate().adversary_loss(**given), gate().loss(**given))
    torch.testing.assert_close(gate(terms="none").discriminator_loss(**given), gate(terms="none").loss(**given))
    with pytest.raises(ValueError, match=r"terms='both', nothing is left for discriminator_loss\(\): adversary_loss"):
        gate().discriminator_loss(**given)
    with pytest.raises(ValueError, match=r"terms='none', nothing is left for adversary_loss\(\): discriminator_loss"):
        gate(terms="none").adversary_loss(**given)


def test_target_samples_that_are_none_or_no_more_than_an_empty_tensor():
    source, (f, y) = samples(6, 1), samples(4, 2)
    module = gate()
    found = module.loss(source=source, target=(f[:0], y[:0]), unlabelled=f)
    torch.testing.assert_close(found, module.loss(source=source, unlabelled=f))
    found = module.loss(source=source, target=(f, y), unlabelled=f[:0])
    torch.testing.assert_close(found, module.loss(source=source, target=(f, y)))


def test_a_discriminator_of_ones_own_may_have_a_length():
    class Counted(Given):
        def __len__(self):
            return 0

    own = Counted()
    assert gs.DiscriminatorGate(FEATURES, CLASSES, discriminator=own).discriminator is own


def test_confident_discriminators_have_finite_losses():
    module = gs.DiscriminatorGate(FEATURES, CLASSES, discriminator=Given())
    far = F.pad(torch.tensor([[800.0], [-800.0]]), (0, FEATURES - 1)).requires_grad_()
    loss = module.loss(source=(far, torch.tensor([0, 1])), unlabelled=far)
    assert loss.item() == pytest.approx(800)
    assert torch.autograd.grad(loss, far)[0].isfinite().all()


def test_half_precision_features_have_single_precision_losses():
    module = gs.DiscriminatorGate(FEATURES, CLASSES).bfloat16()
    features, labels = samples(4)
    assert module(features.bfloat16(), labels).dtype == torch.float32
    assert gs.DiscriminatorGate(FEATURES, CLASSES)(features.half(), labels).dtype == torch.float32


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"features": 0}, "`features` must be a number, at least 1"),
        ({"classes": 2.0}, "`classes`"),
        ({"terms": "all"}, "`terms` must be one of 'both', 'joint'"),
        ({"scale": -1}, "`scale`"),
        ({"clamp": 0}, "`clamp` is the largest ratio"),
        ({"tasks": "de"}, "Found the string 'de'"),
        ({"tasks": ["de", "de"]}, "distinct"),
    ],
)
def test_settings_are_checked(given, message):
    with pytest.raises(ValueError, match=message):
        gs.DiscriminatorGate(**{"features": 4, "classes": 3, **given})


def test_wrong_arguments_are_named():
    module, (f, y) = gate(), samples(5)
    for call, message in (
        (lambda: module(f[:, :2], y), r"`features` must hold features \[B, 4\]. Found \(5, 2\)"),
        (lambda: module.weights(f, y[:4]), r"labels must be \[5\] integers"),
        (lambda: module(f, y.double()), "integers"),
        (lambda: module(f, y + 1), "labels must be 0 to 2"),
        (lambda: module.loss(source=(f, y)), "needs target samples, `target` or `unlabelled`"),
        (lambda: gate(terms="joint").adversary_loss(source=(f, y), unlabelled=f), "needs target samples, `target`, with"),
        (lambda: module.loss(source=(f, y), target=(f[:0], y[:0])), "needs target samples, `target` or `unlabelled`"),
        (lambda: module.loss(source=(f[:0], y[:0]), unlabelled=f), r"loss\(\) needs source samples: .* an empty `source`"),
        (lambda: module.loss(source=f, unlabelled=f), "`source` must be a pair"),
        (lambda: module.loss(source=(f, None), unlabelled=f), "`source` must hold labels"),
        (lambda: module.loss(source=(f, y), target=(f, None)), "samples without labels are `unlabelled`"),
        (lambda: module.see(f, y, [0] * 5), r"make the gate with tasks="),
        (lambda: gate(tasks=2).see(f, y, [0] * 4), "one entry for each of the 5 samples"),
        (lambda: gate(tasks=2).see(f, y, [0, 1, 2, 0, 0]), "indices of the 2 tasks"),
        (lambda: gs.DiscriminatorGate(4, 3, discriminator=nn.Linear(8, 2)).double()(f), "one logit for each of the 5"),
    ):
        with pytest.raises(ValueError, match=message):
            call()


# --- Tasks ------------------------------------------------------------------------------------------------------------


@settings(deadline=None, max_examples=25)
@given(ids=st.lists(st.integers(0, 3), min_size=1, max_size=12))
def test_see_notes_mean_odds_and_leaves_absent_tasks(ids):
    module = seen_gate(list("abcd"))
    before = module.task_ratio.clone(), module.task_logit.clone()
    features, labels = samples(len(ids), seed=5)
    module.see(features, labels, torch.tensor(ids))
    for k in range(4):
        mine = [i for i, task in enumerate(ids) if task == k]
        logits = module(features[mine], labels[mine]).clamp_max(math.log(20))
        expected = [logits.exp().mean(), logits.mean()] if mine else [values[k] for values in before]
        torch.testing.assert_close(torch.stack([module.task_ratio[k], module.task_logit[k]]), torch.stack(expected))


def test_see_counts_exactly_in_half_precision():
    module = gs.DiscriminatorGate(FEATURES, CLASSES, discriminator=Given(), tasks=2)
    features = F.pad(torch.linspace(-3, 2, 3000)[:, None], (0, FEATURES - 1)).bfloat16()
    ids = torch.arange(3000) % 3 // 2
    module.see(features, None, ids)
    expected = module.task_ratio.clone(), module.task_logit.clone()
    module.bfloat16().see(features, None, ids)
    torch.testing.assert_close((module.task_ratio.float(), module.task_logit.float()), expected, rtol=1e-2, atol=1e-2)


def test_see_leaves_out_what_is_not_finite():
    module = seen_gate(["a", "b", "c"])
    before = copy.deepcopy(module.state_dict())
    features, labels = samples(4)
    features[3] = math.nan
    module.see(features, labels, ["a", "a", "b", "b"])
    assert module.task_ratio[0] != before["task_ratio"][0]
    assert torch.equal(module.task_ratio[1:], before["task_ratio"][1:])
    assert torch.equal(module.task_logit[1:], before["task_logit"][1:])
    fresh = gate(tasks=["a", "b"])
    fresh.see(features, labels, ["a", "a", "b", "b"])
    assert fresh.task_seen.tolist() == [True, False]


@pytest.mark.parametrize("mean", ["arithmetic", "geometric"])
def test_task_gate_weighs_by_averaged_odds(mean):
    module = gate(tasks=["a", "b", "c", "d"], scale=0.7)
    rule = gs.TaskGate(module, "c", beta=0.25, mean=mean)
    tasks = ["d", "c", "a"]  # in an order of their own, and not all
    state, average = rule.init(tasks, ["model"]), {}
    for number in range(5):
        features, labels = samples(9, seed=number)
        here = [task for task in ("a", "c", "d") if task != "a" or number not in (0, 3)]
        ids = [here[i % len(here)] for i in range(9)]
        module.see(features, labels, ids)
        active = torch.tensor([task in here for task in tasks])
        weights, state = rule.weigh(torch.ones(3, dtype=torch.float64), state, active=active)
        for task, weight in zip(tasks, weights, strict=True):
            mine = [i for i, name in enumerate(ids) if name == task]
            if task in here:
                logits = module(features[mine], labels[mine])
                now = (logits.exp() if mean == "arithmetic" else logits).mean().item()
                average[task] = 0.75 * average[task] + 0.25 * now if task in average else now
            expected = 1.0
            if task in here and task != "c":
                expected = 0.7 * (average[task] if mean == "arithmetic" else math.exp(average[task]))
            assert weight.item() == pytest.approx(expected)


def test_a_task_that_the_gate_has_not_seen_weighs_one():
    module = gate(tasks=["a", "b"], scale=5.0)
    rule = gs.TaskGate(module, "a")
    assert rule.weigh(torch.ones(2), rule.init(["a", "b"], ["model"]))[0].tolist() == [1, 1]


def test_the_mean_ratio_of_a_mixture_tells_its_tasks_apart():
    # The mixture of two sources, N(-2, 1) and N(1, 1), against a target N(1, 1).
    normal = lambda mean: torch.distributions.Normal(float(mean), 1.0)  # noqa: E731
    x = torch.cat([normal(mean).icdf(torch.linspace(0.001, 0.999, 999)) for mean in (-2, 1)]).double()
    mixture = torch.stack([normal(mean).log_prob(x) - math.log(2) for mean in (-2, 1)]).logsumexp(0)
    module = gs.DiscriminatorGate(1, 1, discriminator=Given(), tasks=["far", "near", "target"])
    module.see((normal(1).log_prob(x) - mixture)[:, None], None, ["far"] * 999 + ["near"] * 999)
    far, near = module.task_ratio[:2].tolist()
    assert (far + near) / 2 == pytest.approx(1, abs=0.02)  # of all its samples it is one
    assert near > 5 * far


def train_gated(model, module, opt, steps, start=0):
    for number in range(start, start + steps):
        features, labels = samples(6, seed=number)
        module.see(features, labels, ["a", "b", "c"] * 2)
        losses = model.losses(batch(number).double())
        if number % 3 == 2:
            del losses["b"]
        opt.backward(losses)
        opt.step()
        opt.zero_grad()


def test_a_gated_chain_resumes_bit_for_bit():
    def fresh():
        torch.manual_seed(0)
        model, module = Bent().double(), gate(tasks=["a", "b", "c"])
        rule = gs.Chain(gs.TaskGate(module, "a"), gs.PCGrad())
        return model, module, wrap(model, rule, torch.optim.Adam(model.parameters(), lr=0.05), seed=3)

    whole = fresh()
    train_gated(*whole, steps=7)
    first, second = fresh(), fresh()
    train_gated(*first, steps=4)
    for old, new in zip(first, second, strict=True):
        new.load_state_dict(saved_and_loaded(old.state_dict()))
    train_gated(*second, steps=3, start=4)
    check_equal_trees([part.state_dict() for part in second], [part.state_dict() for part in whole])
    assert whole[2].last.loss_weights[0] == 1
    assert (whole[2].last.loss_weights[1:] != 1).all()


def test_a_gated_chain_operates_on_weighted_gradients():
    model, module = Bent().double(), seen_gate(["a", "b", "c"])
    opt = wrap(model, gs.Chain(gs.TaskGate(module, "b"), gs.Sum()))
    opt.backward(model.losses(batch().double()))
    opt.combine()
    weights = [module.task_ratio[0].item(), 1.0, module.task_ratio[2].item()]
    weighted = sum(w * loss for w, loss in zip(weights, model.losses(batch().double()).values(), strict=True))
    names = dict(model.named_parameters())
    check_gradients(model, dict(zip(names, torch.autograd.grad(weighted, list(names.values())), strict=True)))


def test_task_gates_are_checked_and_known_by_their_settings():
    module = gate(tasks=["a", "b"])
    for rule, error, message in (
        (lambda: gs.TaskGate("gate", "a"), TypeError, "`gate` must be a DiscriminatorGate"),
        (lambda: gs.TaskGate(gate(), "a"), ValueError, "knows no tasks"),
        (lambda: gs.TaskGate(module, "c"), ValueError, r"one of the gate's tasks, \['a', 'b'\]. Found 'c'"),
        (lambda: gs.TaskGate(module, "a", beta=0), ValueError, "`beta`"),
        (lambda: gs.TaskGate(module, "a", mean="median"), ValueError, "`mean`"),
        (lambda: gs.TaskGate(module, "a").init(["b"], ["g"]), ValueError, "`target` names"),
        (lambda: gs.TaskGate(module, "a").init(["a", "z"], ["g"]), ValueError, r"but not \['z'\]"),
    ):
        with pytest.raises(error, match=message):
            rule()
    assert gs.TaskGate(module, "a", beta=1).beta == 1
    assert repr(gs.TaskGate(module, "a")) == repr(gs.TaskGate(gate(tasks=["a", "b"]), "a"))
    assert repr(gs.TaskGate(module, "a")) != repr(gs.TaskGate(gate(tasks=["b", "a"]), "a"))
    assert "\n" not in repr(gs.TaskGate(module, "a"))
