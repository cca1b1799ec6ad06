"""The Hugging Face Trainer, with a loss for each task, or a batch that mixes samples of different tasks."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from importlib import import_module
from typing import Any

import torch
from torch import Tensor, nn

from .._coordinates import AnyRule
from .._groups import GroupSpec
from .._losses import Losses
from .._optimizer import SurgeryOptimizer
from ._common import missing, surgery_in, train_together

try:
    import_module("accelerate")  # which the Trainer needs
    from transformers import Trainer
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
except ImportError as error:
    raise missing("transformers and accelerate", "transformers") from error

__all__ = ["SurgeryTrainer"]

_IGNORED = -100  # the label that every loss of Transformers leaves out


class SurgeryTrainer(Trainer):
    """A ``transformers.Trainer`` for gradient surgery. Optimizer, precision, accumulation, clipping, checkpoints and logs
    are the Trainer's; each training log has the figures of :meth:`gradsurgery.Step.figures` too.

    If the examples of the data set have a column ``task_ids`` (the index of each one's task), nothing else is needed:
    batches are split by it, and a task's loss is the cross entropy of its labels. Otherwise override
    :meth:`compute_task_losses`.

    Args:
        rule: what happens to the gradients.
        tasks: names of the tasks.
        groups: the surgery groups.
        task_column: where the examples say what task they belong to.
        settings: further arguments of :class:`gradsurgery.SurgeryOptimizer`.
        args, kwargs: as for ``Trainer``.

    Raises:
        TypeError: without a rule.
        ValueError: with a ``compute_loss_func``, which returns one loss for all tasks.

    Example:
        ``SurgeryTrainer(model, args, train_dataset=data, rule=GradVac(), tasks=["code", "law"], groups="layer")``; see
        docs/huggingface.md.

    Note:
        A task's loss is the mean over its labels *in a pass*, and over accumulated passes the mean of these; the Trainer's
        own is the mean over all labels of a step, whatever their task. The log's ``loss`` is the sum over tasks.
    """

    def __init__(
        self,
        *args: Any,
        rule: AnyRule,
        tasks: Iterable[str] | int | None = None,
        groups: GroupSpec = "model",
        task_column: str = "task_ids",
        settings: Mapping[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        if kwargs.get("compute_loss_func") is not None:
            raise ValueError(
                "`compute_loss_func` returns one loss for all tasks. Override compute_task_losses(model, inputs, task_ids)."
            )
        self.task_column = task_column
        self._rule = rule
        self._settings = {"tasks": tasks, "groups": groups, **(settings or {})}
        super().__init__(*args, **kwargs)
        self.model_accepts_loss_kwargs = False  # or losses would be taken for sums over all passes of a step

    @property
    def surgery(self) -> SurgeryOptimizer:
        """The optimizer."""
        return surgery_in(self.optimizer)

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """The Trainer's optimizer, wrapped."""
        optimizer = super().create_optimizer(model)
        try:
            surgery_in(optimizer)  # a second train(), or one that was passed to the Trainer
        except TypeError:
            settings = {"process_group": True, **self._settings} if self.accelerator.num_processes > 1 else self._settings
            self.optimizer = SurgeryOptimizer(optimizer, self._rule, model=model or self.model, **settings)
        return self.optimizer

    def compute_task_losses(self, model: nn.Module, inputs: dict[str, Any], task_ids: Tensor | None) -> Losses:
        """The tasks' losses. Override it for models with a loss for each task, and for losses other than cross entropy.

        Args:
            model: the model.
            inputs: the batch, without the column of tasks.
            task_ids: that column, ``[B]``; None if the batch has none.

        Returns:
            One loss for each task. If there are ``task_ids``, one for each sample, ``[B]`` or ``[B, ...]``: a task's loss
            is the mean of its samples' entries.

        Raises:
            ValueError: without ``task_ids``, and without integer labels.
        """
        if task_ids is None:
            raise ValueError(
                f"The batch has no column {self.task_column!r} that says to which task each sample belongs. Found "
                f"{list(inputs)}. Add it to the data set (and see that the collator keeps it), name it with `task_column`, "
                "or override compute_task_losses(model, inputs, task_ids)."
            )
        labels = inputs.pop("labels", None)
        if labels is None or labels.is_floating_point():
            raise ValueError(
                "Without integer labels, a task's loss is not cross entropy. Override "
                f"compute_task_losses(model, inputs, task_ids). Found {'none' if labels is None else labels.dtype}."
            )
        logits = model(**inputs).logits.float()
        plain = self.accelerator.unwrap_model(model)
        plain = plain.get_base_model() if hasattr(plain, "get_base_model") else plain  # adapters of PEFT
        if type(plain).__name__ in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values():
            logits, labels = logits[:, :-1], labels[:, 1:]
        losses: Tensor = nn.functional.cross_entropy(
            logits.movedim(-1, 1),
            labels,
            ignore_index=_IGNORED,
            reduction="none",
            label_smoothing=self.args.label_smoothing_factor,
        )
        # The mean over a task's entries becomes that over those that are not ignored.
        counted = (labels != _IGNORED).reshape(len(labels), -1).double()
        same = (task_ids[:, None] == task_ids[None, :]).double().to(counted.device)
        share = (same @ counted).sum(1) / (same.sum(1) * counted.shape[1])
        share = share.clamp_min(1e-12).to(losses.dtype).reshape(-1, *[1] * (losses.dim() - 1))
        return losses.div(share)

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """The joint loss of all tasks in training, and what the Trainer computes in evaluation."""
        inputs = dict(inputs)
        task_ids = inputs.pop(self.task_column, None)
        if return_outputs or not torch.is_grad_enabled():
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        several = self.args.n_gpu > 1 or self.accelerator.num_processes > 1
        found = f"{self.args.n_gpu} GPUs and {self.accelerator.num_processes} processes" if several else None
        train_together("the Trainer", found, model, lambda: self.surgery)
        if task_ids is None:
            losses = self.compute_task_losses(model, inputs, None)
        else:
            with self.surgery.split(task_ids):
                losses = self.compute_task_losses(model, inputs, task_ids)
        accelerator = self.accelerator
        return self.surgery.joint_loss(losses, scaler=accelerator.scaler, combine=accelerator.sync_gradients)

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Adds the last step's figures to the Trainer's training logs."""
        if "loss" in logs and self.surgery.last is not None:
            logs.update(self.surgery.last.figures())
        super().log(logs, *args, **kwargs)

    def _set_signature_columns_if_needed(self) -> None:
        super()._set_signature_columns_if_needed()
        if self.task_column not in self._signature_columns:
            self._signature_columns.append(self.task_column)
