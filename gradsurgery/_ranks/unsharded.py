"""The single pass under FSDP2: over the whole parameters that are in the graph, with rows for the shards of each rank."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, Shard

from .._buffer import Rows
from .._gradients import TaskGradients
from .reach import Mask, broken
from .wire import Waiting, Wire


def why_not_whole(parameters: Mapping[str, Tensor], ranks: Sequence[int]) -> str:
    """The reason why a single pass is not possible; empty if each parameter is divided among these ranks by FSDP2 alone."""
    for name, parameter in parameters.items():
        if not isinstance(parameter, DTensor):
            return f"{name!r} is not among the parameters that FSDP2 shards"
        mesh, placements = parameter.device_mesh, parameter.placements
        if mesh.ndim != 1 or type(placements[0]) is not Shard or mesh.mesh.tolist() != list(ranks):
            return f"{name!r} is not divided by FSDP2 alone, among all ranks, but {placements} on {mesh}"
    return ""


def fsdp_modules(model: nn.Module) -> list[FSDPModule]:
    """Those that ``fully_shard`` was called on."""
    return [module for module in model.modules() if isinstance(module, FSDPModule)]


@contextmanager
def adding_up(model: nn.Module) -> Iterator[None]:
    """Lets FSDP2 finish each backward pass, and add up what it brings, whatever was set for gradients that accumulate: what
    stays behind would be taken for a part of the next task's gradients."""
    modules: list[Any] = fsdp_modules(model)
    places = [
        place
        for module in modules
        for place in (
            (module._get_fsdp_state()._state_ctx, "is_last_backward"),
            *((group, name) for group in _groups(module) for name in ("reduce_grads", "all_reduce_grads")),
        )
    ]
    before = [getattr(*place) for place in places]
    try:
        for owner, name in places:
            setattr(owner, name, True)
        yield
    finally:
        for (owner, name), value in reversed(list(zip(places, before, strict=True))):
            setattr(owner, name, value)


class Whole:
    """The whole parameters that FSDP2 puts into the graph in place of its shards. The same tensors in each step.

    Args:
        model: the model.
        names: of its parameters.
        wire: the collectives. Rows travel in a group of their own, since FSDP2 has collectives under way meanwhile.
    """

    def __init__(self, model: nn.Module, names: Sequence[str], wire: Wire) -> None:
        self.wire = wire.beside()
        modules = fsdp_modules(model)
        wanted = set(names)
        before = {name for name, parameter in model.named_parameters() if not isinstance(parameter, DTensor)}
        for module in modules:
            module.reshard()
        self.of: dict[str, Tensor] = {}
        self._owner: dict[str, FSDPModule] = {}
        for module in modules:
            module.unshard()
            for name, parameter in model.named_parameters():
                if name in wanted and name not in self.of and not isinstance(parameter, DTensor):
                    self.of[name], self._owner[name] = parameter, module
            module.reshard()
        for module in self._owners([name for name in names if name in before]):  # in the same order on all ranks
            module.unshard()

    def _owners(self, names: Sequence[str]) -> list[FSDPModule]:
        return list({id(self._owner[name]): self._owner[name] for name in names}.values())

    @contextmanager
    def held(self, names: Sequence[str]) -> Iterator[None]:
        """Keeps these parameters whole when the backward pass is over."""
        groups = [group for module in self._owners(names) for group in _groups(module)]
        before = [group.reshard_after_backward for group in groups]
        for group in groups:
            group.reshard_after_backward = False
        try:
            yield
        finally:
            for group, reshards in zip(groups, before, strict=True):
                group.reshard_after_backward = reshards
                if reshards:
                    group.reshard()


def _groups(module: Any) -> Sequence[Any]:
    # FSDP2 has a setter for what is needed here, and no getter.
    state = module._get_fsdp_state()
    several: Sequence[Any] | None = getattr(state, "_fsdp_param_groups", None)
    if several is None:  # before PyTorch 2.12
        several = [] if state._fsdp_param_group is None else [state._fsdp_param_group]
    return several


