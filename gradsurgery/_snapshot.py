"""What a checkpoint keeps of surgery, beside the state of the optimizer inside."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from ._state import loaded

if TYPE_CHECKING:
    from ._surgery import Surgery


def snapshot(surgery: Surgery) -> dict[str, Any]:
    """The rule's state, the random generator, and what the two are of."""
    ranks = surgery.ranks
    return {
        **_identity(surgery),
        "state": surgery.state,
        "generator": surgery.generator.get_state(),
        "skipped": dict(surgery.skipped),
        "reuse": surgery.reuse.state_dict(),
        **({"order": list(ranks.order)} if ranks.size > 1 and ranks.order else {}),
    }


def restore(surgery: Surgery, saved: Mapping[str, Any], load_inner: Callable[[], object] | None) -> None:
    """Continues from what :func:`snapshot` returned.

    Args:
        load_inner: loads the state of the optimizer inside; called when it is clear that surgery's fits.

    Raises:
        ValueError: if it is of another rule, other tasks or other groups.
    """
    _check_match(saved, _identity(surgery))
    tasks = surgery.tasks if saved["tasks"] is None else tuple(saved["tasks"])
    state = None if tasks is None else surgery.fresh_state(tasks)
    if state is not None and saved["tasks"] is not None:  # a checkpoint from before the first step has no tasks
        state = loaded(saved["state"], state)
    if load_inner is not None:
        load_inner()
    if tasks is not None and state is not None:
        surgery.set_tasks(tasks)
        surgery.state = state
    surgery.generator.set_state(saved["generator"].cpu())
    surgery.skipped = dict(saved["skipped"])
    surgery.reuse.load_state_dict(saved.get("reuse", {}), surgery.gradients)
    surgery.ranks.renew()
    surgery.ranks.order = tuple(saved.get("order", ()))


def _identity(surgery: Surgery) -> dict[str, Any]:
    return {
        "rule": repr(surgery.given),
        "tasks": None if surgery.tasks is None else list(surgery.tasks),
        "groups": {group: list(names) for group, names in surgery.gradients.groups.items()},
    }


def _check_match(saved: Mapping[str, Any], current: Mapping[str, Any]) -> None:
    """Compares what a checkpoint says of the rule, the tasks and the groups with what this optimizer has.

    Raises:
        ValueError: naming what differs.
    """
    if saved["rule"] != current["rule"]:
        raise ValueError(
            f"The checkpoint's rule is {saved['rule']}, this optimizer's is {current['rule']}. Make the optimizer with the "
            "checkpoint's rule; or load only the inner optimizer, opt.optimizer.load_state_dict(...), and let the rule "
            "start afresh."
        )
    if None not in (saved["tasks"], current["tasks"]) and saved["tasks"] != current["tasks"]:
        raise ValueError(
            f"The checkpoint's tasks are not this optimizer's{_difference(saved['tasks'], current['tasks'])}. "
            f"The checkpoint has {saved['tasks']}, this optimizer has {current['tasks']}."
        )
    if saved["groups"] != current["groups"]:
        where = _difference(list(saved["groups"]), list(current["groups"]))
        both = [name for name in saved["groups"] if name in current["groups"]]
        moved = [name for name in both if saved["groups"][name] != current["groups"][name]]
        if moved and not where:
            where = f": {', '.join(map(repr, moved))} hold other parameters"
        raise ValueError(
            f"The checkpoint's surgery groups are not this optimizer's{where}. Use the same model and the same `groups`."
        )


def _difference(saved: Sequence[str], current: Sequence[str]) -> str:
    gone = [repr(name) for name in saved if name not in current]
    added = [repr(name) for name in current if name not in saved]
    parts = []
    if gone:
        parts.append(f"only the checkpoint has {', '.join(gone)}")
    if added:
        parts.append(f"only this optimizer has {', '.join(added)}")
    if not parts and saved != current:
        parts.append("they are in another order")
    return ": " + "; ".join(parts) if parts else ""
