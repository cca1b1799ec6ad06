"""Which settings of an optimizer go together."""

from __future__ import annotations

from ._coordinates import AnyRule, parts
from ._rule import implements


def check_settings(rule: AnyRule, *, nonfinite: str, every: int, measure: bool, source: str) -> None:
    """Looks at the arguments of :class:`SurgeryOptimizer` of these names.

    Raises:
        ValueError: for one out of range, and for those that exclude each other.
    """
    if nonfinite not in ("propagate", "raise", "skip"):
        raise ValueError(f"`nonfinite` must be 'propagate', 'raise' or 'skip'. Found {nonfinite!r}.")
    if isinstance(every, bool) or not isinstance(every, int) or every < 1:
        raise ValueError(f"`every` must be a number of steps, at least 1. Found {every!r}.")
    if nonfinite != "propagate" and every > 1:
        raise ValueError(
            f"nonfinite={nonfinite!r} needs every=1: a step that reuses a mixing has no gradients of single tasks."
        )
    own, coordinates = parts(rule)
    if coordinates is not None and (every > 1 or not measure):
        setting = f"every={every}" if every > 1 else "measure=False"
        raise ValueError(f"{setting} needs weights of tasks, and there are none for {coordinates}. Leave it out.")
    if not measure:
        if moments := [moment for moment in ("mix", "observe") if implements(own, moment)]:
            raise ValueError(
                f"measure=False is for rules that only weigh losses, or do nothing. {rule} needs each task's gradient, "
                f"in {' and '.join(moments)}()."
            )
        if nonfinite != "propagate" or every > 1:
            setting = f"nonfinite={nonfinite!r}" if nonfinite != "propagate" else f"every={every}"
            raise ValueError(f"{setting} is about gradients of single tasks, which measure=False does not compute.")
    if nonfinite != "propagate" and source == "batched":
        raise ValueError(
            f"nonfinite={nonfinite!r} needs source='autograd': in a vectorised pass, one task's inf or nan reaches the "
            "gradients of all others."
        )
