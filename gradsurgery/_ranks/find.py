"""Which processes train a model together."""

from __future__ import annotations

from functools import partial
from typing import Any, TypeAlias

import torch
import torch.distributed as dist
from torch import nn

from .._groups import unwrap
from ..sources import Autograd, Source
from ..sources._backward import Backward
from .alone import Ranks
from .replicas import Replicas

ProcessGroup: TypeAlias = "dist.ProcessGroup | bool | None"


def ranks_of(
    model: nn.Module | None, optimizer: torch.optim.Optimizer, group: ProcessGroup, *, reduce: str, check: bool
) -> Ranks:
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
    if several and _sharded(optimizer):
        if group is False or reduce == "result":
            setting = "process_group=False" if group is False else "reduce='result'"
            raise ValueError(f"Parameters are sharded over several processes: leave out {setting}.")
        if model is None:
            raise ValueError("Parameters are sharded over several processes: pass `model` too.")
        from .shards import Shards

        world = dist.group.WORLD if group is None or group is True else group
        assert world is not None
        return Shards(world, model=unwrap(model), fsdp=_fsdp(model), check=check)
    wrapper = _wrapper(model)
    if wrapper is not None:
        if group is False:
            raise ValueError(
                "`model` is a DistributedDataParallel, and process_group=False: pass model.module to train it on each rank "
                "by itself, or leave `process_group` out."
            )
        if group is None:
            group = wrapper.process_group
        take_over(wrapper)
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


def source_for(model: nn.Module | None, source: Source, every: int, measure: bool) -> Source:
    """The source that a model needs: the given one, unless it is sharded by FSDP2.

    Raises:
        ValueError: if what was asked for cannot be done there.
    """
    if model is None or not _fsdp(model):
        return source
    if not isinstance(source, Autograd):
        raise ValueError("`model` is sharded by FSDP2, which needs source='autograd'.")
    if every > 1 or not measure:
        raise ValueError("`model` is sharded by FSDP2, which needs every=1 and measure=True.")
    from .unsharded import adding_up

    return Backward(partial(adding_up, unwrap(model)))


def _sharded(optimizer: torch.optim.Optimizer) -> bool:
    from torch.distributed.tensor import DTensor

    return any(isinstance(parameter, DTensor) for group in optimizer.param_groups for parameter in group["params"])


def _fsdp(model: nn.Module) -> bool:
    if not dist.is_available():
        return False
    from torch.distributed.fsdp import FSDPModule

    return any(isinstance(module, FSDPModule) for module in model.modules())


def _wrapper(model: nn.Module | None) -> nn.parallel.DistributedDataParallel | None:
    """The DistributedDataParallel around a model, perhaps inside of ``torch.compile``."""
    while isinstance(model, nn.Module):
        if isinstance(model, nn.parallel.DistributedDataParallel):
            return model
        model = getattr(model, "_orig_mod", None)
    return None


def take_over(wrapper: nn.parallel.DistributedDataParallel) -> None:
    """Lets the wrapper share buffers in each forward pass as ever, and wait for no gradients of its own.

    Raises:
        ValueError: for a static graph.
    """
    if _share_buffers in wrapper._forward_pre_hooks.values():
        return
    if wrapper.static_graph:
        raise ValueError(
            "`model` is a DistributedDataParallel with static_graph=True, which expects one backward pass of its own. "
            "Leave it out: gradients are added up by the optimizer."
        )
    wrapper.require_backward_grad_sync = False
    wrapper.register_forward_pre_hook(_share_buffers)


def _share_buffers(wrapper: nn.Module, args: object) -> None:
    join: Any = wrapper._join_config
    if join.enable:
        raise RuntimeError(
            "join() of a DistributedDataParallel stands in for a rank that has no more batches, and knows nothing of "
            "surgery. Leave it out: call combine() or step() on that rank all the same, without backward(), as often as "
            "the others do."
        )
    wrapper.__dict__["require_forward_param_sync"] = True  # which it forgets after a forward pass
