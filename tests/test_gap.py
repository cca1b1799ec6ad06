"""The negative transfer gap over seeds: closed cases, processes and the cache."""

import json
import math
import sys

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

import gradsurgery as gs
from gradsurgery._transfer import gap

FINITE = st.floats(-1e3, 1e3)


def result(gaps, confidence=0.95):
    return gs.GapResult(tuple(range(len(gaps))), tuple(1 + gap for gap in gaps), (1.0,) * len(gaps), confidence)


# --- Statistics -------------------------------------------------------------------------------------------------------


@settings(deadline=None, max_examples=40)
@given(
    pairs=st.lists(st.tuples(FINITE, FINITE), min_size=2, max_size=12),
    confidence=st.sampled_from([0.5, 0.9, 0.95]),
)
def test_the_interval_is_that_of_a_paired_t_test(pairs, confidence):
    a, b = map(tuple, zip(*pairs, strict=True))
    found = gs.GapResult(tuple(range(len(a))), a, b, confidence)
    differences = np.array(a) - np.array(b)
    assert found.gap == pytest.approx(differences.mean())
    spread = differences.std(ddof=1)
    if spread > 1e-6:
        expected = stats.ttest_1samp(differences, 0).confidence_interval(confidence)
        assert found.interval == pytest.approx((expected.low, expected.high), abs=1e-9)


def test_cases_worked_by_hand():
    # t(0.975, 2) = 4.3027; mean 2, standard deviation 1, three seeds.
    assert result([1.0, 2.0, 3.0]).interval == pytest.approx((2 - 4.302653 / math.sqrt(3), 2 + 4.302653 / math.sqrt(3)))
    assert result([1.0] * 5).p_value == pytest.approx(2 / 2**5)
    assert result([1.0, 1.0, -1.0, 0.0]).p_value == pytest.approx(1.0)
    assert result([1.0, 1.1, 0.9, 1.0]).verdict == "yes"
    assert result([-1.0, -1.1, -0.9, -1.0]).verdict == "no"
    assert result([1.0, -1.0, 0.5]).verdict == "undecided at 3 seeds"
    assert result([5.0]).verdict == "undecided at 1 seed"
    assert result([5.0]).interval == (-math.inf, math.inf)
    ignores = result([0.0] * 4)  # what never uses the source cannot be harmed by it
    assert (ignores.gap, ignores.interval, ignores.p_value, ignores.verdict) == (0, (0, 0), 1, "no")


def test_a_result_prints_as_a_sentence():
    assert "(99.5%, 2 seeds)" in str(gs.GapResult((0, 1), (1.0, 2.0), (0.0, 0.0), 0.995))
    text = str(result([1.0, 2.0, 3.0]))
    assert text == "NTG +2 [-0.4841, +4.484] (95%, 3 seeds), sign test p = 0.25; negative transfer: undecided at 3 seeds"


# --- Measuring --------------------------------------------------------------------------------------------------------


class Recording:
    """Risk 10 without a source, 10 + source with it; keeps what it was asked."""

    def __init__(self):
        self.calls = []

    def __call__(self, source, target, seed):
        self.calls.append((source, target, seed))
        return 10.0 + seed / 8 + (0.0 if source is None else source)


def test_measure_pairs_runs_by_seed():
    algorithm = Recording()
    found = gs.NegativeTransferGap(algorithm, seeds=[3, 5]).measure(2.0, "target")
    assert found == gs.GapResult((3, 5), (12.375, 12.625), (10.375, 10.625))
    assert found.gaps == (2.0, 2.0)
    assert algorithm.calls == [(source, "target", seed) for source in (None, 2.0) for seed in (3, 5)]


def test_a_sweep_runs_the_target_alone_once():
    algorithm = Recording()
    curve = gs.NegativeTransferGap(algorithm, seeds=range(3), confidence=0.9).sweep({0.5: 1.0, 0.0: -1.0}, None)
    assert len(algorithm.calls) == 9
    assert sum(source is None for source, _, _ in algorithm.calls) == 3
    assert curve.epsilons == (0.0, 0.5)
    assert [each.gap for each in curve.results] == [-1.0, 1.0]
    assert curve.results[0].target_only == curve.results[1].target_only == (10.0, 10.125, 10.25)
    assert curve.results[0].confidence == 0.9
    lines = str(curve).splitlines()
    assert len(lines) == 3
    assert lines[1].split()[:4] == ["0", "9.125", "10.12", "-1"]
    assert lines[2].endswith("yes")


