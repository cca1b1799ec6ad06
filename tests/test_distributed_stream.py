"""Surgery inside the backward pass of mixed batches, on several processes."""

import re
from collections import Counter
from contextlib import contextmanager
from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch
from test_distributed import CLOSE, compare, equal
from test_stream import BATCHES, TASKS, Everything
from torch import nn

import gradsurgery as gs

pytestmark = pytest.mark.distributed

STEPS = 5
STREAMS = {}, {"stream": False}


@contextmanager
def small_parts():
    """Rows travel in many parts, though there are few of them; counts the collectives that are started."""
    from gradsurgery._ranks import buckets
    from gradsurgery._ranks.wire import Wire

    counts, plain = Counter(), {}

    def counting(name):
        def count(self, *arguments):
            counts[name] += 1
            return plain[name](self, *arguments)

        return count

    names = ("start_reduce_scatter", "start_all_gather", "sum", "gather_numbers", "gather_objects", "host_sum", "host_max")
    size, buckets._BYTES = buckets._BYTES, 64
    for name in names:
        plain[name] = getattr(Wire, name)
        setattr(Wire, name, counting(name))
    try:
        yield counts
    finally:
        buckets._BYTES = size
        for name in names:
            setattr(Wire, name, plain[name])


def new(rule=None, dtype=torch.float64, model=None, **settings):
    torch.manual_seed(3)
    model = (Everything() if model is None else model).to(dtype)
    sgd = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.5)
    settings = {"groups": "layer", "tasks": TASKS, "process_group": True, "check_ranks": True, **settings}
    return model, gs.SurgeryOptimizer(sgd, rule or gs.GradVac(beta=0.3), model=model, **settings)


def samples(step, rank, dtype=torch.float64):
    """Tokens, tasks and targets of a rank, whose tasks are not those of others."""
    generator = torch.Generator().manual_seed(10 * step + rank)
    ids = BATCHES[(step + rank) % len(BATCHES)]
    tokens = torch.randint(6, (len(ids), 3), generator=generator)
    return tokens, ids, torch.randn(len(ids), 2, generator=generator, dtype=torch.float64).to(dtype)


def backward(model, opt, tokens, ids, wanted):
    with opt.split(ids):
        found = (model(tokens, ids) - wanted).square().mean(1)
    opt.backward(found)


def grads(model):
    return [None if p.grad is None else p.grad.clone() for p in model.parameters()]


def streamed(opt):
    """Whether this step's surgery has happened in the backward pass."""
    return opt._surgery._done == "streamed"


def made(settings):
    """With a table of so many words in place of six."""
    settings = dict(settings)
    if words := settings.pop("words", None):
        torch.manual_seed(3)
        settings["model"] = Everything(words)
    return settings


def passes_of(rank, step, passes):
    """The samples of each backward pass of a rank in a step."""
    return [100 * step + number for number in range(passes[rank][step % len(passes[rank])])]


def train(rank, dtype, rule, passes, settings):
    with small_parts() as counts:
        model, opt = new(rule, dtype, **made(settings))
        seen, inside, calls = [], [], []
        for step in range(STEPS):
            counts.clear()
            for number in passes_of(rank, step, passes):
                backward(model, opt, *samples(number, rank, dtype))
            inside.append(streamed(opt))
            opt.combine()
            seen.append(grads(model))
            calls.append(dict(counts))
            opt.step()
            opt.zero_grad()
        return [p.detach() for p in model.parameters()], seen, inside, opt.rule_state, opt.last, calls, opt.streaming


def alone(count, dtype, rule, passes, settings):
    model, opt = new(rule, dtype, process_group=None, stream=False, check_ranks=False, **made(settings))
    seen = []
    for step in range(STEPS):
        # What several passes of one rank add up to is a pass of the concatenated batches of theirs at the same time.
        most = max(len(passes_of(rank, step, passes)) for rank in range(count))
        for number in range(most):
            there = [rank for rank in range(count) if number < len(passes_of(rank, step, passes))]
            parts = zip(*(samples(passes_of(rank, step, passes)[number], rank, dtype) for rank in there), strict=True)
            backward(model, opt, *(torch.cat(part) for part in parts))
        opt.combine()
        seen.append(grads(model))
        opt.step()
        opt.zero_grad()
    return [p.detach() for p in model.parameters()], seen, opt.last


