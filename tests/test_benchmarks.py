import json
import re
import sys
from pathlib import Path

import pytest
import torch
from torch.distributed.fsdp import fully_shard
from torch.utils.flop_counter import FlopCounterMode

pytest.importorskip("torchjd")
sys.path.insert(0, str(Path(__file__).parents[1]))

import gradsurgery as gs
from benchmarks.__main__ import FIGURES, main, parse
from benchmarks.report import Figure, overhead, table
from benchmarks.scale import Job
from benchmarks.split import Sizes, check
from benchmarks.wire import Counting, Network, _new
from gradsurgery._bench.timing import Contender, interleaved, ratios


@pytest.fixture
def threads():
    before = torch.get_num_threads()
    yield before
    torch.set_num_threads(before)


def test_everything_runs_in_small(tmp_path, capsys, threads):
    figures = main(["--quick", "--threads", "1", "--out", str(tmp_path)])
    printed = capsys.readouterr().out
    for figure in figures:
        assert f"| {figure.name} " in printed
    written = json.loads((tmp_path / "figures.json").read_text())
    assert [row["name"] for row in written["figures"]] == [figure.name for figure in figures]
    assert {"python", "torch", "torchjd", "threads", "cpu"} <= written["environment"].keys()
    assert table(figures) in (tmp_path / "figures.md").read_text()
    starts = ("peak memory, K=", "peak memory, single pass, K=", "single pass, K=", "growth, width ", "bytes sent, K=")
    for start in (*starts, "compiled, K="):
        assert any(figure.name.startswith(start) for figure in figures)
    for picture in ("rules.png", "growth.png", "scale.png"):
        assert (tmp_path / picture).stat().st_size > 10_000


@pytest.mark.parametrize(
    ("name", "start"), [("surgery", "surgery alone"), ("split", "single pass, K="), ("growth", "growth, width ")]
)
def test_runs_what_is_named(name, start, tmp_path, threads):
    figures = main([name, "--quick", "--threads", "1", "--out", str(tmp_path)])
    assert figures
    assert all(figure.name.startswith(start) for figure in figures)
    assert len({figure.name for figure in figures}) == len(figures)


def test_single_pass_is_compared_with_all_that_it_claims_to_beat(tmp_path, threads):
    figures = main(["split", "--quick", "--threads", "1", "--out", str(tmp_path)])
    targets = [(figure.name.split(",")[1].strip(), figure.target) for figure in figures if figure.target]
    assert targets == [("K=8", "<= 1.35"), ("K=8", ">= 5"), ("K=32", "<= 1.35"), ("K=32", ">= 2"), ("K=100", "<= 1.6")]


@pytest.mark.parametrize("sizes", [Sizes(2, 4, 4, 16, 2, 32), Sizes(3, 4, 4, 16, 2, 32)], ids=["even", "uneven"])
def test_check_of_the_single_pass_finds_wrong_gradients(sizes, monkeypatch):
    check(sizes, 0)
    monkeypatch.setattr(gs, "Sum", gs.Mean)
    with pytest.raises(AssertionError, match="is not the sum of the tasks'"):
        check(sizes, 0)


def test_lists_all_figures(capsys):
    with pytest.raises(SystemExit, match="0"):
        parse(["--list"])
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()] == list(FIGURES)


@pytest.mark.parametrize("arguments", [["step", "walk"], ["--repeats", "0"], ["--threads", "-1"]])
def test_wrong_arguments_are_named(arguments, capsys):
    with pytest.raises(SystemExit, match="2"):
        parse(arguments)
    assert arguments[-1] in capsys.readouterr().err


def test_contenders_take_turns():
    calls = []
    contenders = {
        name: Contender(lambda n=name: calls.append(n), lambda n=name: calls.append(f"before {n}")) for name in "ab"
    }
    samples = interleaved(contenders, 3)
    warm_up = [*["before a", "a"] * 2, *["before b", "b"] * 2]
    assert calls == warm_up + ["before a", "a", "before b", "b"] * 3
    assert [len(times) for times in samples.values()] == [3, 3]


def test_ratio_is_the_median_of_pairs():
    # A machine that becomes ten times slower in between changes no ratio.
    assert ratios([2.0, 4.0, 60.0], [1.0, 2.0, 20.0]) == (2.0, (2.0, 2.5))
    assert ratios([3.0], [2.0]) == (1.5, (1.5, 1.5))


