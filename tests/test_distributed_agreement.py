"""Ranks that disagree: the same error on all of them, and nobody waits for ever."""

import os
import time

import pytest
import torch
import torch.distributed as dist
from conftest import TASKS, Bent, Heads
from ranks import COLLECTIVE
from torch import nn

import gradsurgery as gs

pytestmark = pytest.mark.distributed


def make(rank, model=None, rule=None, **settings):
    torch.manual_seed(0)
    model = Bent() if model is None else model
    rule = gs.GradVac(beta=0.2) if rule is None else rule
    settings = {"tasks": TASKS, "process_group": True, **settings}
    return model, gs.SurgeryOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), rule, model=model, **settings)


def batch(rank, step=0):
    return torch.randn(8, 4, generator=torch.Generator().manual_seed(10 * step + rank))


def train(model, opt, rank, step=0):
    opt.backward(model.losses(batch(rank, step)))
    opt.step()
    opt.zero_grad()


def other_tasks(rank):
    train(*make(rank, tasks=("a", "b", "c", "d") if rank == 1 else TASKS), rank)


def another_order(rank):
    train(*make(rank, tasks=("b", "a", "c") if rank == 1 else TASKS), rank)


def other_groups(rank):
    train(*make(rank, groups="tensor" if rank == 1 else "layer"), rank)


def another_rule(rank):
    train(*make(rank, rule=gs.PCGrad() if rank == 1 else None), rank)


def another_setting(rank):
    train(*make(rank, nonfinite="skip" if rank == 1 else "raise"), rank)


def another_seed(rank):
    train(*make(rank, seed=7 if rank == 1 else 0), rank)


def other_shapes(rank):
    torch.manual_seed(0)
    model = Bent()
    if rank == 1:
        model.layers[2].bias = None
    train(*make(rank, model), rank)


def other_values(rank):
    model, opt = make(rank)
    with torch.no_grad():
        model.layers[2].bias[1] += rank
    train(model, opt, rank)


def frozen_later(rank):
    model, opt = make(rank)
    train(model, opt, rank)
    model.layers[0].bias.requires_grad_(rank == 0)
    train(model, opt, rank, 1)


def tasks_from_the_first_losses(rank):
    model, opt = make(rank, Heads(("a", "b") if rank == 0 else ("a", "z")), tasks=None)
    train(model, opt, rank)


def samples_on_one(rank):
    model, opt = make(rank)
    opt.backward(model.losses(batch(rank)), samples=dict.fromkeys(TASKS, 8) if rank == 1 else None)
    opt.step()


def two_kinds(rank):
    model, opt = make(rank)
    opt.backward(model.losses(batch(rank)))
    with opt.split([0, 1, 2, 0, 1, 2, 0, 1]):
        losses = model.layers(batch(rank)).square().sum(1)
    opt.backward(losses)
    opt.step()


def misaligned(rank):
    model, opt = make(rank, every=2)
    train(model, opt, rank)
    for task in "abc" if rank == 0 else "bca":
        opt.backward({task: model.losses(batch(rank, 1))[task]})
    opt.step()


def other_state(rank):
    model, opt = make(rank, check_ranks=True)
    train(model, opt, rank)
    opt.rule_state["target"][0, 0, 1] += rank
    train(model, opt, rank, 1)


def other_random_numbers(rank):
    model, opt = make(rank, rule=gs.PCGrad(), check_ranks=True)
    train(model, opt, rank)
    if rank == 1:
        torch.rand(1, generator=opt._surgery.generator)
    train(model, opt, rank, 1)


def stepped_apart(rank):
    model, opt = make(rank, check_ranks=True)
    train(model, opt, rank)
    with torch.no_grad():
        model.layers[0].weight += rank
    train(model, opt, rank, 1)


