"""Lightning's Trainer does what a plain loop does, bit for bit."""

import copy
import csv

import lightning.pytorch as pl
import pytest
import torch
from conftest import Bent, Heads, batch, check_same, wrap
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.plugins import MixedPrecision
from torch.utils.data import DataLoader

import gradsurgery as gs
from gradsurgery.integrations.lightning import SurgeryModule

pytestmark = [
    pytest.mark.filterwarnings("ignore:The 'train_dataloader' does not have many workers"),  # batches are in memory
    pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty"),  # resuming writes beside
    # Lightning's own call of PyTorch
    pytest.mark.filterwarnings("ignore:`isinstance.treespec, LeafSpec.` is deprecated:FutureWarning"),
]

RULE = gs.GradVac(beta=0.3)
BATCHES = 6


class Model(SurgeryModule):
    def __init__(self, model, rule=RULE, optimizer=torch.optim.Adam, **settings):
        super().__init__()
        self.model, self.rule, self.optimizer, self.settings = model, rule, optimizer, settings

    def training_step(self, x, index):
        return self.joint_loss(self.model.losses(x))

    def configure_optimizers(self):
        return wrap(self, self.rule, self.optimizer(self.parameters(), lr=0.01), **self.settings)


def fit(model, path, *, max_epochs=1, ckpt_path=None, **settings):
    settings.setdefault("logger", False)
    settings.setdefault("enable_checkpointing", False)
    trainer = pl.Trainer(
        accelerator="cpu",
        default_root_dir=path,
        max_epochs=max_epochs,
        enable_progress_bar=False,
        enable_model_summary=False,
        **settings,
    )
    trainer.fit(model, DataLoader([batch(i) for i in range(BATCHES)], batch_size=None), ckpt_path=ckpt_path)
    return trainer


class AtFeatures(Model):
    samples = None

    def training_step(self, x, index):
        z = self.model[0](x).tanh()
        losses = {"a": self.model[1](z).mean(), "b": self.model[2](z).square().mean()}
        return self.joint_loss(losses, samples=self.samples, features=z)


def test_surgery_at_features(tmp_path):
    model = AtFeatures(torch.nn.ModuleList([torch.nn.Linear(4, 3), torch.nn.Linear(3, 1), torch.nn.Linear(3, 1)]))
    fit(model, tmp_path, accumulate_grad_batches=2)
    assert model.surgery.last.groups == ("features",)
    model.samples = {"z": 2}
    with pytest.raises(ValueError, match="`samples` names 'z'"):
        fit(model, tmp_path)


def plain_loop(model, *, accumulate=1, clip=None, scaler=None, dtype=None, epochs=1):
    """The same by hand; returns the optimizer and the figures of each step."""
    opt = wrap(model, RULE, torch.optim.Adam(model.parameters(), lr=0.01))
    figures = []
    for _ in range(epochs):
        for i in range(BATCHES):
            with torch.autocast("cpu", dtype=dtype, enabled=dtype is not None):
                losses = model.losses(batch(i))
            opt.backward({task: loss / accumulate for task, loss in losses.items()}, scaler=scaler)
            if (i + 1) % accumulate and i + 1 < BATCHES:
                continue
            opt.combine()
            if scaler is not None:
                scaler.unscale_(opt)
            if clip is not None:
                torch.nn.utils.clip_grad_norm_(model.parameters(), clip)
            if scaler is not None:
                scaler.step(opt)
                scaler.update()
            else:
                opt.step()
            opt.zero_grad()
            figures.append(opt.last.figures())
    return opt, figures


@pytest.mark.parametrize("model_class", [Heads, Bent])
@pytest.mark.parametrize("accumulate", [1, 4])  # the last step of the epoch has two batches
@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed", "scaled"])
@pytest.mark.parametrize("clip", [None, 0.1])
def test_same_as_a_plain_loop(model_class, accumulate, precision, clip, tmp_path):
    model = model_class()
    twin = copy.deepcopy(model)
    settings = {"precision": precision}
    plain = {"dtype": torch.bfloat16 if precision == "bf16-mixed" else None}
    if precision == "scaled":
        plain["dtype"] = torch.float16
        plain["scaler"] = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=2)
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=2)
        settings = {"plugins": [MixedPrecision("16-mixed", "cpu", scaler=scaler)]}
    module = Model(model)
    fit(module, tmp_path, accumulate_grad_batches=accumulate, gradient_clip_val=clip, **settings)
    opt, _ = plain_loop(twin, accumulate=accumulate, clip=clip, **plain)
    check_same(model, twin)
    assert torch.equal(module.surgery.rule_state["target"], opt.rule_state["target"])
    assert module.surgery.last.figures() == opt.last.figures()
    if precision == "scaled":
        assert scaler.get_scale() == plain["scaler"].get_scale() > 2.0**10


def test_an_overflow_skips_the_step(tmp_path):
    class Overflow(Model):
        def training_step(self, x, index):
            losses = self.model.losses(x)
            return self.joint_loss({**losses, "b": losses["b"] * (torch.inf if index == 1 else 1)})

    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    module = Overflow(Bent())
    fit(module, tmp_path, plugins=[MixedPrecision("16-mixed", "cpu", scaler=scaler)], limit_train_batches=2)
    assert scaler.get_scale() == 2.0**9
    assert module.surgery.optimizer.state[next(module.parameters())]["step"] == 1
    assert all(parameter.isfinite().all() for parameter in module.parameters())


