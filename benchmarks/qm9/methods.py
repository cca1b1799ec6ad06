"""What is compared."""

from __future__ import annotations

from collections.abc import Callable

import gradsurgery as gs

METHODS: dict[str, Callable[[], gs.Rule | None]] = {
    "LS": lambda: None,  # equal weighting: plain training on the mean of all losses
    "MGDA": gs.MGDA,
    "PCGrad": gs.PCGrad,
    "GradVac": gs.GradVac,
}