def check(ranks, count, dtype, rule=None, passes=None, **settings):
    passes = passes or [[1]] * count
    results = ranks(count, train, dtype, rule, passes, settings)
    expected = alone(count, dtype, rule, passes, settings)
    for parameters, seen, _, state, last, _, _ in results:
        compare(parameters, expected[0], CLOSE[dtype])
        for ours, theirs, first in zip(seen, expected[1], results[0][1], strict=True):
            compare(ours, theirs, 10 * CLOSE[dtype])
            assert equal(ours, first)
        assert str(state) == str(results[0][3])
        assert last.groups == expected[2].groups
        assert torch.equal(last.active, expected[2].active)
        torch.testing.assert_close(last.losses, expected[2].losses, rtol=10 * CLOSE[dtype], atol=0, equal_nan=True)
    return results


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("count", [2, 4])
def test_as_one_process_on_all_samples(ranks, count, dtype):
    results = check(ranks, count, dtype, gs.PCGrad() if count == 4 else gs.GradVac(beta=0.3))
    for *_, inside, _, _, _, streaming in results:
        assert streaming
        assert inside == [False] + [True] * (STEPS - 1)


def test_as_without_streaming_and_with_as_many_meetings(ranks):
    inside = ranks(2, train, torch.float64, gs.GradVac(beta=0.3), [[1]] * 2, {})
    after = ranks(2, train, torch.float64, gs.GradVac(beta=0.3), [[1]] * 2, {"stream": False})
    for ours, theirs in zip(inside, after, strict=True):
        compare(ours[0], theirs[0], 1e-12)
        assert not any(theirs[2])
        # The sums travel in parts. Each has one all-reduce of Gram matrices, whatever the number of tasks.
        calls, others = ours[5][-1], theirs[5][-1]
        parts = len(ranks_parts(ours[4].groups))
        assert calls["sum"] <= parts
        assert others["sum"] == 1
        meetings = ("gather_numbers", "gather_objects", "host_sum", "host_max")
        assert sum(calls.get(name, 0) for name in meetings) <= sum(others.get(name, 0) for name in meetings) + 1


def ranks_parts(groups):
    return {group.partition(" [")[0] for group in groups}


PASSES = {
    "two each": [[2], [2]],
    "one has more": [[2], [1]],
    "one has none now and then": [[1], [1, 0]],
    "one has none": [[1], [0]],
    "fewer now and then": [[2, 2, 1], [2, 2, 1]],
    "as many as it happens": [[1, 2, 0], [2, 1, 1]],
}


@pytest.mark.parametrize("what", PASSES)
def test_any_number_of_passes(ranks, what):
    results = check(ranks, 2, torch.float64, passes=PASSES[what])
    assert any(any(inside) for _, _, inside, *_ in results)


def message(rank, function, *arguments):
    try:
        function(rank, *arguments)
    except (RuntimeError, ValueError, ZeroDivisionError) as error:
        return f"{type(error).__name__}: {error}"
    return "no error"


def test_other_settings(ranks):
    check(ranks, 2, torch.float64, groups="tensor", nonfinite="propagate")
    check(ranks, 2, torch.float64, gs.Chain(gs.RLW(), gs.PCGrad()), groups="module")
    check(ranks, 2, torch.float64, every=2)
    results = ranks(2, train, torch.float64, gs.GradVac(beta=0.3), [[1]] * 2, {"reduce": "result"})
    others = ranks(2, train, torch.float64, gs.GradVac(beta=0.3), [[1]] * 2, {"reduce": "result", "stream": False})
    assert results[0][2] == [False] + [True] * (STEPS - 1)
    for ours, theirs in zip(results, others, strict=True):
        compare(ours[0], theirs[0], 1e-12)
        assert all(equal(a, b) for a, b in zip(ours[1], results[0][1], strict=True))


