"""Rules that look at each coordinate of the tasks' gradients by itself, which no Gram matrix shows.

They have a contract of their own, next to :class:`Rule`: no Gram matrix is computed for them, there is no mixing matrix to
record or to reuse, and they read the rows once. Rows mixed by Gram matrices, ``M J``, can be handed to one: the last of a
``Chain`` may be a coordinate rule.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, TypeAlias

import torch
from torch import Tensor

from ._buffer import Rows
from ._rule import Rule


@dataclass(frozen=True)
class CoordinateRule:
    """Base class of rules that make one gradient of the tasks' gradients, coordinate by coordinate.

    Subclass as a frozen dataclass whose fields are the settings, checked in ``__post_init__``, and override
    :meth:`combine`. There is no state.

    Laws, which every such rule keeps:

    * **elementwise**: a coordinate of the result depends on nothing but that column of the rows and that random number, so
      that it makes no difference how coordinates are put together: whole parameters, pieces, or shards;
    * **zero**: where all rows are zero, so is the result. Indices that no task used stay out of sparse gradients;
    * **pure**: the rows are not modified;
    * **finite**: finite rows give a finite result.

    Claims, by class attributes, or properties, of these names. All are ``separable``: groups make no difference.

    * **random**: it needs random numbers. Such a rule is for one process;
    * **symmetric**: the order of the tasks makes no difference;
    * **scale_equivariant**: a positive common factor of all rows is one of the result;
    * **non_conflicting**: the result has no negative inner product with any task's gradient.
    """

    separable: ClassVar[bool] = True
    random: ClassVar[bool] = False
    symmetric: ClassVar[bool] = True
    scale_equivariant: ClassVar[bool] = False
    non_conflicting: ClassVar[bool] = False

    def check(self, tasks: Sequence[str]) -> None:
        """Called once the tasks are known.

        Args:
            tasks: names of the ``K`` tasks.

        Raises:
            ValueError: if the settings do not suit them.
        """

    def combine(self, rows: Tensor, *, tasks: Sequence[str], noise: Tensor | None) -> Tensor:
        """The combined gradient ``[n]`` of ``n`` coordinates of one parameter.

        Args:
            rows: ``[k, n]``, the gradients of the tasks that reached the parameter, two at least, in float32 or float64.
                Real and imaginary parts are coordinates of their own.
            tasks: names of these ``k`` tasks, in the order of the rows.
            noise: ``[n]``, independent random numbers, uniform in [0, 1); None for a rule that does not claim ``random``.
        """
        raise NotImplementedError(f"{type(self).__name__} must override combine().")


def added(rows: Sequence[Tensor] | Tensor) -> Tensor:
    """The sum ``[n]`` of ``k`` rows, one after the other. ``rows.sum(0)`` rounds in ways that depend on ``n``."""
    return functools.reduce(torch.add, rows)


AnyRule: TypeAlias = Rule | CoordinateRule


def parts(rule: AnyRule) -> tuple[Rule, CoordinateRule | None]:
    """What operates by Gram matrices, the identity if nothing does; and what then looks at coordinates, if anything."""
    if isinstance(rule, CoordinateRule):
        return Rule(), rule
    return rule, getattr(rule, "coordinates", None)


class Coordinates:
    """A coordinate rule in one step.

    A parameter's random numbers depend on the generator's state as the step begins, and on the parameter's place, not on
    the order in which parameters are combined: surgery inside the backward pass gives the same bits.

    Args:
        rule: the rule.
        tasks: names of the ``K`` tasks.
        generator: where random numbers are from; None for PyTorch's global one.
        scale: of the losses, or None: rules see gradients without it.
    """

    def __init__(
        self,
        rule: CoordinateRule,
        tasks: Sequence[str],
        generator: torch.Generator | None,
        scale: Tensor | None = None,
    ) -> None:
        self._rule = rule
        self._tasks = tasks
        self._scale = None if rule.scale_equivariant else scale
        self._key = b"" if generator is None or not rule.random else _digest(generator.get_state().numpy().tobytes())

    def __call__(self, p: int, rows: Rows, mixing: Tensor | None) -> Tensor:
        """The combined gradient of parameter ``p``.

        Args:
            rows: of ``k`` tasks.
            mixing: ``[k, k]``, by which the rows are mixed before; None if they are not.
        """
        names = [self._tasks[k] for k in rows.tasks]

        def combine(chunk: Tensor, noise: Tensor | None) -> Tensor:
            if mixing is not None:
                chunk = mixing.to(chunk) @ chunk
            if self._scale is not None:
                chunk = chunk / self._scale.to(chunk)
            result = self._rule.combine(chunk, tasks=names, noise=noise)
            if result.shape != chunk.shape[1:]:
                raise ValueError(
                    f"{self._rule} must combine rows {tuple(chunk.shape)} to {tuple(chunk.shape[1:])}. Found shape "
                    f"{tuple(result.shape)}."
                )
            # What is not finite must not be left out by chance: it is to show, as a step to be skipped.
            finite = chunk.amin(0).isfinite() & chunk.amax(0).isfinite()  # aminmax takes thirty times as long
            result = torch.where(finite, result, torch.nan)
            return result if self._scale is None else result * self._scale.to(result)

        return rows.reduce(combine, self._noise(p, rows))

    def _noise(self, p: int, rows: Rows) -> Tensor | None:
        if not self._rule.random:
            return None
        generator = None
        if self._key:
            seed = int.from_bytes(_digest(self._key + p.to_bytes(8, "big")), "big") >> 1
            generator = torch.Generator(rows.device).manual_seed(seed)
        return torch.rand(rows.coordinates, generator=generator, dtype=rows.precision, device=rows.device)


def _digest(content: bytes) -> bytes:
    return hashlib.blake2b(content, digest_size=8).digest()
