"""Living with ``torch.compile``: surgery itself runs as it is, and says so once."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Concatenate, ParamSpec, TypeVar

import torch
from torch import nn

P = ParamSpec("P")
S = TypeVar("S")
T = TypeVar("T")

_said: set[str] = set()
_eager: Callable[..., Any] | None = None


def left_out(method: Callable[Concatenate[S, P], T]) -> Callable[Concatenate[S, P], T]:
    """Keeps ``torch.compile`` out of a method, which may be called from compiled code.

    Surgery runs backward passes, draws from a generator and frees memory as it goes: the compiler would cut it into dozens
    of pieces, each of them too small to gain anything, and take longer for them than without.
    """

    @functools.wraps(method)
    def called(self: S, /, *args: P.args, **kwargs: P.kwargs) -> T:
        if torch.compiler.is_compiling() and _eager is not None:
            result: T = _eager(method, self, *args, **kwargs)
            return result
        return method(self, *args, **kwargs)

    return called


def prepare() -> None:
    """Makes ready for :func:`left_out`: the compiler's package, which takes long to import, is there with an optimizer."""
    global _eager
    if _eager is None:
        _eager = torch.compiler.disable(_call, reason="gradient surgery is not compiled")  # type: ignore[no-untyped-call]


def _call(method: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    say(
        "torch.compile leaves gradient surgery as it is, and compiles what is before and after it. Compile the model, or "
        "the function that computes the losses, and call backward(), combine() and step() outside."
    )
    return method(*args, **kwargs)


@contextmanager
def uncompiled() -> Iterator[None]:
    """Runs compiled models as they are: in a single pass, a compiled part takes a backward pass for each task."""
    if torch.compiler.is_compiling():
        yield
    else:
        with torch.compiler.set_stance("force_eager"):
            yield


def is_compiled(model: nn.Module) -> bool:
    """Whether a model, or a part of it, is compiled."""
    return any(hasattr(m, "_orig_mod") or getattr(m, "_compiled_call_impl", None) is not None for m in model.modules())


def say(message: str) -> None:
    """Warns, once in the life of the process."""
    if message not in _said:
        _said.add(message)
        warnings.warn(message, stacklevel=3)
