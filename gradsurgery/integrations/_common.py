"""What the training loops have in common."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn

from .._optimizer import SurgeryOptimizer
from .._ranks import take_over


def missing(package: str, extra: str) -> ImportError:
    """The error for a package that is not installed."""
    return ImportError(
        f"gradsurgery.integrations.{extra} needs {package}, which is not installed: pip install 'gradsurgery[{extra}]'."
    )


def surgery_in(optimizer: Any) -> SurgeryOptimizer:
    """The SurgeryOptimizer in a training loop's wrappers.

    Raises:
        TypeError: if there is none, or if the loop's wrapper is inside.
    """
    outermost = optimizer
    while not isinstance(optimizer, SurgeryOptimizer):
        if not hasattr(optimizer, "optimizer"):
            raise TypeError(
                f"The optimizer of the training loop must be a SurgeryOptimizer. Found {type(outermost).__name__}: wrap it "
                "with gradsurgery.SurgeryOptimizer(optimizer, rule, model=model), before the loop does."
            )
        optimizer = optimizer.optimizer
    if type(optimizer.optimizer).__module__.startswith("accelerate."):
        raise TypeError(
            f"The SurgeryOptimizer holds a {type(optimizer.optimizer).__name__}: surgery would happen at every accumulated "
            "pass. Wrap the plain optimizer, and hand the SurgeryOptimizer to the training loop."
        )
    return optimizer


def train_together(loop: str, found: str | None, wrapper: object, surgery: Callable[[], SurgeryOptimizer]) -> None:
    """Sees to it that processes which a loop lets train one model operate on gradients of all of them.

    Args:
        loop: its name.
        found: how it trains, if not in one process on one device.
        wrapper: what the loop calls in place of the model.
        surgery: finds the optimizer.

    Raises:
        NotImplementedError: if that is not data-parallel training by DistributedDataParallel.
        ValueError: if the optimizer knows of no other processes.
    """
    if found is None:
        return
    if not isinstance(wrapper, nn.parallel.DistributedDataParallel):
        raise not_together(loop, found)
    if surgery().ranks == 1:
        raise ValueError(f"{loop} trains in several processes, {found}: make the SurgeryOptimizer with process_group=True.")
    take_over(wrapper)


def not_together(loop: str, found: str) -> NotImplementedError:
    """The error for a way to train in several processes that is not known here."""
    return NotImplementedError(
        f"In {loop}, gradsurgery trains in one process on one device, or in several by DistributedDataParallel. Found "
        f"{found}, where each process would operate on gradients of its own and the models would drift apart."
    )
