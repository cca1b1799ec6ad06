"""Checkpoints: a new process continues bit for bit, and a checkpoint that does not fit says why."""

import copy
import io
import os
import signal
import subprocess
import sys
import time

import pytest
import torch
from conftest import Bent, Heads, check_same, wrap
from torch import nn

import gradsurgery as gs

RULES = [gs.PCGrad(), gs.GradVac(beta=0.3), gs.Chain(gs.PCGrad(), gs.GradVac(beta=0.3), gs.Mean()), gs.MGDA()]


def batch(step):
    return torch.randn(8, 4, generator=torch.Generator().manual_seed(step))


def train(model, opt, steps, start=0):
    for number in range(start, start + steps):
        opt.backward(model.losses(batch(number)))
        opt.step()
        opt.zero_grad()


def saved_and_loaded(value):
    file = io.BytesIO()
    torch.save(value, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def check_equal_trees(tree, other):
    if isinstance(tree, dict):
        assert tree.keys() == other.keys()
        for key, value in tree.items():
            check_equal_trees(value, other[key])
    elif isinstance(tree, (list, tuple)):
        assert len(tree) == len(other)
        for value, twin in zip(tree, other, strict=True):
            check_equal_trees(value, twin)
    elif isinstance(tree, torch.Tensor):
        assert torch.equal(tree, other)
    else:
        assert tree == other


def test_what_is_in_it():
    model = Bent()
    opt = wrap(model, gs.GradVac(), groups="tensor")
    train(model, opt, 1)
    state = opt.state_dict()
    assert set(state) == {"state", "param_groups", "surgery"}
    assert set(state["surgery"]) == {"rule", "tasks", "groups", "state", "generator", "skipped", "reuse"}
    assert state["surgery"]["tasks"] == ["a", "b", "c"]
    assert state["surgery"]["groups"] == {group: list(names) for group, names in opt.groups.items()}
    inner = opt.optimizer.state_dict()
    assert {key: state[key] for key in inner} == inner


@pytest.mark.parametrize("rule", RULES, ids=repr)
@pytest.mark.parametrize("named", [True, False])
def test_round_trip(rule, named):
    make = lambda m: wrap(  # noqa: E731
        m, rule, torch.optim.AdamW(m.parameters(), lr=0.01), groups="tensor", tasks=m.tasks if named else None, seed=4
    )
    model = Bent()
    opt = make(model)
    train(model, opt, 4)
    saved = saved_and_loaded({"model": model.state_dict(), "opt": opt.state_dict()})
    torch.manual_seed(9)
    twin = Bent()
    other = make(twin)
    twin.load_state_dict(saved["model"])
    other.load_state_dict(saved["opt"])
    assert other.tasks == ("a", "b", "c")  # adopted where they were not given
    check_equal_trees(other.state_dict(), opt.state_dict())
    train(model, opt, 4, start=4)
    train(twin, other, 4, start=4)
    check_same(model, twin)
    check_equal_trees(other.state_dict(), opt.state_dict())


def test_a_checkpoint_is_not_changed_by_training_on():
    model = Bent()
    opt = wrap(model, gs.GradVac(beta=0.5))
    train(model, opt, 2)
    saved = opt.state_dict()["surgery"]
    before = copy.deepcopy(saved)
    train(model, opt, 2)
    check_equal_trees(saved, before)
    opt.load_state_dict({**opt.optimizer.state_dict(), "surgery": saved})
    train(model, opt, 2)
    check_equal_trees(saved, before)


def test_going_back_to_a_checkpoint():
    model = Bent()
    opt = wrap(model, gs.GradVac(beta=0.5))
    start = copy.deepcopy((model.state_dict(), opt.state_dict()))  # before the tasks are known
    results = []
    for _ in range(2):
        train(model, opt, 3)
        results.append(copy.deepcopy((model.state_dict(), opt.rule_state)))
        model.load_state_dict(start[0])
        opt.load_state_dict(start[1])
    check_equal_trees(results[1], results[0])


def test_a_checkpoint_on_another_device_type_or_in_another_dtype_is_converted():
    model = Bent()
    opt = wrap(model, gs.GradVac(beta=0.5))
    train(model, opt, 2)
    saved = opt.state_dict()
    saved["surgery"]["state"] = {"target": saved["surgery"]["state"]["target"].float()}
    opt.load_state_dict(saved)
    assert opt.rule_state["target"].dtype == torch.float64


# --- A process that is killed -----------------------------------------------------------------------------------------

SCRIPT = """
import os, sys, time
import torch
from torch import nn
import gradsurgery as gs

path, steps, then = sys.argv[1], int(sys.argv[2]), sys.argv[3]
torch.set_num_threads(1)
torch.manual_seed(os.getpid())  # nothing may depend on the global generator, but for the initial parameters

def new(rule):
    model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 4))
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.5, generator=generator)
    inner = torch.optim.AdamW(model.parameters(), lr=1e-2)
    return model, gs.SurgeryOptimizer(inner, rule, model=model, groups="layer", seed=7)

runs = [new(gs.PCGrad()), new(gs.GradVac(beta=0.2))]
start = 0
if os.path.exists(path):
    saved = torch.load(path, weights_only=True)
    start = saved["step"]
    for (model, opt), state in zip(runs, saved["runs"]):
        model.load_state_dict(state["model"])
        opt.load_state_dict(state["opt"])
print("from", start, flush=True)

for step in range(start, steps):
    x = torch.randn(8, 4, generator=torch.Generator().manual_seed(step))
    for model, opt in runs:
        out = model(x)
        opt.backward({f"task {k}": ((-1) ** k * out[:, k] + out.sum(1) - k).square().mean() for k in range(4)})
        if then == "hang":
            time.sleep(0.005)
        opt.step()
        opt.zero_grad()
    saved = {"step": step + 1, "runs": [{"model": m.state_dict(), "opt": o.state_dict()} for m, o in runs]}
    torch.save(saved, path + ".new")
    os.replace(path + ".new", path)

if then == "hang":
    time.sleep(600)
"""


def test_a_killed_process_is_continued_bit_for_bit(tmp_path):
    script = tmp_path / "train.py"
    script.write_text(SCRIPT)

    def start(name, steps, then):
        command = [sys.executable, "-W", "error", str(script), str(tmp_path / name), str(steps), then]
        return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)

    whole = start("whole.pt", 60, "end")
    killed = start("killed.pt", 40, "hang")
    try:
        deadline = time.monotonic() + 120
        while not (tmp_path / "killed.pt").exists():
            assert killed.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.01)
        time.sleep(0.05)
    finally:
        os.kill(killed.pid, signal.SIGKILL)
        killed.communicate()
    assert killed.returncode == -signal.SIGKILL
    resumed = start("killed.pt", 60, "end")
    assert 1 <= int(resumed.communicate(timeout=120)[0].split()[1]) <= 40
    assert whole.communicate(timeout=120)[0] == "from 0\n"
    assert (whole.returncode, resumed.returncode) == (0, 0)
    expected, found = (torch.load(tmp_path / name, weights_only=True) for name in ("whole.pt", "killed.pt"))
    assert expected["runs"][1]["opt"]["surgery"]["state"]["target"].any()
    check_equal_trees(found, expected)


