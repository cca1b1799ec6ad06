"""The rules: one file per paper."""

from ._adversary import Adversary
from ._agem import AGEM
from ._aligned_mtl import AlignedMTL
from ._cagrad import CAGrad
from ._chain import Chain
from ._config import ConFIG
from ._cosine_gate import CosineGate
from ._cr_mogm import CRMOGM
from ._dualproj import DualProj
from ._dwa import DWA
from ._equal_norm import EqualNorm
from ._fairgrad import FairGrad
from ._famo import FAMO
from ._gem import GEM
from ._gls import GLS
from ._graddrop import GradDrop
from ._gradnorm import GradNorm
from ._gradvac import GradVac
from ._imtl_g import IMTLG
from ._imtll import IMTLL
from ._krum import Krum
from ._mgda import MGDA
from ._modo import MoDo
from ._nash_mtl import NashMTL
from ._pcgrad import PCGrad
from ._rlw import RLW
from ._scale_invariant import ScaleInvariant
from ._sdmgrad import SDMGrad
from ._stch import STCH
from ._sum import Mean, Sum
from ._task_gate import TaskGate
from ._transference import Transference
from ._trimmed_mean import TrimmedMean
from ._uncertainty import UncertaintyWeighting
from ._upgrad import UPGrad

__all__ = [
    "AGEM",
    "CRMOGM",
    "DWA",
    "FAMO",
    "GEM",
    "GLS",
    "IMTLG",
    "IMTLL",
    "MGDA",
    "RLW",
    "STCH",
    "Adversary",
    "AlignedMTL",
    "CAGrad",
    "Chain",
    "ConFIG",
    "CosineGate",
    "DualProj",
    "EqualNorm",
    "FairGrad",
    "GradDrop",
    "GradNorm",
    "GradVac",
    "Krum",
    "Mean",
    "MoDo",
    "NashMTL",
    "PCGrad",
    "SDMGrad",
    "ScaleInvariant",
    "Sum",
    "TaskGate",
    "Transference",
    "TrimmedMean",
    "UPGrad",
    "UncertaintyWeighting",
]
