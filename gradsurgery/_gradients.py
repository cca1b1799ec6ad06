"""The per-task gradients of all parameters of an optimizer, by name and surgery group."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable, Hashable, Iterator, Sequence

import torch
from torch import Tensor, nn

from ._arena import Arena
from ._buffer import Rows, add_in_place
from ._groups import Groups, GroupSpec, partition, some
from ._plan import Plan

_MOST_PLANS = 256
_KEPT = 4  # gradients, whose memory rows may keep between steps


class TaskGradients:
    """A row for each task and parameter, and how they are put together.

    Args:
        optimizer: whose parameters.
        model: what they are named after, or None.
        spec: the surgery groups, as the argument ``groups`` of :class:`SurgeryOptimizer`.

    Attributes:
        names: names of the parameters, in the optimizer's order.
        parameters: the parameters.
        rows: their rows.
        arena: memory for them, for those who want it.
        groups: the partition into surgery groups.
        group_of: for each parameter, the index of its group.
        device: where Gram matrices and states are.
        dtype: of Gram matrices and states.
        finite: whether combined gradients that came from no row of theirs are finite: a boolean each, on ``device``.
    """

    finite: Sequence[Tensor] = ()

    def __init__(self, optimizer: torch.optim.Optimizer, model: nn.Module | None, spec: GroupSpec) -> None:
        named = parameter_names(optimizer, model)
        self.names = list(named)
        self.parameters = list(named.values())
        self.arena = Arena(keep=_KEPT * sum(p.numel() * p.element_size() for p in self.parameters))
        self.rows = [Rows(self.arena) for _ in named]
        self.groups: Groups = partition(spec, named, model)
        self.locate()
        index = {name: g for g, group in enumerate(self.groups) for name in self.groups[group]}
        self.group_of = [index[name] for name in self.names]

    def locate(self) -> None:
        """Notes the device where the parameters are."""
        self.device = self.parameters[0].device
        self.dtype = torch.float32 if self.device.type == "mps" else torch.float64  # MPS has no float64
        self._plans: dict[Hashable, Plan] = {}
        self._indices: dict[tuple[int, ...], Tensor] = {}

    @property
    def trained(self) -> list[int]:
        """The parameters that are not frozen."""
        return [p for p, parameter in enumerate(self.parameters) if parameter.requires_grad]

    def targets(self) -> tuple[list[nn.Parameter], list[Rows]]:
        """The parameters that are not frozen, and their rows."""
        trained = self.trained
        return [self.parameters[p] for p in trained], [self.rows[p] for p in trained]

    def zeros(self, count: int) -> Tensor:
        """Numbers of tasks, ``[K]``: all zero."""
        return torch.zeros(count, dtype=self.dtype, device=self.device)

    def index(self, tasks: tuple[int, ...]) -> Tensor:
        """Indices of tasks, on the device. They are kept, since to send them there waits for it."""
        if tasks not in self._indices:
            self._indices[tasks] = torch.tensor(tasks, dtype=torch.int64, device=self.device)
        return self._indices[tasks]

    def with_rows(self, rows: list[Rows]) -> TaskGradients:
        """The same parameters, with other rows."""
        result = copy.copy(self)
        result.rows = rows
        return result

    def expect(self, tasks: Sequence[int]) -> None:
        """Says that a step with these tasks begins."""
        for rows in self.rows:
            rows.expect(tasks)

    def align(self, parameters: Sequence[int] | None = None) -> None:
        """Brings the rows of each of the parameters (all, by default) into one form."""
        for p in range(len(self.rows)) if parameters is None else parameters:
            self.rows[p].align()

    def plan(self, tasks: tuple[str, ...], parameters: Sequence[int] | None = None) -> Plan:
        """The cells of this step, or of these parameters."""
        chosen = range(len(self.rows)) if parameters is None else set(parameters)
        reach = tuple(rows.tasks if p in chosen else () for p, rows in enumerate(self.rows))
        return self._kept((reach, tasks), lambda: Plan(reach, self.group_of, tuple(self.groups), tasks, self.device))

    def _kept(self, key: Hashable, make: Callable[[], Plan]) -> Plan:
        """The plan of this key, made if there is none."""
        if key not in self._plans:
            if len(self._plans) >= _MOST_PLANS:
                self._plans.clear()
            self._plans[key] = make()
        return self._plans[key]

    def not_finite(self) -> list[tuple[int, str]]:
        """The rows that hold inf or nan, as task and name of the parameter. Waits for the device."""
        places = [(task, p) for p, rows in enumerate(self.rows) for task in rows.tasks]
        finite = torch.stack([self.rows[p].finite(task).to(self.device) for task, p in places]).tolist()
        return [(task, self.names[p]) for (task, p), fine in zip(places, finite, strict=True) if not fine]

    def drop(self, task: int) -> None:
        """Forgets a task's rows, as if the task had not been there."""
        for rows in self.rows:
            rows.drop(task)

    def accumulate(self, p: int, combined: Tensor) -> None:
        """Adds a combined gradient to ``p.grad``, as ``Tensor.backward`` does."""
        parameter = self.parameters[p]
        if parameter.grad is None:
            parameter.grad = combined
        elif parameter.grad.is_sparse and not combined.is_sparse:
            parameter.grad = combined + parameter.grad
        else:
            add_in_place(parameter.grad, combined)

    def clear(self) -> None:
        """Frees all rows."""
        for rows in self.rows:
            rows.clear()
        self.arena.reset()


