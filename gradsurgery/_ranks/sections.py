"""What the ranks of one training run have in common."""

from __future__ import annotations

from collections.abc import Callable

from .agreement import Description, fingerprint
from .alone import Member

VOLATILE = ("trained parameters",)
"""What may change from step to step."""


def sections(surgery: Member, *, result: bool, whole: bool) -> dict[str, Callable[[], Description]]:
    """Descriptions of all that has to be equal, by name; with parameters' values, if every rank has the whole."""

    def tasks() -> Description:
        return None if surgery.tasks is None else {name: str(k) for k, name in enumerate(surgery.tasks)}

    def groups() -> Description:
        return {group: ", ".join(names) for group, names in surgery.gradients.groups.items()}

    def parameters() -> Description:
        gradients = surgery.gradients
        return {n: f"{tuple(p.shape)} {p.dtype}" for n, p in zip(gradients.names, gradients.parameters, strict=True)}

    def trained() -> Description:
        gradients = surgery.gradients
        return {
            n: "trained" if p.requires_grad else "frozen"
            for n, p in zip(gradients.names, gradients.parameters, strict=True)
        }

    def values() -> Description:
        gradients = surgery.gradients
        return {n: fingerprint(p) for n, p in zip(gradients.names, gradients.parameters, strict=True) if whole}

    def settings() -> Description:
        return {
            "source": repr(surgery.source),
            "nonfinite": surgery.nonfinite,
            "every": str(surgery.reuse.every or 1),
            "measure": str(not surgery.weighs_ahead),
            "reduce": "result" if result else "rows",
        }

    def generator() -> Description:
        state = surgery.generator.get_state()
        return {"seed": str(surgery.generator.initial_seed()), "state": fingerprint(state)}

    return {
        "tasks": tasks,
        "rule": lambda: {"rule": repr(surgery.given)},
        "surgery groups": groups,
        "parameters": parameters,
        "trained parameters": trained,
        "settings": settings,
        "random generator": generator,
        "parameters' values (broadcast them from one rank, as DistributedDataParallel does)": values,
    }
