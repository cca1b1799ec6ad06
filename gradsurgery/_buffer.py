"""The per-task gradient buffer: where rows are kept, and the two passes over them.

Row ``k`` of a parameter holds ``dL_k/dp``. A row that is not there is *absent*, which is not the same as zero. The rows of
a parameter lie next to each other in one block ``[k, ...]`` wherever the tasks that will reach it can be foreseen from the
step before, and both passes read them where they are. Elsewhere (in a first step, in half precision) the passes gather
some hundred thousand coordinates at a time. There never is a second copy of the rows.

Rows of an embedding may be sparse: a task has gradients for the indices that it used, and only indices that two tasks used
take part in their inner product. Such rows are never laid out as a block.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from ._arena import Arena, is_block, new_block

_CPU_CHUNK = 1 << 17  # coordinates of each row that are gathered at a time: few enough for the cache,
_CHUNK = 1 << 22  # and on other devices, many enough to hide the launches
_MANY = 64  # rows, of which half are enough for a product at full speed
_PIECE = 1 << 14  # coordinates of each row that are multiplied at a time, on the CPU


class Rows:
    """The per-task gradients of one parameter.

    Args:
        arena: takes back the blocks that it gave.
    """

    def __init__(self, arena: Arena | None = None) -> None:
        self._arena = Arena() if arena is None else arena
        self._of: dict[int, Tensor] | None = {}  # None: the block's rows, of which no one has asked for a single one
        self._ever: set[int] = set()  # the tasks of all steps before
        self._layout: tuple[int, ...] = ()  # the tasks that the block has place for, in this order
        self._block: Tensor | None = None
        self._inside: set[int] = set()  # the tasks whose row is the block's
        self._owned = False  # whether the block is ours to add to; what autograd returns may be shared
        self._dense = False  # whether the result is to be dense although the rows are sparse
        self._sparse: Sparse | None = None  # aligned rows, if they are sparse
        self._products: list[Tensor] | None = None  # inner products that were made when the rows were still warm

    @property
    def of(self) -> dict[int, Tensor]:
        """Task → gradient, of the parameter's shape."""
        if self._of is None:
            assert self._block is not None
            self._of = dict(zip(self._layout, self._block, strict=True))
        return self._of

    @property
    def tasks(self) -> tuple[int, ...]:
        """The tasks that reached the parameter, in increasing order."""
        return self._layout if self._of is None else tuple(sorted(self._of))

    @property
    def _any(self) -> Tensor:
        """One of the rows, or all of them."""
        if self._of is None and self._block is not None:
            return self._block
        return next(iter(self.of.values()))

    def expect(self, tasks: Sequence[int]) -> None:
        """Says that gradients of these tasks are to come, so that a block has place for those that may reach here."""
        if not self.tasks and not set(tasks) <= set(self._layout):
            self._layout = tuple(sorted(self._ever.intersection(tasks)))

    def add(self, task: int, gradient: Tensor, *, dense: bool = False) -> None:
        """Adds a gradient to the task's row. The tensor may be kept, and is not modified.

        A sparse gradient makes the combined one sparse too, unless it is ``dense`` by rights.
        """
        self._dense = self._dense or dense
        self._products = self._sparse = None
        old = self.of.get(task)
        if old is None:
            self.of[task] = self._placed(task, gradient)
        elif self._owned and task in self._inside:
            add_in_place(old, gradient)
        else:
            self.of[task] = gradient + old if old.is_sparse else old + gradient
            self._inside.discard(task)

    def _placed(self, task: int, gradient: Tensor) -> Tensor:
        """The gradient, copied to its place in the block if it has one."""
        if task not in self._layout or len(self._layout) < 2 or gradient.is_sparse:
            return gradient
        if self._block is None:
            shape = (len(self._layout), *gradient.shape)
            self._block, self._owned = new_block(shape, gradient.dtype, gradient.device), True
        if not self._owned:
            return gradient
        self._inside.add(task)
        return self._block[self._layout.index(task)].copy_(gradient)

    def add_block(self, tasks: Sequence[int], block: Tensor, *, owned: bool = False) -> None:
        """Adds the gradients ``[len(tasks), ...]`` of several tasks, in increasing order.

        The block may be kept. It is not modified, unless it is ``owned``: nobody else's.
        """
        self._products = self._sparse = None
        if self.tasks:
            inside = self._owned and self._block is not None and self._inside == set(tasks) and self._layout == tuple(tasks)
            if inside and self._block is not None:
                self._block.add_(block)
            else:
                for task, gradient in zip(tasks, block.clone() if owned else block, strict=True):
                    self.add(task, gradient)
            self._arena.give(block)
        else:
            whole = block if is_block(block) else block.contiguous()
            if whole is not block:
                self._arena.give(block)
            self._layout, self._block, self._inside, self._owned = tuple(tasks), whole, set(tasks), owned
            self._of = None

    def drop(self, task: int) -> None:
        """Forgets a task's row, as if the task had not reached the parameter."""
        self._products = None
        if self.of.pop(task, None) is not None:
            self._sparse = None
        self._inside.discard(task)

    def clear(self) -> None:
        """Frees the rows, and remembers which tasks they belonged to."""
        self._layout = self.tasks or self._layout
        self._ever.update(self.tasks)
        if self._block is not None:
            self._arena.give(self._block)
        self._of, self._block, self._inside, self._owned = {}, None, set(), False
        self._dense, self._sparse, self._products = False, None, None

    def align(self) -> None:
        """Brings rows of mixed layout into one form: dense, or all sparse and coalesced."""
        if self._of is None or self._sparse is not None:
            return
        rows = self._of
        sparse = [row.is_sparse for row in rows.values()]
        if not any(sparse):
            return
        if all(sparse):
            self._of = {task: row.coalesce() for task, row in rows.items()}
            self._sparse = Sparse(self._of, self._dense)
        else:
            self._of = {task: row.to_dense() if row.is_sparse else row for task, row in rows.items()}

    def chunks(self, dtype: torch.dtype) -> Iterator[Tensor]:
        """The aligned rows, if dense, as real matrices ``[k, n]`` of consecutive coordinates. Complex ones count twice."""
        whole = len(self._inside) == len(self.tasks) == len(self._layout)
        if self._block is not None and whole and self._block.dtype == dtype:
            yield self._block.flatten(1) if self._block.dim() > 1 else self._block[:, None]
            return
        rows = [_real(self.of[task]).reshape(-1) for task in self.tasks]
        length = _CPU_CHUNK if rows[0].device.type == "cpu" else _CHUNK
        for start in range(0, rows[0].numel(), length):
            yield torch.stack([row[start : start + length] for row in rows]).to(dtype)

    def warm(self) -> None:
        """Multiplies rows that are complete, as :func:`gram` will want it, while they are in the cache."""
        self.align()
        if len(self.tasks) > 1 and self._any.device.type == "cpu":
            dtype = torch.float32 if not _is_double(self._any) and _products_are_exact() else torch.float64
            self._products = self.products(dtype)

    def products(self, dtype: torch.dtype) -> list[Tensor]:
        """Inner products ``[k, k]`` of the aligned rows, by chunks of coordinates."""
        if self._products and self._products[0].dtype == dtype:
            return self._products
        if self._sparse is not None:
            return [self._sparse.gram(dtype)]
        return [_inner_products(chunk) for chunk in self.chunks(dtype)]

    def combine(self, coefficients: Tensor) -> Tensor:
        """``sum_k c_k row_k``, of the parameter's shape, given the tasks' coefficients ``[k]`` in order."""
        if self._sparse is not None:
            return self._sparse.combine(coefficients)
        like = self._block[0] if self._of is None and self._block is not None else self._any
        result = torch.empty_like(like, memory_format=torch.contiguous_format)
        flat = _real(result).view(-1)
        coefficients = coefficients.to(like.device, torch.float64 if _is_double(like) else torch.float32)
        start = 0
        for chunk in self.chunks(coefficients.dtype):
            end = start + chunk.shape[1]
            if flat.dtype == chunk.dtype:
                torch.mv(chunk.T, coefficients, out=flat[start:end])
            else:
                flat[start:end] = torch.mv(chunk.T, coefficients)
            start = end
        return result

    def reduce(self, function: Callable[[Tensor, Tensor | None], Tensor], noise: Tensor | None) -> Tensor:
        """What a function of columns makes of the aligned rows: a tensor of the parameter's shape.

        Args:
            function: from ``[k, n]``, some coordinates of the rows, and as many of ``noise``, to ``[n]``.
            noise: ``[coordinates]``, or None.
        """
        if self._sparse is not None:
            return self._sparse.reduce(function, noise, self.precision)
        like = self._block[0] if self._of is None and self._block is not None else self._any
        result = torch.empty_like(like, memory_format=torch.contiguous_format)
        flat = _real(result).view(-1)
        length = max((_CPU_CHUNK if like.device.type == "cpu" else _CHUNK) // len(self.tasks), 1)
        start = 0
        for chunk in self.chunks(self.precision):
            for piece in torch.split(chunk, length, 1):  # the function may well take a few times the memory of its rows
                end = start + piece.shape[1]
                flat[start:end] = function(piece, None if noise is None else noise[start:end])
                start = end
        return result

    def alone(self) -> Tensor:
        """The row of the only task, as it is, in a tensor of its own."""
        (row,) = self.of.values()
        return row.to_dense() if row.is_sparse and self._dense else row.clone()

    def finite(self, task: int) -> Tensor:
        """Whether the task's aligned row is finite, a boolean on its device."""
        row = self.of[task]
        return (row.values() if row.is_sparse else row).isfinite().all()

    @property
    def maybe_sparse(self) -> bool:
        """Whether some rows may be sparse."""
        return self._of is not None

    @property
    def to_be_dense(self) -> bool:
        """Whether the combined gradient is to be dense although the rows are sparse."""
        return self._dense

    @property
    def coordinates(self) -> int:
        """How many real coordinates the parameter has."""
        row = self._block[0] if self._of is None and self._block is not None else self._any
        return row.numel() * (2 if row.is_complex() else 1)

    @property
    def precision(self) -> torch.dtype:
        """What the rows are computed with."""
        return torch.float64 if self.double else torch.float32

    @property
    def double(self) -> bool:
        """Whether a row is in double precision."""
        return _is_double(self._any) if self._of is None else any(map(_is_double, self._of.values()))

    @property
    def device(self) -> torch.device:
        """Where the rows are."""
        return self._any.device


def add_in_place(tensor: Tensor, gradient: Tensor) -> None:
    """Adds a gradient, which may be sparse, to a tensor, which may be a view."""
    # PyTorch (2.13, say) adds an entry that is a single number to a dense view at twice the view's offset: elsewhere.
    elsewhere = gradient.is_sparse and not tensor.is_sparse and not gradient.dense_dim()
    tensor.add_(gradient.to_dense() if elsewhere else gradient)


class Sparse:
    """Sparse rows, as entries: the values that tasks have at their indices.

    Args:
        rows: task → coalesced sparse row.
        dense: whether combined rows are to be dense.
    """

    def __init__(self, rows: dict[int, Tensor], dense: bool) -> None:
        own = [rows[task] for task in sorted(rows)]
        self._shape, self._dense, self._tasks = own[0].shape, dense, len(own)
        self._indices = torch.cat([row.indices() for row in own], 1)  # [d, n]
        self._values = torch.cat([row.values() for row in own])  # [n, ...]
        counts = torch.tensor([row.values().shape[0] for row in own])
        self._owner = torch.arange(len(own)).repeat_interleave(counts).to(self._values.device)

    def gram(self, dtype: torch.dtype) -> Tensor:
        """Inner products ``[k, k]``."""
        owner, values = self._owner, _real(self._values[:, None]).flatten(1).to(dtype)  # an entry may be a single number
        result = values.new_zeros(self._tasks * self._tasks)
        result.index_add_(0, owner * (self._tasks + 1), values.square().sum(1))
        # With the entries of an index next to each other, tasks that share it are a few places apart.
        place, order = self._places().sort(stable=True)
        owner, values = owner[order], values[order]
        for apart in range(1, self._tasks):
            first = (place[apart:] == place[:-apart]).nonzero().squeeze(1)
            if not len(first):
                break
            second = first + apart
            products = (values[first] * values[second]).sum(1)
            result.index_add_(0, owner[first] * self._tasks + owner[second], products)
            result.index_add_(0, owner[second] * self._tasks + owner[first], products)
        return result.view(self._tasks, self._tasks)

    def _places(self) -> Tensor:
        """A number for each entry's index, ``[n]``."""
        places = self._indices[0]
        for index, size in zip(self._indices[1:], self._shape[1:], strict=False):
            places = places * size + index
        return places

    def combine(self, coefficients: Tensor) -> Tensor:
        """The combined gradient, given the tasks' coefficients ``[k]``."""
        factors = coefficients.to(self._owner.device).index_select(0, self._owner).to(self._values.dtype)
        scaled = self._values * factors.reshape(-1, *[1] * (self._values.dim() - 1))
        combined = torch.sparse_coo_tensor(self._indices, scaled, self._shape, check_invariants=False)
        return combined.to_dense() if self._dense else combined.coalesce()

    def reduce(
        self, function: Callable[[Tensor, Tensor | None], Tensor], noise: Tensor | None, dtype: torch.dtype
    ) -> Tensor:
        """As :meth:`Rows.reduce`, of the indices that any task used."""
        places, where = torch.unique(self._places(), return_inverse=True)
        entries = torch.zeros_like(places).scatter_(0, where, torch.arange(len(where), device=where.device))
        values = torch.view_as_real(self._values) if self._values.is_complex() else self._values
        rows = values.new_zeros((self._tasks, len(places), *values.shape[1:]), dtype=dtype)
        rows[self._owner, where] = values.to(dtype)
        if noise is not None and len(places):
            noise = noise.view(-1, rows[0, 0].numel())[places].flatten()
        combined = rows[0] if not rows.numel() else function(rows.flatten(1), noise).view(rows.shape[1:])
        combined = combined.to(values.dtype)
        combined = torch.view_as_complex(combined) if self._values.is_complex() else combined
        result = torch.sparse_coo_tensor(self._indices[:, entries], combined, self._shape, check_invariants=False)
        return result.to_dense() if self._dense else result.coalesce()


def gram(parameters: Sequence[Rows]) -> Tensor:
    """The Gram matrix ``[k, k]`` of the rows of several parameters that the same ``k`` tasks reached.

    In float64, from products in float32 at least. Float32 products are used on the CPU only, where they cost much less and
    where it can be seen at once whether they left the range of float32; then, and everywhere else, float64 is used.
    """
    double = any(rows.double for rows in parameters)
    device = parameters[0].device
    if device.type == "mps":  # has no float64
        return _gram(parameters, torch.float32, device)
    if device.type == "cpu" and not double and _products_are_exact():
        result = _gram(parameters, torch.float32, device)
        squares = result.diagonal()
        if bool(((squares > 1e-24) & (squares < 1e37)).all()):
            return result
    return _gram(parameters, torch.float64, device)


def _gram(parameters: Sequence[Rows], dtype: torch.dtype, device: torch.device) -> Tensor:
    parts = [part.to(device) for rows in parameters for part in rows.products(dtype)]
    if not parts:  # parameters without any element
        return torch.zeros([len(parameters[0].tasks)] * 2, dtype=dtype, device=device)
    result = torch.stack(parts)
    return (result if device.type == "mps" else result.double()).sum(0)


def _inner_products(chunk: Tensor) -> Tensor:
    """``chunk @ chunk.T``, ``[k, k]``."""
    count = chunk.shape[1] // _PIECE if chunk.device.type == "cpu" else 0
    if count < 2:
        return chunk @ chunk.T
    # BLAS does not cut a long product of few rows by itself. Short ones are faster, and their sum is ten times as exact.
    whole = count * _PIECE
    pieces = chunk[:, :whole].view(len(chunk), count, _PIECE).transpose(0, 1)
    rest = chunk[:, whole:]
    half = len(chunk) // 2 if len(chunk) >= _MANY else 0
    lower, upper = pieces[:, half:], pieces[:, :half]
    result = rest @ rest.T
    result[half:, half:] += torch.bmm(lower, lower.mT).sum(0)
    if half:  # it is symmetric: a quarter can be left out
        above = torch.bmm(upper, pieces.mT).sum(0)
        result[:half] += above
        result[half:, :half] += above[:, half:].T
    return result


def _products_are_exact() -> bool:
    # A user may have allowed bfloat16 inside float32 matrix products; that must not reach the cosines.
    mkldnn: Any = torch.backends.mkldnn
    backends = mkldnn.matmul, mkldnn, torch.backends
    chosen = (str(backend.fp32_precision) for backend in backends)
    return next((precision for precision in chosen if precision != "none"), "ieee") == "ieee"


def _real(tensor: Tensor) -> Tensor:
    return torch.view_as_real(tensor.resolve_conj()) if tensor.is_complex() else tensor


def _is_double(tensor: Tensor) -> bool:
    return tensor.dtype in (torch.float64, torch.complex128)
