"""Accelerate: the loss to pass to ``accelerator.backward``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from .._features import FeatureSpec
from .._losses import Losses
from ._common import missing, not_together, surgery_in

try:
    from accelerate import Accelerator
    from accelerate.utils import DistributedType
except ImportError as error:
    raise missing("accelerate", "accelerate") from error

__all__ = ["joint_loss"]

_PARALLEL = tuple(kind for kind in DistributedType if kind.value in ("MULTI_CPU", "MULTI_GPU", "MULTI_XPU", "MULTI_NPU"))


def joint_loss(
    accelerator: Accelerator,
    optimizer: Any,
    losses: Losses,
    *,
    samples: Mapping[str, float] | None = None,
    features: FeatureSpec | None = None,
) -> Tensor:
    """One loss for all tasks, to be passed to ``accelerator.backward``, which scales it as it scales every loss.

    In the last pass of a step (when ``accelerator.sync_gradients``), the gradients are combined at the end of the backward
    pass, before ``accelerator.clip_grad_norm_`` and the optimizer's step. A forward pass has one joint loss.

    Args:
        accelerator: which prepared the optimizer.
        optimizer: a :class:`gradsurgery.SurgeryOptimizer`, before or after ``accelerator.prepare``.
        losses: one for each task; or, after ``with optimizer.split(task_ids)``, one for each sample. See
            :meth:`gradsurgery.SurgeryOptimizer.joint_loss`.
        samples, features: as for :meth:`gradsurgery.SurgeryOptimizer.backward`.

    Raises:
        NotImplementedError: if the accelerator trains with DeepSpeed, FSDP or Megatron-LM.
        ValueError: if it trains in several processes, and the optimizer was made with another model than the prepared one.
        TypeError: if ``optimizer`` is not a SurgeryOptimizer, or if one was put around a prepared optimizer.

    Example:
        ``accelerator.backward(joint_loss(accelerator, optimizer, {"depth": depth_loss, "normal": normal_loss}))``; see
        docs/accelerate.md.
    """
    kind = accelerator.distributed_type
    surgery = surgery_in(optimizer)
    if kind in _PARALLEL and not surgery.wrapped:
        raise ValueError(
            "Accelerate trains in several processes: make the SurgeryOptimizer with the prepared model, which knows of "
            "them. First model = accelerator.prepare(model), then SurgeryOptimizer(..., model=model), and prepare that."
        )
    if kind not in (*_PARALLEL, DistributedType.NO):
        raise not_together("Accelerate", f"distributed_type {kind.value}")
    return surgery.joint_loss(
        losses, scaler=accelerator.scaler, combine=accelerator.sync_gradients, samples=samples, features=features
    )
