"""The Hugging Face Trainer does what a plain loop does, bit for bit."""

import copy

import pytest
import torch
from conftest import Bent, batch, check_same, wrap
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

import gradsurgery as gs
from gradsurgery.integrations.transformers import SurgeryTrainer

pytestmark = pytest.mark.filterwarnings("ignore:'pin_memory' argument is set as true but no accelerator:UserWarning")

RULE = gs.GradVac(beta=0.3)
TASKS = ["code", "law", "chat"]
VOCABULARY = 32


def arguments(path, **settings):
    settings = {"max_steps": 6, "save_strategy": "no", "logging_strategy": "no", "max_grad_norm": 0.0, **settings}
    return TrainingArguments(
        output_dir=str(path),
        learning_rate=0.01,
        lr_scheduler_type="constant",
        optim="adamw_torch",
        train_sampling_strategy="sequential",
        per_device_train_batch_size=6,
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
        **settings,
    )


def language_model():
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=16,
    )
    return LlamaForCausalLM(config)


def texts(tasks=3, count=36):
    """Each a row of tokens, of which the first few count for nothing."""
    generator = torch.Generator().manual_seed(1)
    result = []
    for i in range(count):
        tokens = torch.randint(VOCABULARY, (8,), generator=generator)
        labels = tokens.clone()
        labels[: int(torch.randint(1, 6, (), generator=generator))] = -100
        result.append({"input_ids": tokens, "labels": labels, "task_ids": i * 7 % 5 % tasks})
    return result


def token_losses(model, rows):
    """``[B, T - 1]`` losses and which of them count, by hand."""
    labels = torch.stack([row["labels"] for row in rows])[:, 1:]
    logits = model(torch.stack([row["input_ids"] for row in rows])).logits[:, :-1].float()
    return nn.functional.cross_entropy(logits.mT, labels, reduction="none"), labels != -100


class Several(nn.Module):
    """A model with a loss for each task."""

    def __init__(self):
        super().__init__()
        self.model = Bent()

    def forward(self, x):
        return self.model.losses(x)


class SeveralTrainer(SurgeryTrainer):
    def compute_task_losses(self, model, inputs, task_ids):
        return model(**inputs)


def rows():
    return [{"x": x} for i in range(5) for x in batch(i)]


def plain_loop(model, *, accumulate=1, clip=None, dtype=None, steps=6):
    weights, biases = ([p for p in model.parameters() if p.dim() == dim] for dim in (2, 1))  # in the Trainer's order
    adamw = torch.optim.AdamW([{"params": weights}, {"params": biases}], lr=0.01, weight_decay=0.0)
    opt = wrap(model, RULE, adamw, groups="tensor")
    data = torch.stack([row["x"] for row in rows()]).split(6)
    figures, number = [], 0
    for _ in range(steps):
        here = [data[(number + i) % len(data)] for i in range(min(accumulate, len(data) - number % len(data)))]
        number += len(here)
        for x in here:
            with torch.autocast("cpu", dtype=dtype, enabled=dtype is not None):
                losses = model(x)
            opt.backward({task: loss.float() / len(here) for task, loss in losses.items()})
        opt.combine()
        if clip:
            torch.nn.utils.clip_grad_norm_(model.parameters(), clip)
        opt.step()
        opt.zero_grad()
        figures.append(opt.last.figures())
    return opt, figures


@pytest.mark.parametrize("accumulate", [1, 3])  # seven batches: the last step of an epoch has one
@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize("clip", [0.0, 0.1])
def test_same_as_a_plain_loop(accumulate, bf16, clip, tmp_path):
    model = Several()
    twin = copy.deepcopy(model)
    args = arguments(
        tmp_path,
        gradient_accumulation_steps=accumulate,
        bf16=bf16,
        max_grad_norm=clip,
        logging_strategy="steps",
        logging_steps=2,
        logging_first_step=False,
    )
    trainer = SeveralTrainer(model, args, train_dataset=rows(), rule=RULE, groups="tensor")
    trainer.train()
    opt, figures = plain_loop(twin, accumulate=accumulate, clip=clip, dtype=torch.bfloat16 if bf16 else None)
    check_same(model, twin)
    assert torch.equal(trainer.surgery.rule_state["target"], opt.rule_state["target"])
    logged = [log for log in trainer.state.log_history if "loss" in log]
    assert [log["step"] for log in logged] == [2, 4, 6]
    for log in logged:
        expected = figures[log["step"] - 1]
        assert {name: log[name] for name in expected} == pytest.approx(expected, rel=1e-6)  # a third of a sum


