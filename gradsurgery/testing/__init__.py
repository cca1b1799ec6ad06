"""Checks for rules and models of your own.

``check_rule`` needs hypothesis, and so do the ``strategies``: ``pip install "gradsurgery[testing]"``.
"""

from importlib import import_module
from typing import Any

from . import oracles
from ._check_rule import RuleReport, check_rule
from ._check_rule import needs_hypothesis as _needs_hypothesis
from ._check_split import SplitReport, check_split

__all__ = ["RuleReport", "SplitReport", "check_rule", "check_split", "oracles", "strategies"]


def __getattr__(name: str) -> Any:
    if name == "strategies":  # imported when asked for: the library itself does without hypothesis
        _needs_hypothesis("gradsurgery.testing.strategies")
        return import_module(".strategies", __name__)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
