"""What all ranks have to have in common, and errors that name what they do not."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from .wire import Wire

Description = Mapping[str, str] | None
"""What is to be compared, by name; None where a rank does not know yet."""

_CHUNK = 1 << 22
_SHOWN = 3


class Agreement:
    """Compares short numbers that stand for all that ranks have to have in common, at each meeting.

    Only where they differ are the things themselves exchanged: every rank then raises the same error. As all ranks send
    messages of one size, whatever they hold, none is left waiting.

    Args:
        wire: the collectives.
        sections: what is compared: its name → a function that describes it.
        volatile: names of those that may change at any time, and are described anew at each meeting.
        adopt: takes over a description that this rank does not know yet, but others do.
    """

    def __init__(
        self,
        wire: Wire,
        sections: Mapping[str, Callable[[], Description]],
        volatile: Sequence[str],
        adopt: Callable[[str, Mapping[str, str]], None],
    ) -> None:
        self._wire = wire
        self._sections = sections
        self._volatile = volatile
        self._adopt = adopt
        self._digests: dict[str, int] = {}

    def renew(self) -> None:
        """Describes everything anew at the next meeting."""
        self._digests.clear()

    def meet(self, *facts: int) -> list[list[int]]:
        """Makes sure that all agree, and tells each the facts of all.

        Raises:
            ValueError: naming what differs, on every rank.
        """
        for name, describe in self._sections.items():
            if name in self._volatile or name not in self._digests:
                self._digests[name] = digest(describe())
        table = self._wire.gather_numbers([*self._digests.values(), *facts])
        differing = [name for i, name in enumerate(self._digests) if len({row[i] for row in table}) > 1]
        if differing:
            self._reconcile(differing)
        return [row[len(self._sections) :] for row in table]

    def compare(self, what: Mapping[str, Description]) -> None:
        """Makes sure that these are the same on all ranks.

        Raises:
            ValueError: naming what differs, on every rank.
        """
        table = self._wire.gather_numbers([digest(description) for description in what.values()])
        differing = [name for i, name in enumerate(what) if len({row[i] for row in table}) > 1]
        if differing:
            self._raise(differing, self._wire.gather_objects({name: what[name] for name in differing}))

    def _reconcile(self, differing: Sequence[str]) -> None:
        self.renew()  # one rank may have described something earlier than another did
        found = self._wire.gather_objects({name: self._sections[name]() for name in differing})
        for name in differing:
            known = [ours[name] for ours in found if ours[name] is not None]
            if all(description == known[0] for description in known):
                if found[self._wire.rank][name] is None:
                    self._adopt(name, known[0])
                for ours in found:
                    ours[name] = known[0]
        self._raise(differing, found)
        self.renew()

    def _raise(self, differing: Sequence[str], found: Sequence[Mapping[str, Description]]) -> None:
        for name in differing:
            first = found[0][name]
            for rank, ours in zip(self._wire.names, found, strict=True):
                if ours[name] != first:
                    where = difference(self._wire.names[0], first or {}, rank, ours[name] or {})
                    raise ValueError(f"The ranks disagree about the {name}: {where}.")


def difference(first: int, ours: Mapping[str, str], second: int, theirs: Mapping[str, str]) -> str:
    """Names what two ranks' descriptions do not have in common."""
    parts = []
    for rank, mine, other in ((first, ours, theirs), (second, theirs, ours)):
        if only := [name for name in mine if name not in other]:
            parts.append(f"only rank {rank} has {_some(only)}")
    changed = [name for name in ours if name in theirs and ours[name] != theirs[name]]
    for name in changed[:_SHOWN]:
        parts.append(f"{name!r} is {ours[name]} on rank {first}, and {theirs[name]} on rank {second}")
    if len(changed) > _SHOWN:
        parts.append(f"so do {len(changed) - _SHOWN} more")
    return "; ".join(parts) or f"rank {first} has them in another order than rank {second}"


def _some(names: Sequence[str]) -> str:
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(map(repr, names[:_SHOWN])) + more


def digest(description: Description) -> int:
    """63 bits that stand for a description, the same in all processes."""
    content = repr(None if description is None else list(description.items())).encode()
    return int.from_bytes(hashlib.blake2b(content, digest_size=8).digest(), "big") >> 1


def fingerprint(tensor: Tensor) -> str:
    """A short text that stands for the bits of a tensor. Waits for the device."""
    bits = (tensor.to_dense() if tensor.is_sparse else tensor).detach().contiguous()
    bits = torch.view_as_real(bits.resolve_conj()) if bits.is_complex() else bits
    sized = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    flat = bits.view(-1).view(sized[bits.element_size()])
    total = torch.zeros((), dtype=torch.int64, device=flat.device)
    for start in range(0, flat.numel(), _CHUNK):
        chunk = flat[start : start + _CHUNK].to(torch.int64)
        place = torch.arange(start + 1, start + 1 + chunk.numel(), device=flat.device)
        total += ((chunk + place) * (place * 0x9E3779B1 + 1)).sum()  # integers that wrap around: exact in any order
    return f"{int(total) & (1 << 64) - 1:016x}"


def leaves(tree: Any, name: str = "") -> dict[str, str]:
    """Fingerprints of the tensors of a tree of dictionaries, and texts of all else."""
    if isinstance(tree, Mapping):
        result = {}
        for key, value in tree.items():
            result.update(leaves(value, f"{name}.{key}" if name else str(key)))
        return result
    return {name: fingerprint(tree) if isinstance(tree, Tensor) else repr(tree)}
