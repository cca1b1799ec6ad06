import numpy as np
import pytest
import torch
from torch import nn

import gradsurgery as gs

TASKS = ("a", "b", "c")


def trained(rule=None, steps=5, seed=0, absent=(), **options):
    """A small model trained on three tasks; returns its recorder and the steps as the optimizer saw them."""
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 3))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    opt = gs.SurgeryOptimizer(optimizer, rule or gs.PCGrad(), model=model, groups="layer", tasks=TASKS)
    recorder = gs.Recorder(opt, **options)
    seen = []
    for number in range(steps):
        out = model(torch.randn(8, 3))
        losses = {task: out[:, k].square().mean() for k, task in enumerate(TASKS)}
        opt.backward({task: loss for task, loss in losses.items() if (number, task) not in absent})
        opt.step()
        opt.zero_grad()
        seen.append(opt.last)
    return recorder, seen


def test_records_what_each_step_saw():
    recorder, seen = trained()
    assert recorder.tasks == TASKS
    assert recorder.groups == ("0", "2")
    np.testing.assert_array_equal(recorder.steps, range(5))
    for t, step in enumerate(seen):
        np.testing.assert_array_equal(recorder.cosines[t], step.cosines.float().numpy())
        np.testing.assert_array_equal(recorder.operated[t], step.operated.numpy())
        np.testing.assert_array_equal(recorder.conflicts[t], step.conflicts.numpy())
        np.testing.assert_array_equal(recorder.losses[t], step.losses.float().numpy())


def test_rates_are_shares_of_the_measured_pairs():
    recorder, seen = trained(absent={(1, "c"), (3, "c")})
    pairs = sum(int(step.pairs.sum()) for step in seen)
    assert pairs == (3 * 6 + 2 * 2) * 2
    assert recorder.conflict_rate() == sum(int(step.conflicts.sum()) for step in seen) / pairs
    assert recorder.operation_rate() == sum(int(step.operated.sum()) for step in seen) / pairs
    assert 0 < recorder.conflict_rate() < 1
    last = sum(int(step.conflicts[1].sum()) for step in seen) / (pairs / 2)
    assert recorder.conflict_rate(["2"]) == last


def test_absent_tasks_and_groups_are_nan():
    recorder, _ = trained(absent={(0, "c"), (1, "a"), (1, "b")})
    assert np.isnan(recorder.losses[0, 2])
    assert np.isnan(recorder.cosines[0, :, 2]).all()
    assert np.isfinite(recorder.cosines[0, :, 0, 1]).all()
    assert np.isnan(recorder.cosines[1]).all()  # one task alone: nothing was operated on
    assert not recorder.operated[1].any()


def test_every_nth_step():
    recorder, _ = trained(steps=7, every=3, start=10)
    np.testing.assert_array_equal(recorder.steps, [12, 15])


def test_a_step_without_a_combination_is_not_recorded_twice():
    model = nn.Linear(2, 2)
    opt = gs.SurgeryOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), gs.Sum(), model=model)
    recorder = gs.Recorder(opt)
    opt.backward(list(model(torch.ones(1, 2))[0]))
    for _ in range(3):
        opt.step()
    np.testing.assert_array_equal(recorder.steps, [0])


def test_long_recordings_are_fetched_in_parts():
    recorder, seen = trained(steps=70)
    assert len(recorder._pending) < len(seen)
    assert len(recorder.steps) == 70
    np.testing.assert_array_equal(recorder.cosines[-1], seen[-1].cosines.float().numpy())


def test_save_and_load(tmp_path):
    recorder, _ = trained(absent={(2, "b")})
    recorder.save(tmp_path / "recording.npz")
    loaded = gs.Recorder.load(tmp_path / "recording.npz")
    assert (loaded.tasks, loaded.groups) == (recorder.tasks, recorder.groups)
    for name in ("steps", "cosines", "operated", "losses"):
        np.testing.assert_array_equal(getattr(loaded, name), getattr(recorder, name))
    assert repr(loaded) == "Recorder(5 steps, 3 tasks, 2 groups)"


def test_writer_gets_every_recorded_step():
    written = {}

    class Writer:
        def add_scalar(self, tag, value, step):
            written.setdefault(tag, []).append((step, value))

    recorder, seen = trained(writer=Writer())
    recorder.flush()
    assert set(written) == {f"surgery/loss/{t}" for t in TASKS} | {
        f"surgery/{what}/{group}" for what in ("cosine", "conflict", "operated") for group in ("0", "2")
    }
    steps, shares = zip(*written["surgery/conflict/0"], strict=True)
    assert steps == tuple(range(5))
    np.testing.assert_allclose(shares, [int(step.conflicts[0].sum()) / 6 for step in seen])


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of tensorboard's own dependencies
def test_tensorboard_writer(tmp_path):
    tensorboard = pytest.importorskip("torch.utils.tensorboard")
    with tensorboard.SummaryWriter(str(tmp_path)) as writer:
        recorder, _ = trained(writer=writer)
        recorder.flush()
    (file,) = tmp_path.iterdir()
    assert b"surgery/cosine/2" in file.read_bytes()


def test_bad_input_says_what_to_do():
    recorder, _ = trained(steps=1)
    with pytest.raises(ValueError, match=r"No surgery group matches 'decoder'. The recording has 0, 2"):
        recorder.conflict_rate(["decoder"])
    with pytest.raises(ValueError, match="`every` must be at least 1. Found every=0"):
        gs.Recorder(every=0)
    other = gs.Recorder()
    model = nn.Linear(2, 2)
    opt = gs.SurgeryOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), gs.Sum(), model=model)
    opt.backward(list(model(torch.ones(1, 2))[0]))
    opt.step()
    other.record(opt.last)
    other.tasks = ("x", "y")
    with pytest.raises(ValueError, match="the same tasks throughout"):
        other.record(opt.last)


def test_empty_recording():
    recorder = gs.Recorder()
    assert np.isnan(recorder.conflict_rate())
    assert np.isnan(recorder.operation_rate())
    assert recorder.cosines.shape == (0, 0, 0, 0)
    assert recorder.losses.shape == (0, 0)
