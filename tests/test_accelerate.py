"""A loop with Accelerate does what a plain loop does, bit for bit."""

import copy

import pytest
import torch
from accelerate import Accelerator
from accelerate.tracking import GeneralTracker
from accelerate.utils import DistributedType
from conftest import Bent, Heads, batch, check_same, forget_accelerator, wrap
from torch.utils.data import DataLoader

import gradsurgery as gs
from gradsurgery.integrations.accelerate import joint_loss

RULE = gs.GradVac(beta=0.3)
BATCHES = 6


class Tracker(GeneralTracker):
    name = "memory"
    requires_logging_directory = False

    def __init__(self):
        super().__init__()
        self.rows = {}

    @property
    def tracker(self):
        return self.rows

    def store_init_configuration(self, values):
        pass

    def log(self, values, step, **kwargs):
        self.rows[step] = values


class Forward(torch.nn.Module):
    """The losses as the forward pass, which is what Accelerate wraps for mixed precision."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, x):
        return self.model.losses(x)


def prepared(accelerator, model, scaler=None):
    surgery = wrap(model, RULE, torch.optim.Adam(model.parameters(), lr=0.01))
    if scaler is not None:  # as Accelerate has on a GPU; on a CPU, it refuses fp16
        accelerator.scaler, accelerator.native_amp = scaler, True
        accelerator.state._mixed_precision = "fp16"
    loader = DataLoader([batch(i) for i in range(BATCHES)], batch_size=None)
    return (surgery, *accelerator.prepare(Forward(model), surgery, loader))


def loop(accelerator, surgery, model, optimizer, loader, *, clip=None, tracker=None):
    for number, x in enumerate(loader):
        with accelerator.accumulate(model):
            accelerator.backward(joint_loss(accelerator, optimizer, model(x)))
            if accelerator.sync_gradients and clip is not None:
                accelerator.clip_grad_norm_(model.parameters(), clip)
            optimizer.step()
            optimizer.zero_grad()
        if accelerator.sync_gradients and tracker is not None:
            accelerator.log(surgery.last.figures(), step=number)


def plain_loop(model, *, accumulate=1, clip=None, scaler=None, dtype=None, epochs=1):
    opt = wrap(model, RULE, torch.optim.Adam(model.parameters(), lr=0.01))
    figures = {}
    for _ in range(epochs):
        for i in range(BATCHES):
            with torch.autocast("cpu", dtype=dtype, enabled=dtype is not None):
                losses = model.losses(batch(i))
            opt.backward({task: loss.float() / accumulate for task, loss in losses.items()}, scaler=scaler)
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
            figures[i] = opt.last.figures()
    return opt, figures


@pytest.mark.parametrize("model_class", [Heads, Bent])
@pytest.mark.parametrize("accumulate", [1, 4])  # the last step of the epoch has two batches
@pytest.mark.parametrize("precision", ["no", "bf16", "scaled"])
@pytest.mark.parametrize("clip", [None, 0.1])
def test_same_as_a_plain_loop(model_class, accumulate, precision, clip):
    model = model_class()
    twin = copy.deepcopy(model)
    scalers = [None, None]
    if precision == "scaled":
        scalers = [torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=2) for _ in range(2)]
    tracker = Tracker()
    accelerator = Accelerator(
        cpu=True,
        mixed_precision="bf16" if precision == "bf16" else "no",
        gradient_accumulation_steps=accumulate,
        log_with=tracker,
    )
    accelerator.init_trackers("")
    surgery, *rest = prepared(accelerator, model, scalers[0])
    loop(accelerator, surgery, *rest, clip=clip, tracker=tracker)
    dtype = {"no": None, "bf16": torch.bfloat16, "scaled": torch.float16}[precision]
    opt, figures = plain_loop(twin, accumulate=accumulate, clip=clip, scaler=scalers[1], dtype=dtype)
    check_same(model, twin)
    assert torch.equal(surgery.rule_state["target"], opt.rule_state["target"])
    assert tracker.rows == figures
    if precision == "scaled":
        assert scalers[0].get_scale() == scalers[1].get_scale() > 2.0**10


def test_an_overflow_skips_the_step():
    model = Bent()
    accelerator = Accelerator(cpu=True)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    surgery, model, optimizer, _ = prepared(accelerator, model, scaler)
    before = copy.deepcopy(model)
    for number, factor in enumerate([torch.inf, 1.0]):
        losses = model(batch(number))
        accelerator.backward(joint_loss(accelerator, surgery, {**losses, "b": losses["b"] * factor}))
        optimizer.step()
        model.zero_grad()  # not the optimizer's, as in the Trainer of Transformers
        assert optimizer.step_was_skipped == (number == 0)
        if number == 0:
            check_same(model, before)
    assert not torch.equal(model.model.layers[0].weight, before.model.layers[0].weight)


def test_mixed_batches():
    ids = torch.tensor([0, 1, 2, 0, 1, 2, 2, 0])
    model = Bent().layers
    twin = copy.deepcopy(model)
    surgery, other = (wrap(m, RULE, tasks=3, groups="tensor") for m in (model, twin))
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
    prepared_model, optimizer = accelerator.prepare(model, surgery)
    for number in range(BATCHES):
        with accelerator.accumulate(prepared_model):
            with surgery.split(ids):
                losses = prepared_model(batch(number)).square().mean(1)
            accelerator.backward(joint_loss(accelerator, optimizer, losses))
            optimizer.step()
            optimizer.zero_grad()
        with other.split(ids):
            losses = twin(batch(number)).square().mean(1)
        other.backward(losses / 2)
        if number % 2:
            other.step()
            other.zero_grad()
    check_same(model, twin)


def test_resuming(tmp_path):
    start = Bent()
    whole = copy.deepcopy(start)
    plain_loop(whole, accumulate=2, epochs=3)
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
    surgery, *rest = prepared(accelerator, copy.deepcopy(start))
    loop(accelerator, surgery, *rest)
    accelerator.save_state(tmp_path)
    forget_accelerator()
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
    surgery, *rest = prepared(accelerator, model := copy.deepcopy(start))
    accelerator.load_state(tmp_path)
    for _ in range(2):
        loop(accelerator, surgery, *rest)
    check_same(model, whole)


def test_a_scheduler():
    accelerator = Accelerator(cpu=True)
    surgery, _, optimizer, _ = prepared(accelerator, Bent())
    scheduler = accelerator.prepare(torch.optim.lr_scheduler.StepLR(surgery, 1))
    accelerator.backward(joint_loss(accelerator, optimizer, {"a": surgery.param_groups[0]["params"][0].sum()}))
    optimizer.step()
    scheduler.step()
    assert optimizer.param_groups[0]["lr"] == pytest.approx(1e-3)


def test_surgery_at_features():
    accelerator = Accelerator(cpu=True)
    trunk, heads = torch.nn.Linear(4, 3), torch.nn.ModuleDict({task: torch.nn.Linear(3, 1) for task in "ab"})
    surgery = wrap(torch.nn.ModuleList([trunk, heads]), gs.MGDA())
    z = trunk(torch.ones(2, 4)).tanh()
    losses = {task: head(z).square().mean() for task, head in heads.items()}
    with pytest.raises(ValueError, match="`samples` names 'z'"):
        accelerator.backward(joint_loss(accelerator, surgery, losses, samples={"z": 2}, features=z))
    accelerator.backward(joint_loss(accelerator, surgery, losses, samples={"a": 2, "b": 2}, features=z))
    assert surgery.last.groups == ("features",)


def test_a_second_joint_loss_of_a_step():
    accelerator = Accelerator(cpu=True)
    surgery, model, *_ = prepared(accelerator, Bent())
    accelerator.backward(joint_loss(accelerator, surgery, model(batch(0))))
    with pytest.raises(RuntimeError, match="Put all losses of a forward pass into one joint loss"):
        accelerator.backward(joint_loss(accelerator, surgery, model(batch(1))))


def test_errors(monkeypatch):
    accelerator = Accelerator(cpu=True)
    model = Bent()
    losses = model.losses(batch())
    plain = accelerator.prepare(torch.optim.SGD(model.parameters(), lr=0.1))
    with pytest.raises(TypeError, match=r"must be a SurgeryOptimizer\. Found AcceleratedOptimizer: wrap it"):
        joint_loss(accelerator, plain, losses)
    with pytest.raises(TypeError, match="Wrap the plain optimizer, and hand the SurgeryOptimizer to the training loop"):
        joint_loss(accelerator, wrap(model, RULE, plain), losses)
    monkeypatch.setattr(accelerator.state, "distributed_type", DistributedType.DEEPSPEED)
    with pytest.raises(NotImplementedError, match="Found distributed_type DEEPSPEED, where each process"):
        joint_loss(accelerator, wrap(model, RULE), losses)
