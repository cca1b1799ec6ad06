"""Saved on some ranks, continued on others."""

import pytest
import torch
import torch.distributed.checkpoint as dcp
from conftest import TASKS, Bent, batch
from test_checkpoint import check_equal_trees
from torch import nn
from torch.distributed.checkpoint.state_dict import get_model_state_dict
from torch.distributed.fsdp import fully_shard

import gradsurgery as gs

pytestmark = [
    pytest.mark.distributed,
    pytest.mark.filterwarnings("ignore:torch.distributed is disabled"),  # DCP says so to one process
]

RULES = [gs.GradVac(beta=0.3), gs.Chain(gs.PCGrad(), gs.GradVac(beta=0.3, tasks=("a", "b")), gs.Mean())]


def new(how, rule, **settings):
    torch.manual_seed(3)
    model = Bent().double()
    if how == "fsdp":
        fully_shard(model.layers)
    elif how == "ddp":
        model = nn.parallel.DistributedDataParallel(model)
    adam = torch.optim.AdamW(model.parameters(), lr=1e-3)
    return model, gs.SurgeryOptimizer(adam, rule, model=model, groups="tensor", tasks=TASKS, seed=5, **settings)


def train(rank, how, rule, steps, path=None, load=None, **settings):
    """Four shares of each batch, dealt out to however many ranks there are."""
    ranks = torch.distributed.get_world_size() if torch.distributed.is_initialized() else 1
    model, opt = new(how, rule, **settings)
    if load is not None:
        with torch.random.fork_rng():
            state = {"training": gs.TrainingState(model, opt)}
            dcp.load(state, checkpoint_id=load, no_dist=ranks == 1)
    for step in steps:
        x = batch(step).double()
        opt.backward(getattr(model, "module", model).losses(x[rank * 8 // ranks : (rank + 1) * 8 // ranks]))
        opt.step()
        opt.zero_grad()
    if path is not None:
        dcp.save({"training": gs.TrainingState(model, opt)}, checkpoint_id=path, no_dist=ranks == 1)
    whole = get_model_state_dict(model)
    values = {n: p.full_tensor() if hasattr(p, "full_tensor") else p for n, p in whole.items()}
    return values, opt.rule_state, opt._surgery.generator.get_state(), opt.last.losses if opt.last else None


def close(found, expected):
    for name, value in expected[0].items():
        torch.testing.assert_close(found[0][name], value, rtol=1e-9, atol=1e-11)
    check_close(found[1], expected[1])
    assert torch.equal(found[2], expected[2])


def check_close(found, expected):
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        if isinstance(value, dict):
            check_close(found[key], value)
        else:
            torch.testing.assert_close(found[key], value, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("rule", RULES, ids=["gradvac", "chain"])
@pytest.mark.parametrize("how", ["ddp", "fsdp"])
def test_saved_on_four_ranks_and_continued_on_two_and_one(ranks, tmp_path, how, rule):
    path = str(tmp_path / "saved")
    expected = train(0, None, rule, range(8))
    ranks(4, train, how, rule, range(5), path)
    for found in ranks(2, train, how, rule, range(5, 8), None, path):
        close(found, expected)
    close(train(0, None, rule, range(5, 8), None, path), expected)
    for found in ranks(2, train, "ddp" if how == "fsdp" else "fsdp", rule, range(5, 8), None, path):
        close(found, expected)


def test_one_process_continues_bit_for_bit(tmp_path):
    for every in (1, 3):
        path = str(tmp_path / str(every))
        expected = train(0, None, RULES[0], range(8), every=every)
        train(0, None, RULES[0], range(5), path, every=every)
        found = train(0, None, RULES[0], range(5, 8), None, path, every=every)
        check_equal_trees(found[:3], expected[:3])


def test_what_does_not_fit_says_so(tmp_path):
    path = str(tmp_path / "saved")
    train(0, None, gs.PCGrad(), range(2), path)
    with pytest.raises(ValueError, match=r"checkpoint's rule is PCGrad\(.*, this optimizer's is MGDA"):
        train(0, None, gs.MGDA(), range(1), None, path)
    model = Bent()
    adam = torch.optim.AdamW(model.parameters())
    with pytest.raises(TypeError, match="must be a SurgeryOptimizer. Found AdamW"):
        gs.TrainingState(model, adam)
    with pytest.raises(ValueError, match="does not know the tasks yet"):
        gs.TrainingState(model, gs.SurgeryOptimizer(adam, gs.PCGrad(), model=model)).state_dict()