# --- What does not fit ------------------------------------------------------------------------------------------------


def trained(model=None, rule=None, **settings):
    model = model or Bent()
    opt = wrap(model, rule or gs.GradVac(beta=0.5), torch.optim.Adam(model.parameters(), lr=0.01), **settings)
    train(model, opt, 2)
    return opt


class Renamed(Bent):
    """The same tasks in another order, or others."""

    def __init__(self, names):
        super().__init__()
        self.tasks = tuple(names)


class Fewer(Bent):
    """Without the second bias."""

    def __init__(self):
        super().__init__()
        self.layers[2] = nn.Linear(6, 3, bias=False)


MISFITS = {
    "another rule": (
        lambda: trained(rule=gs.PCGrad()),
        r"checkpoint's rule is PCGrad\(.*, this optimizer's is GradVac\(beta=0.5.*opt\.optimizer\.load_state_dict",
    ),
    "another setting": (
        lambda: trained(rule=gs.GradVac(beta=0.25)),
        r"checkpoint's rule is GradVac\(beta=0.25.*this optimizer's is GradVac\(beta=0.5",
    ),
    "other tasks": (
        lambda: trained(Renamed("abd")),
        r"only the checkpoint has 'd'; only this optimizer has 'c'.*has \['a', 'b', 'd'\], .* has \['a', 'b', 'c'\]",
    ),
    "more tasks": (lambda: trained(Bent("abcd")), r"only the checkpoint has 'd'\."),
    "another order of tasks": (
        lambda: trained(Renamed("bac")),
        r"tasks are not this optimizer's: they are in another order.*\['b', 'a', 'c'\]",
    ),
    "other groups": (
        lambda: trained(groups="layer"),
        r"groups are not .*: only the checkpoint has 'layers\.0', 'layers\.2'; only this optimizer has 'model'",
    ),
    "a group less": (
        lambda: trained(groups={"model": ["layers.0.*"]}),
        r"groups are not this optimizer's: only the checkpoint has '\(rest\)'\.",
    ),
    "another model": (lambda: trained(Fewer()), r"groups are not this optimizer's: 'model' hold other parameters"),
    "a plain optimizer": (
        lambda: trained().optimizer,
        r"plain optimizer: it has no entry 'surgery'.*opt\.optimizer\.load_state_dict",
    ),
}