def test_sources_that_are_close_are_several():
    curve = gs.NegativeTransferGap(Recording(), seeds=range(2)).sweep({1_000_000: 1.0, 1_000_001: 2.0}, None)
    assert [each.gap for each in curve.results] == [1.0, 2.0]
    assert [line.split()[0] for line in str(curve).splitlines()[1:]] == ["1000000", "1000001"]


def test_curves_are_saved_and_loaded(tmp_path):
    curve = gs.NegativeTransferGap(Recording(), seeds=range(3)).sweep({0.1: 1 / 3, 1.0: 0.0}, None)
    curve.save(tmp_path / "curve.json")
    assert gs.GapCurve.load(tmp_path / "curve.json") == curve
    seeds = gs.NegativeTransferGap(Recording(), seeds=np.arange(3)).sweep({0.1: 1 / 3, 1.0: 0.0}, None)
    seeds.save(tmp_path / "seeds.json")  # integers of NumPy are no JSON
    assert gs.GapCurve.load(tmp_path / "seeds.json") == curve
    (tmp_path / "other.json").write_text("[]")
    with pytest.raises(ValueError, match=r"no file that GapCurve\.save wrote"):
        gs.GapCurve.load(tmp_path / "other.json")


def test_a_curve_is_drawn():
    import matplotlib

    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    algorithm = lambda source, target, seed: (source or 0.0) * (1 + seed)  # noqa: E731
    curve = gs.NegativeTransferGap(algorithm, seeds=range(3)).sweep({0.0: -0.1, 1.0: 0.3}, None)
    ax = curve.plot(label="DANN")
    line, zero = ax.get_lines()
    assert line.get_xydata().tolist() == [[0.0, pytest.approx(-0.2)], [1.0, pytest.approx(0.6)]]
    assert list(zero.get_ydata()) == [0, 0]
    band = ax.collections[0].get_paths()[0].vertices[:, 1]
    assert band.max() == pytest.approx(curve.results[1].interval[1])
    assert curve.plot(ax) is ax
    alone = gs.NegativeTransferGap(algorithm, seeds=[0]).sweep({0.0: -0.1, 1.0: 0.3}, None)
    alone.plot(ax).figure.canvas.draw()  # without a band
    plt.close(ax.figure)


def test_risks_may_be_tensors_and_arrays_of_one_number():
    for number in (torch.tensor(2.5), np.float32(2.5), np.array(2.5), 2.5):
        assert gs.NegativeTransferGap(lambda s, t, seed, n=number: n, seeds=[0]).measure(1, 1).with_source == (2.5,)


@pytest.mark.parametrize("risk", [math.nan, math.inf, "low", None, torch.ones(2), 1j])
def test_risks_that_are_no_numbers_are_named(risk):
    algorithm = lambda source, target, seed: risk if source and seed == 1 else 0.0  # noqa: E731
    with pytest.raises(ValueError, match=r"The risk with the source at 0\.5 and seed 1 must be (finite|a number)\. Found"):
        gs.NegativeTransferGap(algorithm, seeds=[0, 1]).sweep({0.5: "source"}, None)


def test_an_algorithm_that_fails_is_named():
    def algorithm(source, target, seed):
        raise KeyError("labels")

    with pytest.raises(RuntimeError, match=r"failed with no source and seed 0: KeyError: 'labels'"):
        gs.NegativeTransferGap(algorithm).measure("source", "target")


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"algorithm": 3}, "must be a function"),
        ({"seeds": []}, "`seeds` must be distinct whole numbers, at least one"),
        ({"seeds": [0, 0.5]}, r"whole numbers, at least one\. Found \(0, 0\.5\)"),
        ({"seeds": [1, 1]}, "`seeds`"),
        ({"jobs": 0}, "`jobs`"),
        ({"confidence": 1.0}, "`confidence`"),
    ],
)
def test_settings_are_checked(given, message):
    with pytest.raises(ValueError, match=message):
        gs.NegativeTransferGap(**{"algorithm": min, **given})


def test_no_source_is_no_source():
    with pytest.raises(ValueError, match="stands for no source"):
        gs.NegativeTransferGap(Recording()).measure(None, 1)
    with pytest.raises(ValueError, match="at least one"):
        gs.NegativeTransferGap(Recording()).sweep({}, 1)


def test_scipy_is_asked_for(monkeypatch):
    monkeypatch.setitem(sys.modules, "scipy", None)
    with pytest.raises(ImportError, match=r"gradsurgery\[transfer\]"):
        gs.NegativeTransferGap(Recording())


# --- Processes and the cache ------------------------------------------------------------------------------------------

