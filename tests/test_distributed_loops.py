"""Lightning, Accelerate and the Trainer with two processes, against one optimizer on all samples."""

import os
import warnings

import pytest
import torch
from conftest import Bent
from torch import nn

import gradsurgery as gs

pytestmark = pytest.mark.distributed

STEPS = 4


def inputs(rank, count):
    """Of all steps: the samples of one rank, or of all."""
    x = torch.randn(STEPS, 2, 6, 4, generator=torch.Generator().manual_seed(1))
    return x.flatten(1, 2) if count == 1 else x[:, rank]


def new():
    torch.manual_seed(2)
    return Bent()


def surgery(model, **settings):
    return gs.SurgeryOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), gs.PCGrad(), model=model, seed=3, **settings)


def one_process():
    model = new()
    opt = surgery(model)
    for x in inputs(0, 1):
        opt.backward(model.losses(x))
        opt.step()
        opt.zero_grad()
    return [parameter.detach() for parameter in model.parameters()]


def environment(rank):
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": "2",
        "LOCAL_WORLD_SIZE": "2",
        "GROUP_RANK": "0",
    }
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1", "TORCHELASTIC_RUN_ID": "tests"}  # a group is there


def in_lightning(rank):
    environment(rank)
    import lightning.pytorch as pl
    from lightning.pytorch.plugins.environments import TorchElasticEnvironment
    from lightning.pytorch.strategies import DDPStrategy

    from gradsurgery.integrations.lightning import SurgeryModule

    warnings.simplefilter("ignore")  # those of the framework: it has tests of its own

    class Module(SurgeryModule):
        def __init__(self):
            super().__init__()
            self.model = new()

        def training_step(self, x, index):
            return self.joint_loss(self.model.losses(x[0]))

        def configure_optimizers(self):
            return surgery(self, process_group=True)

    module = Module()
    trainer = pl.Trainer(
        accelerator="cpu",
        devices=2,
        strategy=DDPStrategy(cluster_environment=TorchElasticEnvironment(), process_group_backend="gloo"),
        max_epochs=1,
        use_distributed_sampler=False,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, torch.utils.data.DataLoader(inputs(rank, 2)))
    return [parameter.detach() for parameter in module.model.parameters()]


class Called(nn.Module):
    """As the losses are computed in the wrapper's forward pass."""

    def __init__(self):
        super().__init__()
        self.model = new()

    def forward(self, x):
        return self.model.losses(x.reshape(-1, 4))


def in_accelerate(rank, prepared):
    environment(rank)
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState, GradientState

    from gradsurgery.integrations.accelerate import joint_loss

    warnings.simplefilter("ignore")  # those of the framework: it has tests of its own

    try:
        accelerator = Accelerator(cpu=True)
        plain = Called()
        model = accelerator.prepare(plain)
        opt = accelerator.prepare(surgery(model) if prepared else surgery(plain, process_group=True))
        for x in inputs(rank, 2):
            accelerator.backward(joint_loss(accelerator, opt, model(x)))
            opt.step()
            opt.zero_grad()
        return [parameter.detach() for parameter in plain.parameters()]
    except ValueError as error:
        return str(error)
    finally:
        AcceleratorState._reset_state(reset_partial_state=True)
        GradientState._reset_state()


def in_trainer(rank, folder):
    environment(rank)
    from accelerate.state import AcceleratorState, GradientState
    from transformers import TrainingArguments

    from gradsurgery.integrations.transformers import SurgeryTrainer

    warnings.simplefilter("ignore")  # those of the framework: it has tests of its own

    class Losses(SurgeryTrainer):
        def compute_task_losses(self, model, inputs, task_ids):
            return model(**inputs)

    try:
        model = Called()
        settings = {"report_to": "none", "disable_tqdm": True, "use_cpu": True, "save_strategy": "no", "max_grad_norm": 0.0}
        settings |= {"per_device_train_batch_size": 1, "max_steps": STEPS, "lr_scheduler_type": "constant"}
        data = [{"x": x} for both in zip(inputs(0, 2), inputs(1, 2), strict=True) for x in both]  # a rank takes every other
        args = TrainingArguments(folder, train_sampling_strategy="sequential", **settings)
        sgd = torch.optim.SGD(model.parameters(), lr=0.1)
        opt = gs.SurgeryOptimizer(sgd, gs.PCGrad(), model=model, seed=3, process_group=True)
        Losses(model, args, train_dataset=data, rule=gs.PCGrad(), optimizers=(opt, None)).train()
        return [parameter.detach() for parameter in model.parameters()]
    finally:
        AcceleratorState._reset_state(reset_partial_state=True)
        GradientState._reset_state()


def check(found):
    for ours in found:
        for a, b in zip(ours, one_process(), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_lightning(ranks):
    check(ranks(2, in_lightning))


def test_accelerate(ranks):
    check(ranks(2, in_accelerate, True))


def test_accelerate_says_what_to_prepare_first(ranks):
    for found in ranks(2, in_accelerate, False):
        assert "make the SurgeryOptimizer with the prepared model" in found


def test_trainer(ranks, tmp_path):
    check(ranks(2, in_trainer, str(tmp_path)))