def apart(found: Sequence[Tensor | None], others: Sequence[Tensor] = ()) -> Iterator[Tensor | None]:
    """Gradients of ``torch.autograd.grad``, each in memory of its own: it may give one tensor to several parameters.

    Args:
        found: the gradients.
        others: what else they may share memory with: what flowed in.
    """
    taken = {other.untyped_storage().data_ptr() for other in others if type(other) is Tensor}
    for gradient in found:
        if type(gradient) is not Tensor or gradient.layout != torch.strided:  # None, sparse, or with parts elsewhere
            yield gradient
            continue
        memory = gradient.untyped_storage()
        alone = memory.data_ptr() not in taken and memory.nbytes() == gradient.numel() * gradient.element_size()
        taken.add(memory.data_ptr())
        yield gradient if alone else gradient.clone(memory_format=torch.contiguous_format)


def parameter_names(optimizer: torch.optim.Optimizer, model: nn.Module | None) -> dict[str, nn.Parameter]:
    """All parameters that the optimizer holds, in its order, by name.

    The names are the model's; without a model, those that the optimizer was given
    (``AdamW(model.named_parameters())``), or ``param0``, ``param1``, ….

    Raises:
        ValueError: if the optimizer lacks a trainable parameter of the model, or holds one that is not the model's; or if
            there is no model, and the optimizer was given the same name twice.
    """
    held: dict[int, tuple[str, nn.Parameter]] = {}
    for group in optimizer.param_groups:
        names = group.get("param_names") or [f"param{len(held) + i}" for i in range(len(group["params"]))]
        for name, parameter in zip(names, group["params"], strict=True):
            held[id(parameter)] = name, parameter
    if model is None:
        names = [name for name, _ in held.values()]
        if twice := sorted(name for name, times in Counter(names).items() if times > 1):
            raise ValueError(
                f"The optimizer holds several parameters of the same name: {some(twice)}. Pass the module that contains "
                "them all as `model`."
            )
        return dict(held.values())

    known = {id(parameter): name for name, parameter in model.named_parameters()}
    missing = [
        name for name, parameter in model.named_parameters() if parameter.requires_grad and id(parameter) not in held
    ]
    if missing:
        raise ValueError(
            f"The model has trainable parameters that the optimizer does not hold: {some(missing)}. Add them to the "
            "optimizer, freeze them with requires_grad_(False), or pass as `model` only what this optimizer trains."
        )
    foreign = [f"{name} {tuple(parameter.shape)}" for key, (name, parameter) in held.items() if key not in known]
    if foreign:
        raise ValueError(
            f"The optimizer holds parameters that are not in `model`: {some(foreign)}. Pass the module that contains "
            "them all, say nn.ModuleList([model, criterion])."
        )
    return {known[key]: parameter for key, (_, parameter) in held.items()}