def test_embeddings_whose_rows_are_sparse(ranks):
    results = check(ranks, 2, torch.float64, words=500)
    check(ranks, 2, torch.float64, words=500, passes=[[2], [2]])
    check(ranks, 2, torch.float64, words=500, passes=[[1], [1, 0]])
    after = ranks(2, train, torch.float64, None, [[1]] * 2, {"words": 500, "stream": False})
    for ours, theirs in zip(results, after, strict=True):
        assert ours[2] == [False] + [True] * (STEPS - 1)
        # Entries travel: indices and values are gathered.
        assert ours[5][-1]["start_all_gather"] >= theirs[5][-1]["start_all_gather"]
        assert ours[5][-1]["gather_objects"] == theirs[5][-1]["gather_objects"] == 1
    cheap = [ranks(2, train, torch.float64, None, [[1]] * 2, {"words": 500, "reduce": "result", **s}) for s in STREAMS]
    for ours, theirs in zip(*cheap, strict=True):
        assert ours[2] == [False] + [True] * (STEPS - 1)
        compare(ours[0], theirs[0], 1e-12)


# --- In the same order, whatever is complete first ----------------------------------------------------------------------


class Detour(nn.Module):
    """Layers that each rank puts in an order of its own."""

    def __init__(self, order):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(4, 4) for _ in order)
        self.order = order

    def forward(self, x):
        for i in self.order:
            x = x + torch.tanh(self.layers[i](x))
        return x


def detour(rank):
    with small_parts():
        torch.manual_seed(3)
        model = Detour([[0, 1, 2, 3, 4, 5], [5, 4, 3, 2, 1, 0], [2, 0, 5, 1, 4, 3], [0, 1, 2, 3, 4, 5]][rank])
        model, opt = new(model=model)
        all_seen = []
        for step in range(3):
            generator = torch.Generator().manual_seed(10 * step + rank)
            with opt.split(torch.arange(8) % 4):
                x = torch.randn(8, 4, generator=generator, dtype=torch.float64)
                found = (model(x) - torch.arange(4)).square().sum(1)
            opt.backward(found)
            opt.step()
            all_seen.append(grads(model))
            opt.zero_grad()
        return all_seen, list(opt._surgery.ranks.order)


def test_ranks_that_complete_groups_in_different_order(ranks):
    results = ranks(4, detour)
    assert all(order == [f"layers.{i}" for i in reversed(range(6))] for _, order in results)
    for seen, _ in results:
        assert all(equal(a, b) for a, b in zip(seen, results[0][0], strict=True))


def deep():
    return nn.Sequential(*[nn.Sequential(nn.Linear(4, 4), nn.Tanh()) for _ in range(12)])


def overlap(rank):
    with small_parts():
        model, opt = new(model=deep())
        back, live = [], []
        for step in range(3):
            generator = torch.Generator().manual_seed(10 * step + rank)
            with opt.split(torch.arange(8) % 4):
                hidden = model[0](torch.randn(8, 4, generator=generator, dtype=torch.float64))
                found = model[1:](hidden).square().sum(1)
            rows = opt._surgery.gradients.rows
            hidden.register_hook(lambda _: back.append(sum(p.grad is not None for p in model.parameters())))
            hidden.register_hook(lambda _, rows=rows: live.append(sum(bool(own.tasks) for own in rows)))
            opt.backward(found)
            opt.step()
            opt.zero_grad()
        return back, live


def test_parts_travel_during_the_backward_pass(ranks):
    for back, live in ranks(2, overlap):
        assert back[-1] >= 16  # of the 22 parameters above the first layer: two parts of two each are under way
        assert live[0] == 22
        assert live[-1] <= 4


# --- Checkpoints --------------------------------------------------------------------------------------------------------


