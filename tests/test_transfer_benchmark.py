"""The study of transference: its sources, its runs in small, and its statistics."""

import dataclasses
import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("sklearn")
sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks import transfer
from benchmarks.transfer import OPTIMIZERS, PREDICTORS, SOURCES, TARGET, Settings


def test_sources_share_no_digit_with_the_target_and_perturb_the_same_ones():
    tasks, test = transfer.data(seed=0, labelled=80)
    assert set(tasks) == {TARGET, *SOURCES}
    assert len(tasks[TARGET][0]) == 80
    rows = lambda x: set(map(bytes, x.numpy()))  # noqa: E731
    clean = rows(tasks["clean"][0])
    assert not clean & rows(tasks[TARGET][0])
    assert not rows(test[0]) & (clean | rows(tasks[TARGET][0]))
    y = tasks["clean"][1]
    assert torch.equal(tasks["labels next"][1], (y + 1) % 10)
    changed = tasks["labels 30% next"][1] != y
    assert 0.2 < changed.double().mean() < 0.4
    assert torch.equal(tasks["labels 30% next"][1][changed], (y[changed] + 1) % 10)
    assert torch.equal(tasks["upside-down images"][0].view(-1, 8, 8)[:, 0], tasks["clean"][0].view(-1, 8, 8)[:, -1])
    assert set(tasks["three classes"][1].tolist()) == {0, 1, 2}
    again, _ = transfer.data(seed=0, labelled=80)
    assert all(torch.equal(a, b) for name in tasks for a, b in zip(tasks[name], again[name], strict=True))


def test_a_run_is_the_same_again():
    settings = Settings(steps=3, hidden=8)
    names = ["clean", "labels next"]
    found = transfer.run(names, "Adam", 0, settings)
    assert found == transfer.run(names, "Adam", 0, settings)
    assert set(found["predicted"]) == set(PREDICTORS)
    assert all(set(values) == set(names) for values in found["predicted"].values())
    alone = transfer.run(["clean"], "Adam", 0, settings)["alone"]
    assert found["alone"] == alone  # the shadow does not see which sources there are


def test_agreement_is_that_of_ranks():
    promised = np.array([3.0, 1.0, 2.0, 10.0])
    assert transfer.agreement(promised, np.exp(promised), resamples=50)[0] == pytest.approx(1)
    assert transfer.agreement(promised, -promised, resamples=50) == pytest.approx((-1, -1, -1))
    rho, low, high = transfer.agreement(promised, np.array([1.0, 2.0, 4.0, 3.0]), resamples=200)
    assert rho == pytest.approx(1 - 6 * (4 + 1 + 4 + 1) / (4 * 15))
    assert low < rho < high


def made_up(together, optimizer, seed, names):
    values = {name: float(list(SOURCES).index(name) + seed) for name in names}
    gap = 0.0 if together else -values[names[0]] / 100
    predicted = dict.fromkeys(PREDICTORS, values)
    run = {"optimizer": optimizer, "seed": seed, "sources": names}
    return {**run, "error": gap, "loss": -gap, "alone": 0.25, "predicted": predicted}


def test_the_report_pairs_predictions_with_gaps():
    results = [
        made_up(len(names) > 1, o, seed, names)
        for o in OPTIMIZERS
        for seed in (0, 2)
        for names in (*([name] for name in SOURCES), list(SOURCES))
    ]
    text = transfer.report(results, Settings())
    assert "| clean | -1.0 ± 1.4 | -1.0 ± 1.4 |" in text
    assert "| *target* | 25.0% alone | 25.0% alone |" in text
    lines = [line for line in text.splitlines() if line.startswith(tuple(f"| {name}," for name in PREDICTORS))]
    assert len(lines) == 6
    assert all(line.count("+1.00 [") == 2 and line.count("-1.00 [") == 2 for line in lines)


def test_runs_that_are_there_are_not_made_again(tmp_path, monkeypatch):
    class Pool:
        """Runs nothing in other processes."""

        def __init__(self, *args, **kwargs):
            pass

        def __enter__(self):
            return self

        def __exit__(self, *args):
            pass

        def submit(self, function, names, optimizer, seed, settings):
            from concurrent.futures import Future

            calls.append((optimizer, seed, names))
            result = made_up(len(names) > 1, optimizer, seed, names)
            future = Future()
            future.set_result({key: value for key, value in result.items() if key not in ("optimizer", "seed", "sources")})
            return future

    calls, file = [], tmp_path / "runs.json"
    monkeypatch.setattr(transfer, "ProcessPoolExecutor", Pool)
    first = transfer.study([0], Settings(), 1, file)
    each = len(OPTIMIZERS) * (len(SOURCES) + 1)
    assert len(first) == len(calls) == each
    assert transfer.study([0], Settings(), 1, file) == first
    assert len(calls) == each
    assert len(transfer.study([0, 1], Settings(), 1, file)) == len(calls) == 2 * each
    transfer.study([0], dataclasses.replace(Settings(), steps=1), 1, file)  # other settings: other runs
    assert len(calls) == 3 * each
    assert json.loads(file.read_text())["settings"]["steps"] == 1


def test_what_is_timed_runs():
    threads = torch.get_num_threads()
    figures = transfer.overheads(2, 2)
    assert [figure.target for figure in figures] == ["<= 1.25", "<= 1.02"]
    assert torch.get_num_threads() == threads


def test_wrong_arguments_are_named(capsys):
    for wrong, message in ((["--seeds", "0"], "--seeds must be at least 1"), (["--labelled", "400"], "at most 300")):
        with pytest.raises(SystemExit):
            transfer.main(wrong)
        assert message in capsys.readouterr().err
