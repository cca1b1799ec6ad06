"""Negative transfer: does what a task learns from others help it, and how to keep out what does not.

* ``gap`` measures it: an algorithm with and without the source, over seeds;
* ``shadow`` measures it as training goes, by a target-only run beside the real one;
* ``gate`` weighs source samples by how much they resemble the target;
* ``reversal`` is the gradient reversal function of adversarial training.

The rules :class:`Adversary`, :class:`TaskGate` and :class:`Transference` are with the other rules.
"""

from .gap import GapCurve, GapResult, NegativeTransferGap
from .gate import DiscriminatorGate, GateRecord
from .reversal import reverse_gradient
from .shadow import GapRecord, Shadow

__all__ = [
    "DiscriminatorGate",
    "GapCurve",
    "GapRecord",
    "GapResult",
    "GateRecord",
    "NegativeTransferGap",
    "Shadow",
    "reverse_gradient",
]