def stopped(rank, at):
    with small_parts():
        model, opt = new()
        for step in range(STEPS):
            if step == at:
                states = model.state_dict(), opt.state_dict()
                model, opt = new()
                model.load_state_dict(states[0])
                opt.load_state_dict(states[1])
            backward(model, opt, *samples(step, rank))
            opt.step()
            opt.zero_grad()
        return [p.detach() for p in model.parameters()], opt.rule_state["target"]


@pytest.mark.parametrize("count", [2, 4])
def test_a_checkpoint_continues_bit_for_bit(ranks, count):
    expected = ranks(count, stopped, None)
    for at in (1, 3):
        for (ours, target), (theirs, other) in zip(ranks(count, stopped, at), expected, strict=True):
            assert equal(ours, theirs)
            assert torch.equal(target, other)


# --- What goes wrong on one rank ----------------------------------------------------------------------------------------


def failing(rank, way):
    with small_parts():
        model, opt = new(gs.PCGrad(), model=deep())
        texts = []
        for step in range(5):
            before = opt.state_dict()["surgery"]["generator"].clone()
            generator = torch.Generator().manual_seed(10 * step + rank)
            ids = torch.arange(8) % 4
            if way == "none" and step == 2:
                continue
            try:
                if not (way == "without samples" and rank == 0 and step == 2):
                    with opt.split(ids):
                        hidden = model[:6](torch.randn(8, 4, generator=generator, dtype=torch.float64))
                        found = model[6:](hidden).square().sum(1)
                    if step == 2 and rank == 1:
                        hidden.register_hook(lambda _: 1 / 0)
                    opt.backward(found)
                opt.step()
            except (RuntimeError, ZeroDivisionError) as error:
                texts.append(f"{type(error).__name__}: {error}")
                assert all(p.grad is None for p in model.parameters())
                assert torch.equal(opt.state_dict()["surgery"]["generator"], before)
                assert not any(rows.of for rows in opt._surgery.gradients.rows)
            opt.zero_grad()
        return [p.detach() for p in model.parameters()], texts


@pytest.mark.parametrize("way", ["with samples", "without samples"])
def test_an_error_on_one_rank_changes_nothing_on_all(ranks, way):
    expected = ranks(2, failing, "none")
    results = ranks(2, failing, way)
    assert results[1][1] == ["ZeroDivisionError: division by zero"]
    assert re.match(r"RuntimeError: Rank 1 failed in the backward pass .* Its error: ZeroDivisionError", results[0][1][0])
    for (ours, texts), (theirs, _) in zip(results, expected, strict=True):
        assert len(texts) == 1
        assert equal(ours, theirs)


@dataclass(frozen=True)
class Picky(gs.PCGrad):
    """Does not like the third part of a step."""

    parts: ClassVar[list[int]] = [0]  # of this step, until now

    def mix(self, gram, state, *, active, generator):
        self.parts[0] += 1
        if self.parts[0] == 3:
            raise ZeroDivisionError("of the rule")
        return super().mix(gram, state, active=active, generator=generator)


def picky(rank, way):
    with small_parts():
        model, opt = new(Picky(), model=deep())
        texts = []
        for step in range(4):
            Picky.parts[0] = 0 if step == 2 else 100
            if way == "none" and step == 2:
                continue
            generator = torch.Generator().manual_seed(10 * step + rank)
            try:
                if not (way == "without samples" and rank == 0 and step == 2):
                    with opt.split(torch.arange(8) % 4):
                        found = model(torch.randn(8, 4, generator=generator, dtype=torch.float64)).square().sum(1)
                    opt.backward(found)
                opt.step()
            except ZeroDivisionError as error:
                texts.append(str(error))
                assert all(p.grad is None for p in model.parameters())
            opt.zero_grad()
        return [p.detach() for p in model.parameters()], texts


@pytest.mark.parametrize("way", ["with samples", "without samples"])
def test_an_error_of_the_rule_is_one_on_all_ranks(ranks, way):
    expected = ranks(2, picky, "none")
    for (ours, texts), (theirs, _) in zip(ranks(2, picky, way), expected, strict=True):
        assert texts == ["of the rule"]
        assert equal(ours, theirs)


