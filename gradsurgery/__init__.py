"""Gradient surgery for PyTorch: train one model on many tasks that pull against each other.

Wrap the optimizer you have, give it the loss of each task, and a rule operates on the tasks' gradients before it steps:

>>> import torch, gradsurgery as gs
>>> model = torch.nn.Linear(4, 2)
>>> opt = gs.SurgeryOptimizer(torch.optim.AdamW(model.parameters(), lr=1e-3), rule=gs.GradVac(beta=1e-2), model=model)
>>> x = torch.randn(8, 4)
>>> opt.backward({"en-fr": model(x)[:, 0].square().mean(), "en-hi": model(x)[:, 1].mean()})
>>> opt.step(); opt.zero_grad()
"""

from . import plots, sources, testing
from ._checkpoint import TrainingState
from ._coordinates import CoordinateRule
from ._operate import operate
from ._optimizer import SurgeryOptimizer
from ._recorder import Recorder
from ._report import report
from ._rule import Rule, State
from ._step import Step
from ._transfer import (
    DiscriminatorGate,
    GapCurve,
    GapRecord,
    GapResult,
    GateRecord,
    NegativeTransferGap,
    Shadow,
    reverse_gradient,
)
from .rules import (
    AGEM,
    CRMOGM,
    DWA,
    FAMO,
    GEM,
    GLS,
    IMTLG,
    IMTLL,
    MGDA,
    RLW,
    STCH,
    Adversary,
    AlignedMTL,
    CAGrad,
    Chain,
    ConFIG,
    CosineGate,
    DualProj,
    EqualNorm,
    FairGrad,
    GradDrop,
    GradNorm,
    GradVac,
    Krum,
    Mean,
    MoDo,
    NashMTL,
    PCGrad,
    ScaleInvariant,
    SDMGrad,
    Sum,
    TaskGate,
    Transference,
    TrimmedMean,
    UncertaintyWeighting,
    UPGrad,
)
from .rules._transference import TransferMatrix

__version__ = "0.1.0"

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
    "CoordinateRule",
    "CosineGate",
    "DiscriminatorGate",
    "DualProj",
    "EqualNorm",
    "FairGrad",
    "GapCurve",
    "GapRecord",
    "GapResult",
    "GateRecord",
    "GradDrop",
    "GradNorm",
    "GradVac",
    "Krum",
    "Mean",
    "MoDo",
    "NashMTL",
    "NegativeTransferGap",
    "PCGrad",
    "Recorder",
    "Rule",
    "SDMGrad",
    "ScaleInvariant",
    "Shadow",
    "State",
    "Step",
    "Sum",
    "SurgeryOptimizer",
    "TaskGate",
    "TrainingState",
    "TransferMatrix",
    "Transference",
    "TrimmedMean",
    "UPGrad",
    "UncertaintyWeighting",
    "operate",
    "plots",
    "report",
    "reverse_gradient",
    "sources",
    "testing",
]
