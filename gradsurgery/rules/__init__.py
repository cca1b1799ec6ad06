"""The rules: one file per paper."""

from ._chain import Chain
from ._gradvac import GradVac
from ._mgda import MGDA
from ._pcgrad import PCGrad
from ._sum import Mean, Sum

__all__ = ["MGDA", "Chain", "GradVac", "Mean", "PCGrad", "Sum"]
