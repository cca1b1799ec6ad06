"""The contract between per-task gradients and the rules that operate on them.

Vocabulary, used in every shape of this library: ``K`` tasks, ``G`` surgery groups, ``D`` coordinates of a group.

A rule never sees a gradient. Each surgery group hands it the Gram matrix of its rows, ``gram[g, i, j] = <g_i, g_j>``, and
the rule answers with a *mixing matrix* ``M``: task ``i``'s gradient becomes ``g'_i = sum_j M[g, i, j] g_j``. The gradient
that is stepped on is ``sum_i g'_i``. So the parameters are read twice whatever the rule, a rule is a few lines on small
matrices that are batched over all groups, and two rules compose by multiplying their matrices.

>>> import torch, gradsurgery as gs
>>> jacobian = torch.tensor([[1.0, 1.0], [-1.0, 0.0]])  # [K, D]: two tasks in conflict
>>> gs.operate(jacobian, gs.PCGrad())
tensor([-0.5000,  1.5000])
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, TypeAlias

import torch
from torch import Tensor

if TYPE_CHECKING:
    from ._step import Step

State: TypeAlias = dict[str, Any]
"""What a rule remembers: a dictionary of tensors (or of such dictionaries). A tensor that describes surgery groups has
``G`` as its first dimension; it is then kept by group name when groups are added or a checkpoint is loaded."""


@dataclass(frozen=True)
class Rule:
    """Base class of all rules, and the identity: every moment does nothing unless a subclass says otherwise.

    Subclass as a frozen dataclass whose fields are the settings, checked in ``__post_init__``; equality, ``repr`` and
    pickling come for free. Everything that changes during training lives in the state, which is made by :meth:`init`,
    passed in and returned, never kept on the rule. Randomness comes from the given generator only.

    Laws, which every rule keeps, and ``gradsurgery.testing.check_rule`` checks by these names:

    * **shape**: mixing matrices are like the Gram matrices, weights like the losses;
    * **batched**: ``mix`` on ``[G, K, K]`` equals ``mix`` on each group alone (of rules that are ``separable``);
    * **absent**: rows and columns of a task that is not active are those of the identity, and its weight is 1; no other
      entry depends on that task, and the state of its pairs stays bit for bit as it was;
    * **pure**: neither the arguments nor the rule are modified;
    * **finite**: a finite positive semi-definite Gram matrix, whatever its rank and scale, gives finite mixing matrices,
      and positive losses give finite weights;
    * **device**: no value is read back to the host (on the CPU, where that costs nothing, it may be);
    * **loadable**: the state keeps the entries, shapes and dtypes that ``init`` gave it.

    Claims, which a rule makes or denies by a class attribute, or a property, of that name:

    * **separable**: ``mix`` with some groups active and then, from the same random numbers, with the others, equals ``mix``
      with all. Surgery inside the backward pass needs it;
    * **random**: it draws from the generator. One that does not claim so draws no random numbers at all;
    * **symmetric**: permuting the tasks permutes the result (of rules that are not ``random``);
    * **scale_equivariant**: a common factor of all gradients leaves the mixing matrices as they are;
    * **non_conflicting**: the combined gradient has no negative inner product with any task's.
    """

    separable: ClassVar[bool] = True
    random: ClassVar[bool] = False
    symmetric: ClassVar[bool] = True
    scale_equivariant: ClassVar[bool] = False
    non_conflicting: ClassVar[bool] = False

    def init(
        self,
        tasks: Sequence[str],
        groups: Sequence[str],
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype = torch.float64,
    ) -> State:
        """Returns the state before the first step.

        Args:
            tasks: names of the ``K`` tasks.
            groups: names of the ``G`` surgery groups.
            device: where the Gram matrices will be.
            dtype: dtype of the Gram matrices.

        Raises:
            ValueError: if the settings name a task that is not among ``tasks``.
        """
        return {}

    def weigh(
        self, losses: Tensor, state: State, *, active: Tensor | None = None, generator: torch.Generator | None = None
    ) -> tuple[Tensor, State]:
        """Once the losses are there: returns detached weights ``[K]`` for them, and the new state.

        Called once in each step, ahead of :meth:`mix`, which sees the gradients of the weighted losses.

        Args:
            losses: detached losses ``[K]``, summed over the step's backward passes; an absent task's entry is zero.
            state: the rule's state.
            active: ``[K]``, which tasks this step holds; None means all.
            generator: the only source of randomness, on the device of ``losses``.

        Returns:
            The weights, 1 for absent tasks, and the new state.
        """
        return torch.ones_like(losses), state

    def mix(
        self, gram: Tensor, state: State, *, active: Tensor | None = None, generator: torch.Generator | None = None
    ) -> tuple[Tensor, State]:
        """Once the gradients are there: returns mixing matrices ``[G, K, K]`` and the new state.

        Args:
            gram: Gram matrices ``[G, K, K]``; rows and columns of absent tasks are zero.
            state: the rule's state.
            active: ``[G, K]``, which tasks reached which group in this step; None means all.
            generator: the only source of randomness, on the device of ``gram``.

        Note:
            Parameters of one group that different sets of tasks reach are operated on separately (absent is not zero).
            A group with several such sets takes part in several calls, the widest set first.
        """
        return torch.eye(gram.shape[-1], dtype=gram.dtype, device=gram.device).expand_as(gram), state

    def observe(self, step: Step, state: State) -> State:
        """After the gradients have been combined: sees what happened, and returns the new state."""
        return state


def implements(rule: Rule, moment: str) -> bool:
    """Whether ``rule`` gives the moment (``"weigh"``, ``"mix"`` or ``"observe"``) a meaning of its own.

    A rule that wraps another one, its ``rule``, weighs and observes if that does.

    >>> import gradsurgery as gs
    >>> implements(gs.PCGrad(), "mix"), implements(gs.PCGrad(), "weigh"), implements(gs.CRMOGM(gs.MGDA()), "weigh")
    (True, False, False)
    """
    parts = getattr(rule, "rules", (rule,))
    if moment != "mix":
        parts = tuple(getattr(part, "rule", part) for part in parts)
    return any(getattr(type(part), moment) is not getattr(Rule, moment) for part in parts)
