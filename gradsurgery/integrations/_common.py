"""What the training loops have in common."""

from __future__ import annotations

from typing import Any

from .._optimizer import SurgeryOptimizer


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


def one_process(loop: str, found: str | None) -> None:
    """Raises if a loop trains in another way than in one process on one device: ``found`` says how."""
    if found is not None:
        raise NotImplementedError(
            f"In {loop}, gradsurgery trains in one process, on one device. Found {found}, where each process would operate "
            "on gradients of its own and the models would drift apart."
        )