LIGHT = """
import os
from pathlib import Path

def algorithm(source, target, seed):
    with open(Path(target) / "calls", "a") as file:
        file.write(f"{os.getpid()}\\n")
    if source == "fails" and seed == 1:
        raise OSError("no data")
    return seed + (1.5 if source else 1.0)

class Algorithm:
    def __call__(self, source, target, seed):
        return seed + (1.5 if source else 1.0)
"""


@pytest.fixture
def light(tmp_path, monkeypatch):
    """A module that child processes import fast, and the folder that it counts its calls in."""
    (tmp_path / "light.py").write_text(LIGHT)
    monkeypatch.syspath_prepend(str(tmp_path))
    import light

    yield light, str(tmp_path)
    del sys.modules["light"]


def calls(folder):
    with open(f"{folder}/calls") as file:
        return file.read().split()


def test_processes_give_the_same(light):
    module, folder = light
    found = gs.NegativeTransferGap(module.algorithm, seeds=range(3), jobs=2).measure("source", folder)
    assert found == gs.NegativeTransferGap(module.algorithm, seeds=range(3)).measure("source", folder)
    assert len(set(calls(folder)[:6])) <= 2
    assert len(calls(folder)) == 12
    with pytest.raises(RuntimeError, match="failed with the source and seed 1: OSError: no data"):
        gs.NegativeTransferGap(module.algorithm, seeds=range(2), jobs=2).measure("fails", folder)


def test_what_cannot_be_pickled_is_named(tmp_path):
    local = lambda source, target, seed: 0.0  # noqa: E731
    with pytest.raises(ValueError, match=r"`algorithm` must be picklable, since other processes get it\. .*top level"):
        gs.NegativeTransferGap(local, jobs=2).measure(1, 1)
    with pytest.raises(ValueError, match=r"`target` must be picklable, since the cache's keys are made of it"):
        gs.NegativeTransferGap(min, cache=tmp_path).measure(1, local)
    with pytest.raises(ValueError, match=r"^the source at 0\.5 must be picklable"):
        gs.NegativeTransferGap(min, cache=tmp_path).sweep({0.5: local}, 1)


def test_runs_are_kept(light, tmp_path):
    module, folder = light
    measure = lambda seeds, source="source": gs.NegativeTransferGap(  # noqa: E731
        module.algorithm, seeds=seeds, cache=tmp_path / "cache"
    ).measure(source, folder)
    first = measure(range(2))
    assert len(calls(folder)) == 4
    assert measure(range(2)) == first
    assert len(calls(folder)) == 4
    assert measure(range(3)).seeds == (0, 1, 2)  # more seeds: two more runs
    assert len(calls(folder)) == 6
    measure(range(3), "other")  # another source: the runs without one are there
    assert len(calls(folder)) == 9
    files = list((tmp_path / "cache").iterdir())
    assert len(files) == 9
    assert all(len(file.stem) == 64 and set(json.loads(file.read_text())) == {"risk"} for file in files)


def test_an_interrupted_measurement_continues(light, tmp_path):
    module, folder = light
    ntg = gs.NegativeTransferGap(module.algorithm, seeds=range(2), cache=tmp_path / "cache")
    with pytest.raises(RuntimeError, match="no data"):
        ntg.measure("fails", folder)
    assert len(calls(folder)) == 4
    with pytest.raises(RuntimeError, match="no data"):
        ntg.measure("fails", folder)
    assert len(calls(folder)) == 5  # the one that failed


def test_keys_are_of_data_code_and_arguments(light, tmp_path):
    from functools import partial

    module, folder = light
    key = lambda algorithm, source, target: gs.NegativeTransferGap(  # noqa: E731
        algorithm, seeds=[0], cache=tmp_path
    )._key(gap._Run("", source, target, 0))
    data = (torch.randn(50, 3), torch.arange(50))
    copied = tuple(tensor.clone() for tensor in data)
    changed = (data[0] + 0.0, data[1].roll(1))
    found = [
        key(module.algorithm, data, folder),
        key(module.algorithm, changed, folder),
        key(module.algorithm, None, folder),
        key(module.algorithm, data, "elsewhere"),
        key(partial(module.algorithm, seed=1), data, folder),
        key(partial(module.algorithm, seed=2), data, folder),
    ]
    assert len(set(found)) == 6
    assert key(module.algorithm, copied, folder) == found[0]
    called = key(module.Algorithm(), data, folder)
    source = (tmp_path / "light.py").read_text().replace("1.5", "2.5")
    (tmp_path / "light.py").write_text(source)
    import importlib
    import linecache

    linecache.checkcache()
    changed_module = importlib.reload(module)
    assert key(changed_module.algorithm, data, folder) != found[0]
    assert key(changed_module.Algorithm(), data, folder) != called  # the text of an object's class
