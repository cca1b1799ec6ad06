import builtins

import matplotlib
import numpy as np
import pytest
from test_recorder import TASKS, trained

import gradsurgery as gs

matplotlib.use("Agg")


@pytest.fixture(scope="module")
def recorder():
    return trained(steps=40)[0]


@pytest.fixture(autouse=True)
def closed():
    yield
    import matplotlib.pyplot as plt

    plt.close("all")


def test_heatmap_shows_the_mean_cosines_in_the_order_of_families(recorder, tmp_path):
    families = {"a": "first", "b": "second", "c": "first"}
    ax = gs.plots.cosine_heatmap(recorder, families=families)
    shown = ax.images[0].get_array()
    assert [label.get_text() for label in ax.get_xticklabels()] == ["a", "c", "b"]
    with np.errstate(all="ignore"):
        expected = recorder.cosines.astype(np.float64).mean((0, 1))[np.ix_([0, 2, 1], [0, 2, 1])]
    np.testing.assert_allclose(np.ma.filled(shown, np.nan), expected, atol=1e-6)
    assert [(patch.get_x(), patch.get_width()) for patch in ax.patches] == [(-0.5, 2), (1.5, 1)]
    ax.figure.savefig(tmp_path / "heatmap.png")
    assert (tmp_path / "heatmap.png").stat().st_size > 5000


def test_heatmap_of_some_groups_and_tasks(recorder):
    ax = gs.plots.cosine_heatmap(recorder, groups=["2"], order=["c", "a"])
    shown = np.ma.filled(ax.images[0].get_array(), np.nan)
    np.testing.assert_allclose(shown[0, 1], recorder.cosines[:, 1, 2, 0].mean(), rtol=1e-5)


def test_similarity_draws_a_line_for_each_group(recorder):
    ax = gs.plots.similarity(recorder, window=1)
    lines = {line.get_label(): line.get_ydata() for line in ax.lines if not line.get_label().startswith("_")}
    assert list(lines) == ["0", "2"]
    np.testing.assert_allclose(lines["0"], np.nanmean(recorder.cosines[:, 0], (1, 2)), rtol=1e-5)


def test_similarity_of_pairs_is_smoothed(recorder):
    ax = gs.plots.similarity(recorder, pairs=[("a", "b"), ("b", "c")], groups=["0"], window=3)
    lines = {line.get_label(): line.get_ydata() for line in ax.lines if not line.get_label().startswith("_")}
    assert list(lines) == ["0: a, b", "0: b, c"]
    raw = recorder.cosines[:, 0, 0, 1]
    np.testing.assert_allclose(lines["0: a, b"][1:-1], (raw[:-2] + raw[1:-1] + raw[2:]) / 3, rtol=1e-5)


def test_operations_counts_pairs(recorder):
    vaccine = trained(gs.GradVac(beta=0.1), steps=40)[0]
    ax = gs.plots.operations({"PCGrad": recorder, "GradVac": vaccine}, window=1)
    np.testing.assert_array_equal(ax.lines[0].get_ydata(), recorder.operated.sum((1, 2, 3)))
    np.testing.assert_array_equal(ax.lines[1].get_ydata(), vaccine.operated.sum((1, 2, 3)))
    assert ax.lines[0].get_label().startswith("PCGrad (")


def test_draws_on_given_axes(recorder):
    import matplotlib.pyplot as plt

    _, axes = plt.subplots(1, 3)
    assert gs.plots.cosine_heatmap(recorder, ax=axes[0]) is axes[0]
    assert gs.plots.similarity(recorder, ax=axes[1]) is axes[1]
    assert gs.plots.operations({"": recorder}, ax=axes[2]) is axes[2]


def test_bad_input_says_what_to_do(recorder, monkeypatch):
    with pytest.raises(ValueError, match=r"no task 'x'. It has \['a', 'b', 'c'\]"):
        gs.plots.cosine_heatmap(recorder, order=["a", "x"])
    assert recorder.tasks == TASKS

    def without_matplotlib(name, *args, **kwargs):
        if name.startswith("matplotlib"):
            raise ImportError(name)
        return imported(name, *args, **kwargs)

    imported = builtins.__import__
    monkeypatch.setattr(builtins, "__import__", without_matplotlib)
    with pytest.raises(ImportError, match=r'pip install "gradsurgery\[plots\]"'):
        gs.plots.similarity(recorder)


def test_transference_is_drawn():
    steps = np.ones((1, 3, 3))
    steps[0, 2, 0] = 0  # "c" never met "a"
    total = np.arange(9.0).reshape(1, 3, 3) - 4
    ax = gs.plots.transference(gs.TransferMatrix(("a", "b", "c"), ("model",), total, total, steps), order=["c", "a"])
    drawn = np.ma.filled(np.ma.masked_invalid(ax.get_images()[0].get_array()), np.nan)
    np.testing.assert_array_equal(drawn, [[np.nan, np.nan], [-2, np.nan]])  # without what a task does for itself
    assert [tick.get_text() for tick in ax.get_yticklabels()] == ["c", "a"]
    assert (ax.get_xlabel(), ax.get_ylabel()) == ("target", "source")
    assert [text.get_text() for text in ax.texts] == ["-2"]
