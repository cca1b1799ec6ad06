"""The rules: one file per paper."""

from ._chain import Chain
from ._dwa import DWA
from ._famo import FAMO
from ._gls import GLS
from ._gradvac import GradVac
from ._imtll import IMTLL
from ._mgda import MGDA
from ._pcgrad import PCGrad
from ._rlw import RLW
from ._scale_invariant import ScaleInvariant
from ._stch import STCH
from ._sum import Mean, Sum
from ._uncertainty import UncertaintyWeighting

__all__ = [
    "DWA",
    "FAMO",
    "GLS",
    "IMTLL",
    "MGDA",
    "RLW",
    "STCH",
    "Chain",
    "GradVac",
    "Mean",
    "PCGrad",
    "ScaleInvariant",
    "Sum",
    "UncertaintyWeighting",
]