@pytest.mark.parametrize("what", MISFITS)
def test_a_checkpoint_that_does_not_fit(what):
    make, message = MISFITS[what]
    saved = make().state_dict()
    torch.manual_seed(0)
    model = Bent()
    opt = trained(model)
    before = copy.deepcopy((model.state_dict(), opt.state_dict()))
    kept = copy.deepcopy(saved)
    with pytest.raises(ValueError, match=message):
        opt.load_state_dict(saved)
    check_equal_trees((model.state_dict(), opt.state_dict()), before)  # nothing was modified
    check_equal_trees(saved, kept)


def test_other_groups_of_the_inner_optimizer():
    model = Bent()
    saved = trained(model).state_dict()
    first, second = model.layers[0], model.layers[2]
    inner = torch.optim.Adam([{"params": first.parameters()}, {"params": second.parameters()}], lr=0.5)
    opt = wrap(model, gs.GradVac(beta=0.5), inner)
    before = copy.deepcopy(opt.state_dict())
    with pytest.raises(ValueError, match="different number of parameter groups"):
        opt.load_state_dict(saved)
    check_equal_trees(opt.state_dict(), before)
    assert opt.tasks is None


def test_a_state_of_another_shape():
    opt = trained()
    saved = copy.deepcopy(opt.state_dict())
    before = copy.deepcopy(saved)
    saved["surgery"]["state"]["target"] = torch.zeros(1, 2, 2)
    with pytest.raises(ValueError, match=r"rule state 'target' has shape \(1, 2, 2\), expected \(1, 3, 3\)"):
        opt.load_state_dict(saved)
    saved["surgery"]["state"] = {"other": torch.zeros(1)}
    with pytest.raises(ValueError, match=r"rule state has entries \['other'\], expected \['target'\]"):
        opt.load_state_dict(saved)
    check_equal_trees(opt.state_dict(), before)


def test_surgery_starts_from_a_plain_checkpoint():
    plain = Heads()
    inner = torch.optim.Adam(plain.parameters(), lr=0.01)
    sum(plain.losses(batch(0)).values()).backward()
    inner.step()
    model = copy.deepcopy(plain)
    opt = wrap(model, gs.PCGrad(), torch.optim.Adam(model.parameters(), lr=0.5))
    opt.optimizer.load_state_dict(saved_and_loaded(inner.state_dict()))
    assert opt.param_groups[0]["lr"] == 0.01
    check_equal_trees({k: opt.state_dict()[k] for k in ("state", "param_groups")}, inner.state_dict())
    train(model, opt, 1)