def once_more(rank, twice):
    with small_parts():
        model, opt = new()
        for step in range(3):
            backward(model, opt, *samples(step, rank))
            if step == 2 and rank in twice:
                backward(model, opt, *samples(9, rank))
            opt.step()
            opt.zero_grad()
        backward(model, opt, *samples(3, rank))


def test_one_pass_more_than_ever_on_some_ranks(ranks):
    first, second = ranks(2, message, once_more, (0, 1))
    assert first == second
    assert "Make the optimizer with stream=False, or call step() first." in first
    first, second = ranks(2, message, once_more, (1,))
    assert "Make the optimizer with stream=False, or call step() first." in second
    assert "Rank 1 called backward() once more in a step whose surgery was done already" in first


class Sometimes(torch.autograd.Function):
    """The identity of ``x`` and a product with a parameter, which may have no gradient."""

    @staticmethod
    def forward(ctx, x, weight, there):
        ctx.there = there
        ctx.save_for_backward(x, weight)
        return x * weight

    @staticmethod
    def backward(ctx, gradient):
        x, weight = ctx.saved_tensors
        return gradient * weight, (gradient * x).sum(0) if ctx.there[0] else None, None


class Odd(nn.Module):
    """A scale whose gradient is not always there."""

    def __init__(self):
        super().__init__()
        self.first = nn.Linear(4, 4)
        self.scale = nn.Parameter(torch.ones(4))
        self.last = nn.Linear(4, 4)
        self.there = [True]

    def forward(self, x):
        return self.last(Sometimes.apply(torch.tanh(self.first(x)), self.scale, self.there))


def odd(rank, missing):
    with small_parts():
        model, opt = new(model=Odd(), groups="tensor")
        for step in range(3):
            # In the walk through the graph it is there, in the pass itself it is not.
            generator = torch.Generator().manual_seed(10 * step + rank)
            with opt.split(torch.arange(8) % 4):
                found = model(torch.randn(8, 4, generator=generator, dtype=torch.float64)).square().sum(1)
            if step == missing and rank == 1:
                found.register_hook(lambda _: model.there.__setitem__(0, False))
            opt.backward(found)
            opt.step()
            opt.zero_grad()
            model.there[0] = True
        return opt.streaming.why


def test_gradients_that_are_not_those_that_were_told(ranks):
    first, second = ranks(2, message, odd, 2)
    assert "RuntimeError: The gradients of 'scale' in this single pass are of other tasks" in second
    assert first.startswith("RuntimeError: Rank 1 failed in the backward pass of this step")
    first, second = ranks(2, odd, 0)  # where that is seen first, there is no streaming
    assert first == ""
    assert second == "which tasks reach 'scale' shows at the end of a backward pass only"


def sparse(rank, one):
    with small_parts():
        model, opt = new(
            model=nn.ModuleDict({"table": nn.Embedding(6, 4, sparse=True), "last": nn.Linear(4, 2)}),
            stream=False if one and rank == 1 else None,
        )
        if one:
            model["table"].sparse = False
        inside = []
        for step in range(3):
            tokens, ids, wanted = samples(step, rank)
            with opt.split(ids):
                found = (model["last"](model["table"](tokens).mean(1)) - wanted).square().sum(1)
            opt.backward(found)
            inside.append(streamed(opt))
            opt.step()
            opt.zero_grad()
        return inside, opt.streaming.why, [p.detach() for p in model.parameters()]


def test_what_does_not_stream(ranks):
    first, second = ranks(2, sparse, False)
    assert first[0] == second[0] == [False] * 3
    assert first[1].startswith("gradients of 'table.weight' are sparse")
    assert equal(first[2], second[2])
    first, second = ranks(2, sparse, True)
    assert first[0] == second[0] == [False] * 3
    assert (first[1], second[1]) == ("", "stream=False")
    assert equal(first[2], second[2])