def test_figures_know_whether_they_met_their_target():
    assert overhead("", [2.0], [1.0], 2).met
    assert not overhead("", [2.1], [1.0], 2).met
    assert overhead("", [2.1], [1.0]).met is None
    assert Figure("", 1.0, 20.0, 20.0, target=">= 20").met
    assert Figure("", 1.0, 19.0, 19.0, target=">= 20").cells()[-1] == "**no**"
    assert Figure("", 3 * 2**20, 2**20, 3.0, unit="B").cells()[1] == "3.0 MiB"
    assert [Figure("", seconds, 1.0, 1.0).cells()[1] for seconds in (2, 2e-3, 2e-6, 2e-9)] == [
        "2 s",
        "2 ms",
        "2 µs",
        "2 ns",
    ]


def _counted(rank, count, width):
    """What a rank sends, computes and keeps in a step, counted."""
    network = _new(width, "all shared")
    sgd = torch.optim.SGD(network.parameters(), lr=0.01)
    opt = gs.SurgeryOptimizer(sgd, gs.Sum(), model=network)
    reduce, kept = opt._surgery.ranks.reduce, []

    def counting(gradients):
        own = sum(row.numel() for rows in gradients.rows for row in rows.of.values()) * 4
        shards = reduce(gradients)
        kept.append((own, sum(row.numel() for rows in shards.rows for row in rows.of.values()) * 4))
        return shards

    opt._surgery.ranks.reduce = counting
    for step in range(2):
        opt.backward(network(torch.randn(8, width, generator=torch.Generator().manual_seed(10 * step + rank))))
        with Counting(count) as wire, FlopCounterMode(display=False) as flops:
            opt.step()
        opt.zero_grad()
    return wire.traffic.sent, flops.get_total_flops(), kept[-1], sum(p.numel() for p in network.parameters())


@pytest.mark.distributed
@pytest.mark.parametrize("count", [2, 4])
def test_model_of_costs_against_counts(ranks, count):
    results = ranks(count, _counted, count, 64)
    job = Job(count, 8, results[0][3])
    assert {sent for sent, _, _, _ in results} == {job.sent}
    # The counter knows products of matrices, and not those with a vector that combine rows.
    assert sum(flops for _, flops, _, _ in results) == pytest.approx(count * job.products, rel=0.001)
    for _, _, (own, shard), _ in results:
        assert own == job.rows
        assert shard == pytest.approx(job.shard, rel=0.001)


class Mixed(Network):
    """Each sample's loss."""

    def forward(self, x):
        return self.heads[0](self.trunk(x)).square().mean(1)


def _counted_sharded(rank, count, width, tasks, mixed=False):
    torch.manual_seed(0)
    network = (Mixed if mixed else Network)(width, heads=False)
    for part in (*network.trunk, *network.heads, network):
        if list(part.parameters()):
            fully_shard(part)
    sgd = torch.optim.SGD(network.parameters(), lr=0.01)
    opt = gs.SurgeryOptimizer(sgd, gs.Sum(), model=network, tasks=tasks)
    for step in range(2):
        x = torch.randn(8, width, generator=torch.Generator().manual_seed(10 * step + rank))
        with Counting(count) as wire:
            if mixed:
                with opt.split(torch.arange(8) % tasks):
                    losses = network(x)
                opt.backward(losses)
            else:
                losses = network(x)
                opt.backward({str(k): losses[str(k)] for k in range(tasks)})
            opt.step()
        opt.zero_grad()
    return wire.traffic.sent, sum(p.numel() for p in network.parameters())


@pytest.mark.distributed
@pytest.mark.parametrize("count", [2, 4])
def test_model_of_what_sharded_training_sends(ranks, count):
    for tasks in (1, 8):
        sent, parameters = ranks(count, _counted_sharded, count, 64, tasks)[0]
        assert sent == pytest.approx(Job(count, tasks, parameters).sent_sharded, rel=0.01)
        mixed, _ = ranks(count, _counted_sharded, count, 64, tasks, True)[0]
        assert mixed == pytest.approx(Job(count, tasks, parameters).sent_sharded_mixed, rel=0.01)


@pytest.mark.distributed
def test_bytes_on_the_wire(tmp_path, capsys, threads):
    figures = main(["wire", "--out", str(tmp_path)])
    for figure in figures:
        bound = 4.5 if "head" in figure.name else 4.51  # where all is shared, what hosts tell each other comes on top
        assert 3 < figure.ratio <= bound
    lines = [line for line in capsys.readouterr().out.splitlines() if "reduce_scatter" in line]
    assert len(lines) == 6
    for line in lines:  # one of numbers of samples, and one of inner products: of each part, where surgery streams
        parts = int(re.search(r"(\d+) reduce_scatter", line)[1]) if "streamed" in line else 1
        assert f" {1 + parts} allreduce" in line
        assert parts < 7  # there are eight tasks
