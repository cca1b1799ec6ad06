"""Lightning: ``training_step`` returns the joint loss of all tasks, and optimization stays automatic."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor

from .._features import FeatureSpec
from .._losses import Losses
from .._optimizer import SurgeryOptimizer
from ._common import missing, surgery_in, train_together

try:
    from lightning.pytorch import LightningModule
    from lightning.pytorch.strategies import SingleDeviceStrategy
except ImportError as error:
    raise missing("lightning", "lightning") from error

__all__ = ["SurgeryModule"]


class SurgeryModule(LightningModule):
    """A LightningModule for gradient surgery. Precision, accumulation, clipping and checkpoints are the Trainer's.

    Return ``self.joint_loss(losses)`` from ``training_step``, and a :class:`gradsurgery.SurgeryOptimizer` from
    ``configure_optimizers``. The gradients are combined when the Trainer's step has all of them, before it unscales and
    clips them and before ``on_before_optimizer_step``. Every ``log_every_n_steps``, the Trainer's loggers get the figures
    of :meth:`gradsurgery.Step.figures`.

    Example:
        ``class Model(SurgeryModule)``, and in it
        ``return self.joint_loss({"depth": depth_loss, "normal": normal_loss})``; see docs/lightning.md.

    Note:
        An ``optimizer_step`` of your own has to call ``super().optimizer_step(...)``. With manual optimization, call
        ``backward``, ``combine`` and ``step`` of the optimizer itself.
    """

    @property
    def surgery(self) -> SurgeryOptimizer:
        """The optimizer that ``configure_optimizers`` returned."""
        return surgery_in(self.optimizers(use_pl_optimizer=False))

    def joint_loss(
        self, losses: Losses, *, samples: Mapping[str, float] | None = None, features: FeatureSpec | None = None
    ) -> Tensor:
        """The loss to return from ``training_step``: see :meth:`gradsurgery.SurgeryOptimizer.joint_loss`.

        Args:
            losses: one for each task; or, after ``with self.surgery.split(task_ids)``, one for each sample.
            samples, features: as for :meth:`gradsurgery.SurgeryOptimizer.backward`.

        Raises:
            NotImplementedError: under a strategy for several devices or processes other than DDP.
            ValueError: under DDP, if the optimizer was made without ``process_group=True``.
            RuntimeError: with manual optimization.
            TypeError: if ``configure_optimizers`` returned something other than one SurgeryOptimizer.
        """
        strategy = self.trainer.strategy
        single = isinstance(strategy, SingleDeviceStrategy)
        found = None if single else f"strategy {type(strategy).__name__}"
        train_together("Lightning", found, strategy.model, lambda: self.surgery)
        if not self.automatic_optimization:
            raise RuntimeError("joint_loss() is for automatic optimization. In manual, call self.surgery.backward(losses).")
        scaler = getattr(self.trainer.precision_plugin, "scaler", None)
        return self.surgery.joint_loss(losses, scaler=scaler, samples=samples, features=features)

    def optimizer_step(
        self, epoch: int, batch_idx: int, optimizer: Any, optimizer_closure: Callable[[], Any] | None = None
    ) -> None:
        """Combines once the closure has run all backward passes, steps, and logs."""
        surgery, trainer = self.surgery, self.trainer

        def closure() -> Any:
            loss = optimizer_closure() if optimizer_closure is not None else None
            surgery.combine()
            return loss

        super().optimizer_step(epoch, batch_idx, optimizer, closure)
        number = trainer.global_step  # of this step: it is counted afterwards
        if surgery.last is not None and trainer.log_every_n_steps and (number + 1) % trainer.log_every_n_steps == 0:
            for logger in trainer.loggers:
                logger.log_metrics(surgery.last.figures(), step=number)
