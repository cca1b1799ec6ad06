"""Sources of per-task gradients: ways to turn losses into rows of the buffer."""

from ._autograd import Autograd
from ._batched import Batched
from ._root import Root, Source

__all__ = ["Autograd", "Batched", "Root", "Source"]
