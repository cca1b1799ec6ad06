"""The rules: one file per paper."""

from ._aligned_mtl import AlignedMTL
from ._cagrad import CAGrad
from ._chain import Chain
from ._config import ConFIG
from ._dualproj import DualProj
from ._fairgrad import FairGrad
from ._gradvac import GradVac
from ._imtl_g import IMTLG
from ._mgda import MGDA
from ._nash_mtl import NashMTL
from ._pcgrad import PCGrad
from ._sum import Mean, Sum
from ._upgrad import UPGrad

__all__ = [
    "IMTLG",
    "MGDA",
    "AlignedMTL",
    "CAGrad",
    "Chain",
    "ConFIG",
    "DualProj",
    "FairGrad",
    "GradVac",
    "Mean",
    "NashMTL",
    "PCGrad",
    "Sum",
    "UPGrad",
]