DISAGREEMENTS = {
    other_tasks: r"disagree about the tasks: only rank 1 has 'd'",
    another_order: r"disagree about the tasks: 'a' is 0 on rank 0, and 1 on rank 1",
    other_groups: r"disagree about the surgery groups: only rank 0 has 'layers.0', 'layers.2'; only rank 1 has",
    another_rule: r"disagree about the rule: 'rule' is GradVac\(beta=0.2.* on rank 0, and PCGrad\(.*\) on rank 1",
    another_setting: r"disagree about the settings: 'nonfinite' is raise on rank 0, and skip on rank 1",
    another_seed: r"disagree about the random generator: 'seed' is 0 on rank 0, and 7 on rank 1",
    other_shapes: r"disagree about the surgery groups: 'model' is .*layers.2.bias on rank 0",
    other_values: r"disagree about the parameters' values \(broadcast .*: 'layers.2.bias' is ",
    frozen_later: r"disagree about the trained parameters: 'layers.0.bias' is trained on rank 0, and frozen on rank 1",
    tasks_from_the_first_losses: r"disagree about the tasks: only rank 0 has 'b'; only rank 1 has 'z'",
    samples_on_one: r"losses of tasks with `samples` and losses of tasks without `samples`",
    two_kinds: r"losses of tasks without `samples` and mixed batches with means",
    misaligned: r"losses of a task in different calls of backward\(\)",
    other_state: r"disagree about the rule's state: 'target' is ",
    other_random_numbers: r"disagree about the random generator: 'state' is ",
    stepped_apart: r"disagree about the parameters' values: 'layers.0.weight' is ",
}


def message(rank, function):
    start = time.monotonic()
    try:
        function(rank)
    except ValueError as error:
        return str(error), time.monotonic() - start
    return "no error", 0


@pytest.mark.parametrize("function", DISAGREEMENTS, ids=lambda function: function.__name__)
def test_ranks_that_disagree_all_say_why(ranks, function):
    import re

    results = ranks(2, message, function)
    assert results[0][0] == results[1][0]
    assert re.search(DISAGREEMENTS[function], results[0][0]), results[0][0]
    assert all(seconds < COLLECTIVE / 2 for _, seconds in results)


def test_of_four_ranks_the_one_that_differs_is_named(ranks):
    results = ranks(4, message, one_of_four)
    assert {text for text, _ in results} == {
        "The ranks disagree about the settings: 'every' is 1 on rank 0, and 3 on rank 2."
    }


def one_of_four(rank):
    train(*make(rank, every=3 if rank == 2 else 1), rank)


# --- What one rank knows, and others do not yet -------------------------------------------------------------------------


def late(rank):
    model, opt = make(rank, tasks=None)
    for step in range(3):
        if rank == 0 or step:
            opt.backward(model.losses(batch(rank, step)))
        opt.step()
        opt.zero_grad()
    return opt.tasks, [p.detach() for p in model.parameters()], opt.rule_state


def test_a_rank_without_losses_learns_the_tasks_from_the_others(ranks):
    first, second = ranks(2, late)
    assert first[0] == second[0] == TASKS
    assert all(torch.equal(a, b) for a, b in zip(first[1], second[1], strict=True))
    assert torch.equal(first[2]["target"], second[2]["target"])


def combine_and_step(rank):
    model, opt = make(rank)
    for step in range(2):
        if (step + rank) % 2:
            opt.backward(model.losses(batch(rank, step)))
        opt.combine()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        opt.combine()
        opt.step()
        opt.zero_grad()

        def closure(step=step):
            opt.zero_grad()
            if rank == 0:
                opt.backward(model.losses(batch(rank, step)))

        opt.step(closure)
        opt.zero_grad()
    return [p.detach() for p in model.parameters()]


def test_combine_before_step_and_closures(ranks):
    first, second = ranks(2, combine_and_step)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


# --- Who trains together ------------------------------------------------------------------------------------------------


