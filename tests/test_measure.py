"""Steps without gradients of single tasks: one backward pass of weighted losses."""

import pytest
import torch
from conftest import Heads, batch, wrap

import gradsurgery as gs

WEIGH = [gs.UncertaintyWeighting(), gs.DWA(), gs.RLW(), gs.GLS(), gs.IMTLL(), gs.FAMO(), gs.STCH(), gs.ScaleInvariant()]


def pair(rule, **settings):
    models = Heads(), Heads()
    models[1].load_state_dict(models[0].state_dict())
    both = zip(models, (True, False), strict=True)
    return [(model, wrap(model, rule, measure=measure, **settings)) for model, measure in both]


def train(model, opt, steps, start=0):
    for step in range(start, start + steps):
        opt.backward(model.losses(batch(step)))
        opt.step()
        opt.zero_grad()


@pytest.mark.parametrize("rule", [gs.Sum(), *WEIGH, gs.Chain(gs.RLW(), gs.DWA())], ids=repr)
@pytest.mark.parametrize("source", ["autograd", "batched"])
def test_it_is_the_same_training(rule, source):
    (measured, slow), (model, fast) = pair(rule, source=source)
    for own, opt in ((measured, slow), (model, fast)):
        train(own, opt, 6)
    for a, b in zip(measured.parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(fast.last.losses, slow.last.losses, rtol=1e-5, atol=1e-6)
    assert fast.last.gram.shape == (0, 3, 3)
    if rule == gs.Sum():
        assert fast.last.loss_weights is None
    else:
        torch.testing.assert_close(fast.last.loss_weights, slow.last.loss_weights, rtol=1e-5, atol=1e-6)
    assert repr(fast.last) == "Step(3 tasks, 0 groups: 0 of 0 pairs in conflict, 0 of 0 pairs operated on)"


@pytest.mark.parametrize("rule", [gs.Sum(), gs.FAMO()], ids=repr)
def test_mixed_batches(rule):
    layers = [torch.nn.Linear(4, 1), torch.nn.Linear(4, 1)]
    layers[1].load_state_dict(layers[0].state_dict())
    opts = [wrap(layer, rule, tasks=3, measure=measure) for layer, measure in zip(layers, (True, False), strict=True)]
    for step in range(4):
        x, ids = batch(step), torch.tensor([0, 1, 2, 1, 0, 1, 1, 0])
        for layer, opt in zip(layers, opts, strict=True):
            with opt.split(ids):
                losses = (layer(x)[:, 0] - ids).square()
            opt.backward(losses)
            opt.step()
            opt.zero_grad()
    torch.testing.assert_close(layers[0].weight, layers[1].weight)


def test_a_step_is_one_backward_pass(monkeypatch):
    calls = []
    grad = torch.autograd.grad
    monkeypatch.setattr(torch.autograd, "grad", lambda *args, **kwargs: calls.append(1) or grad(*args, **kwargs))
    model = Heads()
    train(model, wrap(model, gs.FAMO(), measure=False), 3)
    assert len(calls) == 3


def test_accumulated_passes_have_the_weights_of_the_first():
    model, rule = Heads(), gs.ScaleInvariant()
    opt = wrap(model, rule, measure=False)
    first, second = model.losses(batch(0)), model.losses(batch(1))
    weights = {task: 1 / loss.detach() for task, loss in first.items()}
    total = sum(weights[task] * (first[task] + second[task]) for task in first)
    expected = torch.autograd.grad(total, list(model.parameters()), retain_graph=True)
    opt.backward(first)
    opt.backward(second)
    opt.combine()
    for parameter, gradient in zip(model.parameters(), expected, strict=True):
        torch.testing.assert_close(parameter.grad, gradient)
    torch.testing.assert_close(
        opt.last.losses.float(), torch.stack([first[t].detach() + second[t].detach() for t in first])
    )


def test_absent_tasks_and_their_heads_are_left_alone():
    model = Heads()
    opt = wrap(model, gs.FAMO(), measure=False, tasks=list(model.heads))
    train(model, opt, 2)
    before = {key: value.clone() for key, value in opt.rule_state.items() if key != "adam"}
    losses = model.losses(batch(5))
    opt.backward({"a": losses["a"], "c": losses["c"]})
    opt.combine()
    assert model.heads["b"].weight.grad is None
    assert opt.last.losses.isnan().tolist() == [False, True, False]
    assert all(torch.equal(opt.rule_state[key][1], value[1]) for key, value in before.items())


def test_a_skipped_step_leaves_the_state_alone():
    model = Heads()
    opt = wrap(model, gs.FAMO(), measure=False)
    train(model, opt, 2)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0)
    state = {key: value for key, value in opt.rule_state.items() if key != "adam"}
    losses = model.losses(batch(3))
    losses["a"] = losses["a"] + 1e38 * 1e38 * model.heads["a"].weight.sum() * 0  # inf * 0: a gradient of nan
    opt.backward(losses, scaler=scaler)
    opt.combine()
    scaler.step(opt)
    scaler.update()
    assert scaler.get_scale() == 1.0
    assert all(torch.equal(opt.rule_state[key], value) for key, value in state.items())


def test_scaled_losses_give_the_same_step():
    (plain, opt), (scaled, other) = ((model, wrap(model, gs.FAMO(), measure=False)) for model in (Heads(), Heads()))
    scaled.load_state_dict(plain.state_dict())
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    train(plain, opt, 3)
    for step in range(3):
        other.backward(scaled.losses(batch(step)), scaler=scaler)
        other.combine()
        scaler.step(other)
        scaler.update()
        other.zero_grad()
    for a, b in zip(plain.parameters(), scaled.parameters(), strict=True):
        torch.testing.assert_close(a, b)


def test_resuming_continues_bit_for_bit():
    rule = gs.Chain(gs.RLW(), gs.FAMO())
    whole, again = Heads(), Heads()
    again.load_state_dict(whole.state_dict())
    opt = wrap(whole, rule, measure=False)
    train(whole, opt, 3)
    fresh = Heads()
    fresh.load_state_dict(whole.state_dict())
    resumed = wrap(fresh, rule, measure=False)
    resumed.load_state_dict(opt.state_dict())
    for model, own in ((whole, opt), (fresh, resumed)):
        train(model, own, 3, start=3)
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), fresh.parameters(), strict=True))


def test_a_recorder_keeps_the_losses():
    model = Heads()
    opt = wrap(model, gs.FAMO(), measure=False)
    recorder = gs.Recorder(opt)
    train(model, opt, 3)
    assert recorder.losses.shape == (3, 3)
    assert recorder.groups == ()
    assert set(opt.last.figures()) == {"surgery/loss/a", "surgery/loss/b", "surgery/loss/c"}


@pytest.mark.parametrize(
    ("rule", "settings", "message"),
    [
        (
            gs.PCGrad(),
            {},
            r"rules that only weigh losses.*PCGrad\(\) needs each task's gradient, in mix",
        ),
        (gs.Chain(gs.FAMO(), gs.Mean()), {}, r"Chain\(FAMO.*needs each task's gradient"),
        (gs.Sum(), {"every": 2}, "every=2 is about gradients of single tasks"),
        (gs.Sum(), {"nonfinite": "skip"}, "nonfinite='skip' is about gradients of single tasks"),
        (gs.Sum(), {"stream": True, "groups": "tensor"}, "measure=False: there are no gradients of single tasks"),
    ],
)
def test_what_needs_gradients_of_single_tasks_is_refused(rule, settings, message):
    with pytest.raises(ValueError, match=message):
        wrap(Heads(), rule, measure=False, **settings)
