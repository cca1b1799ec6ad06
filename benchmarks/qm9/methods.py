"""What is compared."""

from __future__ import annotations

from collections.abc import Callable

import gradsurgery as gs

METHODS: dict[str, Callable[[], gs.Rule | None]] = {
    "LS": lambda: None,  # equal weighting: plain training on the mean of all losses
    "SI": gs.ScaleInvariant,
    "RLW": gs.RLW,
    "UW": gs.UncertaintyWeighting,
    "FAMO": gs.FAMO,
    "MGDA": gs.MGDA,
    "PCGrad": gs.PCGrad,
    "GradVac": gs.GradVac,
    "CAGrad": gs.CAGrad,
    "IMTL-G": gs.IMTLG,
    "Nash-MTL": gs.NashMTL,
    "Aligned-MTL": gs.AlignedMTL,
    "FairGrad": gs.FairGrad,
}
"""With the settings that each has by default."""
