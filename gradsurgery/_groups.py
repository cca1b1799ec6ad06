"""Surgery groups: which parameters are operated on together."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import TypeAlias

from torch import nn
from torch.nn.utils.parametrize import ParametrizationList

GroupSpec: TypeAlias = str | Mapping[str, Sequence[str]] | Callable[[str, nn.Parameter], str]

ROOT = "(root)"
REST = "(rest)"


class Groups(Mapping[str, tuple[str, ...]]):
    """The partition of the parameters: a mapping from each surgery group's name to its parameters' names.

    It prints as a table. Every parameter of the optimizer is in exactly one group.
    """

    def __init__(self, group_of: Mapping[str, str], numel: Mapping[str, int]) -> None:
        members: dict[str, list[str]] = {}
        for parameter, group in group_of.items():
            members.setdefault(group, []).append(parameter)
        self._members = {group: tuple(names) for group, names in members.items()}
        self._numel = dict(numel)

    def __getitem__(self, group: str) -> tuple[str, ...]:
        return self._members[group]

    def __iter__(self) -> Iterator[str]:
        return iter(self._members)

    def __len__(self) -> int:
        return len(self._members)

    def __repr__(self) -> str:
        rows = [("group", "tensors", "parameters", "")]
        for group, names in self.items():
            shown = ", ".join(names[:2]) + (", …" if len(names) > 2 else "")
            rows.append((group, str(len(names)), f"{sum(self._numel[name] for name in names):,}", shown))
        widths = [max(len(row[column]) for row in rows) for column in range(3)]
        lines = [f"{a:<{widths[0]}}  {b:>{widths[1]}}  {c:>{widths[2]}}  {d}".rstrip() for a, b, c, d in rows]
        return "\n".join(lines)


def unwrap(model: nn.Module) -> nn.Module:
    """The model itself, out of wrappers that only change its parameters' names."""
    if isinstance(model, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
        return unwrap(model.module)
    inner = getattr(model, "_orig_mod", None)  # torch.compile
    return unwrap(inner) if isinstance(inner, nn.Module) else model


def partition(spec: GroupSpec, parameters: Mapping[str, nn.Parameter], model: nn.Module | None) -> Groups:
    """Puts every parameter into a surgery group.

    Args:
        spec: as the ``groups`` argument of :class:`SurgeryOptimizer`.
        parameters: name → parameter, all that the optimizer holds.
        model: needed for ``"layer"`` and ``"module"``.

    Raises:
        ValueError: for an unknown string, for a pattern that no parameter matches, and where a model is needed.
        TypeError: if ``spec``, or what it returns, is of another type.
    """
    group_of: dict[str, str]
    if isinstance(spec, str):
        if spec not in ("model", "layer", "module", "tensor"):
            raise ValueError(
                f"Unknown `groups`: {spec!r}. Use 'model', 'layer', 'module' or 'tensor', a mapping from names to lists "
                "of patterns such as {'encoder': ['encoder.*']}, or a function (name, parameter) -> group name."
            )
        if spec in ("layer", "module") and model is None:
            raise ValueError(f"groups={spec!r} follows the modules of the model: pass `model=` too.")
        group_of = {name: _named(spec, name, model) for name in parameters}
    elif isinstance(spec, Mapping):
        group_of = _matched(spec, parameters)
    elif callable(spec):
        group_of = {name: spec(name, parameter) for name, parameter in parameters.items()}
        for name, group in group_of.items():
            if not isinstance(group, str):
                raise TypeError(f"The `groups` function must return a name. For {name!r} it returned {group!r}.")
    else:
        raise TypeError(f"`groups` must be a string, a mapping or a function. Found {spec!r}.")
    return Groups(group_of, {name: parameter.numel() for name, parameter in parameters.items()})


def _named(spec: str, name: str, model: nn.Module | None) -> str:
    if spec == "model":
        return "model"
    if spec == "tensor":
        return name
    assert model is not None
    owner = _owner(name, model)
    if spec == "module":
        return owner or ROOT
    return _block(owner, model) or owner.partition(".")[0] or ROOT


def _owner(name: str, model: nn.Module) -> str:
    """The module that holds a parameter; of a parametrized one (weight norm, say), the module whose parameter it makes."""
    module, path = model, []
    for part in name.split(".")[:-1]:
        path.append(part)
        module = module.get_submodule(part)
        if isinstance(module, ParametrizationList):  # at "….parametrizations.weight"
            return ".".join(path[:-2])
    return ".".join(path)


def _block(owner: str, model: nn.Module) -> str | None:
    """The outermost item of a ModuleList or Sequential on the way from the model to the module ``owner``."""
    module, path = model, []
    for part in owner.split(".") if owner else ():
        path.append(part)
        if isinstance(module, (nn.ModuleList, nn.Sequential)):
            return ".".join(path)
        module = module.get_submodule(part)
    return None


def _matched(spec: Mapping[str, Sequence[str]], parameters: Mapping[str, nn.Parameter]) -> dict[str, str]:
    for group, patterns in spec.items():
        if isinstance(patterns, str) or not isinstance(patterns, Sequence):
            raise TypeError(f"`groups[{group!r}]` must be a list of patterns. Found {patterns!r}; write [{patterns!r}].")
        for pattern in patterns:
            if not any(fnmatchcase(name, pattern) for name in parameters):
                raise ValueError(
                    f"`groups[{group!r}]`: no parameter matches {pattern!r}. The parameters are {some(parameters)}."
                )
    found = {}
    for name in parameters:  # the first group that matches
        groups = (group for group, patterns in spec.items() if any(fnmatchcase(name, p) for p in patterns))
        found[name] = next(groups, REST)
    return found


def some(names: Iterable[str], most: int = 6) -> str:
    """The first few names, and how many more there are."""
    names = list(names)
    more = len(names) - most
    return ", ".join(names[:most]) + (f" and {more} more" if more > 0 else "")
