"""Which processes train a model together."""

from __future__ import annotations

from typing import TypeAlias

import torch.distributed as dist
from torch import nn

from .alone import Ranks
from .replicas import Replicas

ProcessGroup: TypeAlias = "dist.ProcessGroup | bool | None"


def ranks_of(model: nn.Module | None, group: ProcessGroup, *, reduce: str, check: bool) -> Ranks:
    """The ranks that the arguments ``model``, ``process_group``, ``reduce`` and ``check_ranks`` describe.

    Raises:
        ValueError: if it is not clear which ranks train together, and for an unknown ``reduce``.
        TypeError: if ``process_group`` is of another type.
    """
    if reduce not in ("rows", "result"):
        raise ValueError(f"`reduce` must be 'rows' or 'result'. Found {reduce!r}.")
    if not (group is None or isinstance(group, bool) or (dist.is_available() and isinstance(group, dist.ProcessGroup))):
        raise TypeError(f"`process_group` must be a process group, True, False or None. Found {group!r}.")
    several = dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1
    wrapper = _wrapper(model)
    if wrapper is not None:
        if group is False:
            raise ValueError(
                "`model` is a DistributedDataParallel, and process_group=False: pass model.module to train it on each rank "
                "by itself, or leave `process_group` out."
            )
        if group is None:
            group = wrapper.process_group
        _take_over(wrapper)
    elif group is None and several:
        raise ValueError(
            f"torch.distributed is initialised with {dist.get_world_size()} ranks, and it is not clear whether they train "
            "one model together. Pass process_group=True (or a group) if they do, and process_group=False if each rank "
            "trains a model of its own; or wrap the model in DistributedDataParallel."
        )
    if group is True:
        if not (dist.is_available() and dist.is_initialized()):
            raise ValueError("process_group=True needs torch.distributed: call init_process_group() first.")
        group = dist.group.WORLD
    if group is None or group is False or dist.get_world_size(group) == 1:
        return Ranks()
    return Replicas(group, result=reduce == "result", check=check)


def _wrapper(model: nn.Module | None) -> nn.parallel.DistributedDataParallel | None:
    """The DistributedDataParallel around a model, perhaps inside of ``torch.compile``."""
    while isinstance(model, nn.Module):
        if isinstance(model, nn.parallel.DistributedDataParallel):
            return model
        model = getattr(model, "_orig_mod", None)
    return None


def _take_over(wrapper: nn.parallel.DistributedDataParallel) -> None:
    """Lets the wrapper share buffers in each forward pass as ever, and wait for no gradients of its own."""
    if wrapper.static_graph:
        raise ValueError(
            "`model` is a DistributedDataParallel with static_graph=True, which expects one backward pass of its own. "
            "Leave it out: gradients are added up by the optimizer."
        )
    wrapper.require_backward_grad_sync = False
    wrapper.register_forward_pre_hook(_share_buffers)


def _share_buffers(wrapper: nn.Module, args: object) -> None:
    wrapper.__dict__["require_forward_param_sync"] = True  # which it forgets after a forward pass