@pytest.mark.parametrize("accumulate", [1, 2])
def test_resuming(accumulate, tmp_path):
    start = language_model()

    def train(model, steps, resume=None):
        args = arguments(
            tmp_path,
            max_steps=steps,
            gradient_accumulation_steps=accumulate,
            max_grad_norm=1.0,
            save_strategy="steps",
            save_steps=2,
        )
        trainer = SurgeryTrainer(model, args, train_dataset=texts(), rule=RULE, tasks=TASKS, groups="layer")
        trainer.train(resume_from_checkpoint=resume)
        return trainer

    whole = train(model := copy.deepcopy(start), 6)
    resumed = train(again := copy.deepcopy(start), 6, str(tmp_path / "checkpoint-2"))
    check_same(again, model)
    for key, value in whole.surgery.rule_state.items():
        assert torch.equal(resumed.surgery.rule_state[key], value)


def test_mixed_batches(tmp_path):
    model = language_model()
    twin = copy.deepcopy(model)
    data = texts()
    trainer = SurgeryTrainer(
        model, arguments(tmp_path), train_dataset=data, rule=RULE, tasks=TASKS, groups="layer", settings={"seed": 5}
    )
    trainer.train()
    opt = wrap(
        twin, RULE, torch.optim.AdamW(twin.parameters(), 0.01, weight_decay=0.0), tasks=TASKS, groups="layer", seed=5
    )
    for step in range(6):
        here = data[6 * step : 6 * step + 6]
        ids = torch.tensor([row["task_ids"] for row in here])
        losses, counted = token_losses(twin, here)
        opt.backward({TASKS[k]: losses[ids == k][counted[ids == k]].mean() for k in ids.unique().tolist()})
        opt.step()
        opt.zero_grad()
    torch.testing.assert_close(trainer.surgery.last.losses, opt.last.losses, equal_nan=True)
    for parameter, expected in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(parameter, expected, rtol=1e-3, atol=1e-4)


def test_one_task_is_what_the_trainer_does(tmp_path):
    model = language_model()
    twin = copy.deepcopy(model)
    args = arguments(tmp_path, max_grad_norm=1.0)
    SurgeryTrainer(model, args, train_dataset=texts(1), rule=gs.Sum(), tasks=["all"]).train()
    Trainer(twin, args, train_dataset=texts(1)).train()
    for parameter, expected in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(parameter, expected, rtol=1e-3, atol=1e-4)


def test_evaluation_is_the_trainers(tmp_path):
    model = language_model()
    args = arguments(tmp_path, max_steps=1)
    trainer = SurgeryTrainer(model, args, train_dataset=texts(), rule=RULE, tasks=TASKS)
    trainer.train()
    plain = Trainer(model, args)
    assert trainer.evaluate(texts()[:6])["eval_loss"] == plain.evaluate(texts()[:6])["eval_loss"]
    assert trainer.train().global_step == 1  # once more, with the optimizer that is there


def test_label_smoothing(tmp_path):
    model = language_model()
    args = arguments(tmp_path, max_steps=1, label_smoothing_factor=0.2)
    data = texts(1)[:6]
    trainer = SurgeryTrainer(copy.deepcopy(model), args, train_dataset=data, rule=gs.Sum(), tasks=["all"])
    trainer.train()
    inputs = {key: torch.stack([row[key] for row in data]) for key in ("input_ids", "labels")}
    expected = Trainer(model, args).compute_loss(model, inputs).detach()
    torch.testing.assert_close(trainer.surgery.last.losses[0].float(), expected)


def test_errors(tmp_path):
    args = arguments(tmp_path, max_steps=1)

    def train(data, model=None, **settings):
        SurgeryTrainer(model or language_model(), args, train_dataset=data, rule=RULE, tasks=TASKS, **settings).train()

    bare = [{key: row[key] for key in ("input_ids", "labels")} for row in texts()]
    with pytest.raises(ValueError, match=r"no column 'task_ids' .* Found \['input_ids', 'labels'\]\. Add it"):
        train(bare)
    with pytest.raises(ValueError, match="no column 'language'"):
        train(texts(), task_column="language")
    with pytest.raises(ValueError, match=r"Override compute_task_losses.* Found none\."):
        train([{key: row[key] for key in ("input_ids", "task_ids")} for row in texts()])
    with pytest.raises(ValueError, match="`compute_loss_func` returns one loss for all tasks"):
        train(texts(), compute_loss_func=lambda *_: None)
    with pytest.raises(ValueError, match="indices of the 3 tasks"):
        train(texts(5))


def test_several_devices_are_refused(tmp_path):
    args = arguments(tmp_path, max_steps=1)
    trainer = SurgeryTrainer(language_model(), args, train_dataset=texts(), rule=RULE, tasks=TASKS)
    args._n_gpu = 4
    with pytest.raises(NotImplementedError, match="In the Trainer, .* Found 4 GPUs and 1 processes"):
        trainer.compute_loss(trainer.model, {})


def test_an_optimizer_that_was_passed(tmp_path):
    model = language_model()
    opt = wrap(model, RULE, tasks=TASKS)
    trainer = SurgeryTrainer(
        model, arguments(tmp_path), train_dataset=texts(), rule=RULE, optimizers=(opt, None), tasks=TASKS
    )
    trainer.train()
    assert trainer.surgery is opt
    assert opt.last is not None
