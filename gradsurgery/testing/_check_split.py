"""Is the single pass right on a model?"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .._buffer import Rows
from .._mixed import MixedBatch, TaskIds
from ..sources._split import Pass


@dataclass(frozen=True)
class SplitReport:
    """How far the gradients of a single pass are from those of separate backward passes.

    Attributes:
        errors: name of a parameter → the largest relative error of a task's gradient.
        tolerance: what is allowed.
    """

    errors: dict[str, float]
    tolerance: float

    @property
    def wrong(self) -> list[str]:
        """The parameters whose error is above the tolerance."""
        return [name for name, error in self.errors.items() if not error <= self.tolerance]

    def __str__(self) -> str:
        worst = sorted(self.errors, key=lambda name: -self.errors[name])
        shown = worst[:10]
        width = max((len(name) for name in shown), default=0)
        lines = [f"{name:<{width}}  {self.errors[name]:.1e}" for name in shown]
        more = [f"and {len(worst) - len(shown)} more"] if len(worst) > len(shown) else []
        return "\n".join([f"relative error, at most {self.tolerance:.1e}:", *lines, *more])


def check_split(
    model: nn.Module,
    batch: Any,
    task_ids: TaskIds,
    *,
    loss: Callable[[Any], Tensor] | None = None,
    reduction: str = "mean",
    tolerance: float | None = None,
) -> SplitReport:
    """Compares the gradients of a single pass with those of one backward pass per task, on your model.

    Args:
        model: the model, in the mode that it is trained in.
        batch: its input: ``model(batch)``; ``model(*batch)`` for a tuple or list; ``model(**batch)`` for a mapping.
        task_ids: ``[B]``, the task of each sample, as for :meth:`SurgeryOptimizer.split`.
        loss: what the model returns → losses ``[B, ...]``. By default a random linear function of the first tensor in it.
        reduction: of a task's losses, ``"mean"`` or ``"sum"``.
        tolerance: largest relative error allowed; by default one that suits the coarsest precision in the model's graph.

    Returns:
        The errors, by parameter; prints as a table.

    Raises:
        AssertionError: naming the parameters that differ.
        ValueError: if samples interact, and for arguments that do not fit, as :meth:`SurgeryOptimizer.split` does.

    Example:
        >>> import torch, gradsurgery as gs
        >>> model = torch.nn.Sequential(torch.nn.Linear(3, 8), torch.nn.LayerNorm(8), torch.nn.Linear(8, 2))
        >>> report = gs.testing.check_split(model, torch.randn(6, 3), [0, 1, 2, 0, 1, 2])
        >>> sorted(report.errors)
        ['0.bias', '0.weight', '1.bias', '1.weight', '2.bias', '2.weight']
        >>> report.wrong
        []

    Note:
        Errors are relative to the task's gradient of that parameter, or to a thousandth of its gradient of all parameters,
        whichever is larger: a gradient that ought to be zero is rounding.
    """
    named = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    if isinstance(batch, Mapping):
        output = model(**batch)
    elif isinstance(batch, (tuple, list)):
        output = model(*batch)
    else:
        output = model(batch)
    losses = _random_function(_first_tensor(output)) if loss is None else loss(output)
    mixed = MixedBatch(task_ids, _names(task_ids), reduction)
    mixed.check(losses)

    rows = [Rows() for _ in named]
    parameters = list(named.values())
    single = Pass(losses, mixed.labels(losses), parameters, rows, list(named))
    ones = torch.ones(len(mixed.tasks), dtype=torch.float64, device="cpu" if losses.device.type == "mps" else losses.device)
    single.run(mixed.seeds(losses, ones), retain_graph=True)
    errors = dict.fromkeys(named, 0.0)
    for task in mixed.present:
        only = torch.zeros_like(ones).index_fill(0, torch.tensor(task, device=ones.device), 1)
        expected = torch.autograd.grad(
            [losses], parameters, [mixed.seeds(losses, only)], retain_graph=True, allow_unused=True
        )
        pairs = [(_dense(own.of.get(task)), _dense(gradient)) for own, gradient in zip(rows, expected, strict=True)]
        norms = [0.0 if gradient is None else float(gradient[gradient.isfinite()].norm()) for _, gradient in pairs]
        least = torch.tensor(norms, dtype=torch.float64).norm().item() / 1000
        for name, norm, (found, gradient) in zip(named, norms, pairs, strict=True):
            error = _distance(found, gradient)
            scale = max(norm, least)
            relative = error / scale if scale and error < math.inf else error
            errors[name] = max(errors[name], relative)
    report = SplitReport(errors, 10 * single.precision**0.75 if tolerance is None else tolerance)
    if report.wrong:
        raise AssertionError(f"The single pass is wrong for {', '.join(map(repr, report.wrong))}. {report}")
    return report


def _names(task_ids: TaskIds) -> list[str]:
    if isinstance(task_ids, Sequence) and any(isinstance(task, str) for task in task_ids):
        return sorted({task for task in task_ids if isinstance(task, str)})
    ids = torch.as_tensor(task_ids)
    return [str(k) for k in range(int(ids.max()) + 1 if ids.numel() else 1)]


def _first_tensor(output: Any) -> Tensor:
    if isinstance(output, Tensor):
        return output
    values = output.values() if isinstance(output, Mapping) else output
    for value in values:
        if isinstance(value, Tensor):
            return value
    raise TypeError(f"The model returned no tensor, but {type(output).__name__}. Pass `loss`.")


def _random_function(output: Tensor) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    weights = torch.randn(output.shape, generator=generator, dtype=torch.float64)
    return output * weights.to(output.device, output.real.dtype)


def _distance(found: Tensor | None, expected: Tensor | None) -> float:
    """Norm of the difference, None being zero; infinite where only one of them is finite."""
    if found is None or expected is None:
        found = expected if found is None else found
        expected = None if found is None else torch.zeros_like(found)
    if found is None or expected is None:
        return 0.0
    finite = expected.isfinite()
    if not torch.equal(finite, found.isfinite()):
        return math.inf
    return float((found - expected)[finite].norm())


def _dense(gradient: Tensor | None) -> Tensor | None:
    return gradient.to_dense() if gradient is not None and gradient.is_sparse else gradient
