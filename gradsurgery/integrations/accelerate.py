"""Accelerate: the loss to pass to ``accelerator.backward``."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from .._losses import Losses
from ._common import missing, one_process, surgery_in

try:
    from accelerate import Accelerator
    from accelerate.utils import DistributedType
except ImportError as error:
    raise missing("accelerate", "accelerate") from error

__all__ = ["joint_loss"]


def joint_loss(accelerator: Accelerator, optimizer: Any, losses: Losses) -> Tensor:
    """One loss for all tasks, to be passed to ``accelerator.backward``, which scales it as it scales every loss.

    In the last pass of a step (when ``accelerator.sync_gradients``), the gradients are combined at the end of the backward
    pass, before ``accelerator.clip_grad_norm_`` and the optimizer's step. A forward pass has one joint loss.

    Args:
        accelerator: which prepared the optimizer.
        optimizer: a :class:`gradsurgery.SurgeryOptimizer`, before or after ``accelerator.prepare``.
        losses: one for each task; or, after ``with optimizer.split(task_ids)``, one for each sample. See
            :meth:`gradsurgery.SurgeryOptimizer.joint_loss`.

    Raises:
        NotImplementedError: if the accelerator trains in several processes, or with DeepSpeed, FSDP or Megatron-LM.
        TypeError: if ``optimizer`` is not a SurgeryOptimizer, or if one was put around a prepared optimizer.

    Example:
        ``accelerator.backward(joint_loss(accelerator, optimizer, {"depth": depth_loss, "normal": normal_loss}))``; see
        docs/accelerate.md.
    """
    kind = accelerator.distributed_type
    one_process("Accelerate", None if kind == DistributedType.NO else f"distributed_type {kind.value}")
    return surgery_in(optimizer).joint_loss(losses, scaler=accelerator.scaler, combine=accelerator.sync_gradients)
