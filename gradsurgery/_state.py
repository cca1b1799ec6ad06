"""Rule states as trees of tensors: guarding, carrying over, saving and loading them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ._rule import State


def zip_states(combine: Callable[[Any, Any], Any], new: State, old: State) -> State:
    """Applies ``combine(new, old)`` to the leaves that both trees have; what only ``new`` has stays as it is."""
    result: State = {}
    for key, value in new.items():
        if key not in old:
            result[key] = value
        elif isinstance(value, dict):
            result[key] = zip_states(combine, value, old[key])
        else:
            result[key] = combine(value, old[key])
    return result


def guarded(finite: Sequence[Tensor], *, old: State, new: State) -> State:
    """The new state; or the old one unless all gradients were finite: ``GradScaler`` will skip such a step."""
    if new is old:
        return old
    all_finite = torch.stack(list(finite)).all()

    def choose(new: Any, old: Any) -> Any:
        if new is old or not (isinstance(new, Tensor) and isinstance(old, Tensor)) or new.shape != old.shape:
            return new
        return torch.where(all_finite, new, old)

    return zip_states(choose, new, old)


def carried(old: State, old_groups: Sequence[str], new: State, new_groups: Sequence[str]) -> State:
    """A fresh state, with what ``old`` knew of the surgery groups that are still there."""
    kept = [name for name in new_groups if name in old_groups]
    source = [old_groups.index(name) for name in kept]
    target = [new_groups.index(name) for name in kept]

    def carry(new: Any, old: Any) -> Any:
        if not (isinstance(new, Tensor) and isinstance(old, Tensor)):
            return old
        if new.dim() and (len(new), len(old)) == (len(new_groups), len(old_groups)) and new.shape[1:] == old.shape[1:]:
            result = new.clone()
            result[target] = old[source]
            return result
        return old

    return zip_states(carry, new, old)


def loaded(saved: State, fresh: State) -> State:
    """A saved state, on the devices and in the dtypes of a fresh one.

    Raises:
        ValueError: if the two do not have the same entries of the same shapes.
    """
    if saved.keys() != fresh.keys():
        raise ValueError(f"The checkpoint's rule state has entries {list(saved)}, expected {list(fresh)}.")
    result: State = {}
    for key, value in fresh.items():
        if isinstance(value, dict):
            result[key] = loaded(saved[key], value)
        elif isinstance(value, Tensor):
            if saved[key].shape != value.shape:
                raise ValueError(
                    f"The checkpoint's rule state {key!r} has shape {tuple(saved[key].shape)}, "
                    f"expected {tuple(value.shape)}."
                )
            result[key] = saved[key].to(value)
        else:
            result[key] = saved[key]
    return result
