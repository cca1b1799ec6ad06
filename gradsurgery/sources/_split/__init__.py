"""The single pass: per-task gradients of a batch that mixes samples of different tasks.

The gradient of a weight is a sum over the batch. One backward pass therefore knows every task's share of it, wherever it is
known to which task an element of a gradient belongs:

1. ``route`` follows the autograd graph from the losses, whose tasks are given, and finds out to which task the elements of
   each intermediate gradient belong (``labels``). ``flow`` knows what most operations do to them, ``probe`` tries others.
2. Where a node sums over tasks (a weight, a scale, a learned position), ``cuts`` computes one sum per task, before the
   engine executes the node: for most kinds of nodes at no more arithmetic than the whole sum, and for all others by
   sending each task's gradients through the node alone.
3. ``source`` runs PyTorch's engine once, for what lies above; it never computes the whole sums.
4. ``verify`` compares with a plain backward pass of losses that are weighted by task at random.

Nothing of the forward pass is changed or intercepted.
"""

from .source import Pass

__all__ = ["Pass"]