class Inflow:
    """The rows of one pass: of whole parameters first, then summed over the ranks, of each rank's shards.

    Args:
        whole: the whole parameters.
        gradients: where rows go.
        trained: the parameters that are trained.

    Attributes:
        leaves: what the graph has in place of these.
        rows: of the leaves.
        trained: the parameters that are trained.
        odd: the name of a parameter whose rows were not those that had been told ahead.
    """

    def __init__(self, whole: Whole, gradients: TaskGradients, trained: Sequence[int]) -> None:
        self._whole = whole
        self._gradients = gradients
        self.leaves = [whole.of[gradients.names[p]] for p in trained]
        self.rows = [Rows() for _ in trained]
        self.trained = trained
        self._index = {p: i for i, p in enumerate(trained)}
        self.odd = ""
        self._under_way: list[tuple[list[tuple[int, tuple[int, ...], _Shards]], Tensor, Waiting]] = []

    def stages(self, parameters: Sequence[int], reach: Sequence[tuple[int, ...]], told: Mask) -> Iterator[None]:
        """Sends the rows of these parameters, given the tasks that reach each on any rank; then takes in what is there."""
        wire, kinds = self._whole.wire, dict[tuple[torch.dtype, torch.device], list[int]]()
        for p in parameters:
            if broken(self.rows[self._index[p]], told, p):
                self.odd = self.odd or self._gradients.names[p]
            like = self._gradients.parameters[p]
            kinds.setdefault((like.dtype, like.device), []).append(p)
        for (dtype, device), members in kinds.items():
            shards = [_Shards(self._gradients.parameters[p], len(reach[p]), wire) for p in members]
            parts = torch.zeros(wire.size, sum(shard.size for shard in shards), dtype=dtype, device=device)
            for p, shard, place in zip(members, shards, torch.split(parts, [s.size for s in shards], 1), strict=True):
                shard.pack(self.rows[self._index[p]], reach[p], place)
            own = torch.empty_like(parts[0])
            if len(own):
                taken = [(p, reach[p], shard) for p, shard in zip(members, shards, strict=True)]
                self._under_way.append((taken, own, wire.start_reduce_scatter(own, parts)))
        yield
        # To wait here could be for ever: another rank may send these rows after FSDP2 has gathered a layer there, which
        # waits for this rank.
        self._take([work for *_, work in self._under_way if work.is_done()])

    def finish(self) -> None:
        """Takes in what is still under way."""
        self._take([work for *_, work in self._under_way])

    def _take(self, done: Sequence[Waiting]) -> None:
        for work in done:
            work.wait()
        for taken, own, work in self._under_way:
            if work in done:
                pieces = torch.split(own, [shard.size for *_, shard in taken])
                for (p, tasks, shard), piece in zip(taken, pieces, strict=True):
                    self._gradients.rows[p].add_block(tasks, shard.own(piece), owned=True)
        self._under_way = [item for item in self._under_way if item[-1] not in done]


class _Shards:
    """How ``k`` rows of a parameter are divided: along one dimension, in pieces of a size, of which the last may lack."""

    def __init__(self, parameter: Tensor, k: int, wire: Wire) -> None:
        assert isinstance(parameter, DTensor)
        (placement,) = parameter.placements
        assert isinstance(placement, Shard)
        self._dim = placement.dim
        self._local = parameter.to_local().shape
        self._k, self._ranks = k, wire.size
        self._length = parameter.shape[self._dim]
        self._piece = -(-self._length // wire.size)
        self._others = parameter.shape[: self._dim] + parameter.shape[self._dim + 1 :]
        self.size = k * self._piece * self._others.numel()  # on each rank

    def pack(self, rows: Rows, tasks: Sequence[int], into: Tensor) -> None:
        """Puts rows into zeros ``[ranks, size]``, in the parameter's precision, and frees them."""
        view = into.view(self._ranks, self._k, self._piece, *self._others)
        for i, task in enumerate(tasks):
            row = rows.of.get(task)
            if row is None:
                continue
            row = (row.to_dense() if row.is_sparse else row).movedim(self._dim, 0)
            for place, piece in zip(view[:, i], torch.split(row, self._piece), strict=False):
                place[: len(piece)] = piece
        rows.clear()

    def own(self, part: Tensor) -> Tensor:
        """This rank's rows ``[k, ...]``, out of ``[size]``."""
        rows = part.view(self._k, self._piece, *self._others)[:, : self._local[self._dim]]
        return rows.movedim(1, self._dim + 1).contiguous()