def test_mixed_batches(tmp_path):
    ids = torch.tensor([0, 1, 2, 0, 1, 2, 2, 0])

    class Mixed(Model):
        def training_step(self, x, index):
            with self.surgery.split(ids):
                losses = self.model.layers(x).square().mean(1)
            return self.joint_loss(losses)

    model = Bent()
    twin = copy.deepcopy(model)
    fit(Mixed(model, tasks=3, groups="tensor"), tmp_path)
    opt = wrap(twin, RULE, torch.optim.Adam(twin.parameters(), lr=0.01), tasks=3, groups="tensor")
    for i in range(BATCHES):
        with opt.split(ids):
            losses = twin.layers(batch(i)).square().mean(1)
        opt.backward(losses)
        opt.step()
        opt.zero_grad()
    check_same(model, twin)


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed", "scaled"])
def test_resuming(precision, tmp_path):
    def settings():
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=4)
        scaled = {"plugins": [MixedPrecision("16-mixed", "cpu", scaler=scaler)]}
        return {"accumulate_grad_batches": 2, **(scaled if precision == "scaled" else {"precision": precision})}

    model = Bent()
    whole, first, second = (Model(copy.deepcopy(model)) for _ in range(3))
    fit(whole, tmp_path, max_epochs=3, **settings())
    saving = {"enable_checkpointing": True, "callbacks": [ModelCheckpoint(tmp_path / "saved", save_last=True)]}
    fit(first, tmp_path, max_epochs=1, **settings(), **saving)
    saving = {"enable_checkpointing": True, "callbacks": [ModelCheckpoint(tmp_path / "saved", save_last=True)]}
    fit(second, tmp_path, max_epochs=3, ckpt_path=tmp_path / "saved" / "last.ckpt", **settings(), **saving)
    check_same(second, whole)
    assert torch.equal(second.surgery.rule_state["target"], whole.surgery.rule_state["target"])
    assert not torch.equal(second.model.layers[0].weight, first.model.layers[0].weight)


def test_figures_are_in_the_logger(tmp_path):
    """At the steps, and with the step numbers, of what the module logs itself."""

    class Logging(Model):
        def training_step(self, x, index):
            loss = super().training_step(x, index)
            self.log("loss", loss)
            return loss

    model = Bent()
    _, expected = plain_loop(copy.deepcopy(model), accumulate=2)
    logger = CSVLogger(tmp_path)
    fit(Logging(model), tmp_path, accumulate_grad_batches=2, log_every_n_steps=2, logger=logger)
    with open(logger.experiment.metrics_file_path, newline="") as file:
        rows = [{key: float(value) for key, value in row.items() if value} for row in csv.DictReader(file)]
    mine = {row["step"]: row for row in rows if "surgery/cosine/model" in row}
    assert set(mine) == {row["step"] for row in rows if "loss" in row} == {1}
    assert {name: mine[1][name] for name in expected[1]} == expected[1]


def test_a_scheduler_and_closures_of_optimizers(tmp_path):
    class Scheduled(Model):
        def configure_optimizers(self):
            opt = super().configure_optimizers()
            return {
                "optimizer": opt,
                "lr_scheduler": {"scheduler": torch.optim.lr_scheduler.StepLR(opt, 2), "interval": "step"},
            }

    module = Scheduled(Bent())
    fit(module, tmp_path)
    assert module.surgery.param_groups[0]["lr"] == pytest.approx(1e-5)
    lbfgs = Model(Bent(), rule=gs.Mean(), optimizer=torch.optim.LBFGS)  # evaluates its closure several times
    before = sum(lbfgs.model.losses(batch(0)).values()).item()
    fit(lbfgs, tmp_path, limit_train_batches=1)
    assert sum(lbfgs.model.losses(batch(0)).values()).item() < before


def test_errors(tmp_path):
    class Forgotten(Model):
        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.1)

    class Manual(Model):
        automatic_optimization = False

    with pytest.raises(TypeError, match=r"must be a SurgeryOptimizer\. Found SGD: wrap it"):
        fit(Forgotten(Bent()), tmp_path)
    with pytest.raises(RuntimeError, match=r"In manual, call self\.surgery\.backward"):
        fit(Manual(Bent()), tmp_path)


def test_manual_optimization(tmp_path):
    class Manual(Model):
        automatic_optimization = False

        def training_step(self, x, index):
            self.surgery.backward(self.model.losses(x))
            self.surgery.step()
            self.surgery.zero_grad()

    model = Bent()
    twin = copy.deepcopy(model)
    fit(Manual(model), tmp_path)
    plain_loop(twin)
    check_same(model, twin)


def test_several_processes_are_refused(tmp_path):
    from lightning.pytorch.strategies import DDPStrategy

    module = Model(Bent())
    module.trainer = pl.Trainer(
        accelerator="cpu", devices=2, strategy=DDPStrategy(), logger=False, default_root_dir=tmp_path
    )
    with pytest.raises(NotImplementedError, match="Found strategy DDPStrategy, where each process"):
        module.joint_loss({"a": torch.ones((), requires_grad=True)})