def choices(rank):
    model, found = Bent(), {}
    for name, settings in {
        "nothing said": {},
        "alone": {"process_group": False},
        "no group": {"process_group": "nccl"},
        "unknown way": {"process_group": True, "reduce": "rank"},
        "alone in a group": {"model": nn.parallel.DistributedDataParallel(model), "process_group": False},
        "static": {"model": nn.parallel.DistributedDataParallel(model, static_graph=True)},
    }.items():
        try:
            settings = {"model": model, **settings}
            opt = gs.SurgeryOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), gs.PCGrad(), groups="layer", **settings)
            found[name] = str(opt.streaming.why)
        except (ValueError, TypeError) as error:
            found[name] = str(error)
    opt = gs.SurgeryOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), gs.PCGrad(), model=model, process_group=True)
    try:
        opt.__getstate__()["_surgery"].__getstate__()
    except TypeError as error:
        found["copied"] = str(error)
    wrapped, _ = make(rank, nn.parallel.DistributedDataParallel(model), process_group=None)
    try:
        with wrapped.join():
            wrapped(batch(rank))
    except RuntimeError as error:
        found["joined"] = str(error)
    return found


def test_it_has_to_be_clear_which_processes_train_together(ranks):
    for found in ranks(2, choices):
        assert "initialised with 2 ranks" in found["nothing said"]
        assert "process_group=True (or a group)" in found["nothing said"]
        assert found["alone"] == ""
        assert "must be a process group, True, False or None. Found 'nccl'" in found["no group"]
        assert "`reduce` must be 'rows' or 'result'. Found 'rank'" in found["unknown way"]
        assert "pass model.module" in found["alone in a group"]
        assert "static_graph=True" in found["static"]
        assert "save its state_dict()" in found["copied"]
        assert "call combine() or step() on that rank all the same" in found["joined"]


def test_without_torch_distributed():
    model = Bent()
    with pytest.raises(ValueError, match="call init_process_group"):
        make(0, model)
    _, opt = make(0, model, process_group=None)
    opt.backward(model.losses(batch(0)), samples={"a": 3, "b": 1, "c": 2})
    opt.step()


@pytest.mark.parametrize(
    ("samples", "error", "text"),
    [
        ({"a": 1, "b": 1}, ValueError, "has no number for task 'c'"),
        ({"a": 1, "b": -1, "c": 1}, ValueError, r"`samples\['b'\]` must be a number, at least 0. Found -1"),
        ({"a": 1, "b": True, "c": 1}, ValueError, r"`samples\['b'\]` must be a number, at least 0. Found True"),
        ({"a": 1, "b": 1, "c": 1, "d": 1}, ValueError, "names 'd', but the tasks are"),
        ([1, 1, 1], TypeError, "must be a mapping"),
    ],
)
def test_samples_that_do_not_fit(samples, error, text):
    model, opt = make(0, process_group=None)
    with pytest.raises(error, match=text):
        opt.backward(model.losses(batch(0)), samples=samples)


# --- A rank that is lost ------------------------------------------------------------------------------------------------


def train_until_killed(rank, path, steps, killed):
    model, opt = make(rank, nn.parallel.DistributedDataParallel(Bent()), process_group=None)
    start = 0
    if os.path.exists(path):
        saved = torch.load(path, weights_only=True)
        start = saved["step"]
        model.load_state_dict(saved["model"])
        opt.load_state_dict(saved["opt"])
    for step in range(start, steps):
        opt.backward(model.module.losses(batch(rank, step)))
        if step == killed and rank == 1:
            os._exit(1)
        try:
            opt.step()
        except RuntimeError as error:
            return str(error)
        opt.zero_grad()
        if rank == 0:
            torch.save({"step": step + 1, "model": model.state_dict(), "opt": opt.state_dict()}, path)
        dist.barrier()
    return [p.detach() for p in model.parameters()], opt.rule_state["target"]


@pytest.mark.parametrize("count", [2, 4])
def test_a_killed_rank_ends_the_others_and_the_checkpoint_continues(ranks, tmp_path, count):
    expected = ranks(count, train_until_killed, str(tmp_path / "whole"), 6, None)
    start = time.monotonic()
    results = ranks(count, train_until_killed, str(tmp_path / "killed"), 6, 3, dying=(1,))
    assert time.monotonic() - start < 3 * COLLECTIVE
    for rank, text in enumerate(results):
        assert (text is None) if rank == 1 else ("start all of them again from the last checkpoint" in text)
    resumed = ranks(count, train_until_killed, str(tmp_path / "killed"), 6, None)
    for (parameters, state), (other, other_state) in zip(resumed, expected, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(parameters, other, strict=True))
        assert torch.equal(state, other_state)
