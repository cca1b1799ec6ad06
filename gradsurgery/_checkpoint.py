"""Training states that any number of ranks can save and load."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

from ._rule import State

if TYPE_CHECKING:
    from ._optimizer import SurgeryOptimizer


class TrainingState:
    """The state of a model and its optimizer, for ``torch.distributed.checkpoint``.

    It has the same entries on any number of ranks, and parameters are in it by name: what 4 ranks saved, 2 or 1 continue
    from, sharded or not.

    Args:
        model: the model, in whatever wrapper it is trained.
        optimizer: the :class:`SurgeryOptimizer`. Its tasks have to be known.

    Raises:
        TypeError: if ``optimizer`` is another optimizer.
        ValueError: (by its methods) if the tasks are not known yet; and on loading, if the checkpoint has another
            rule, other tasks or other groups.

    Example:
        >>> import torch, gradsurgery as gs
        >>> model = torch.nn.Linear(2, 1)
        >>> opt = gs.SurgeryOptimizer(torch.optim.Adam(model.parameters()), gs.PCGrad(), model=model, tasks=["a", "b"])
        >>> training = gs.TrainingState(model, opt)
        >>> # torch.distributed.checkpoint.save({"training": training}, checkpoint_id=path), and load the same way:
        >>> training.load_state_dict(training.state_dict())

    Note:
        Save between steps, after ``zero_grad``. One process continues bit for bit; another number of ranks to rounding.
    """

    def __init__(self, model: nn.Module, optimizer: SurgeryOptimizer) -> None:
        from ._optimizer import SurgeryOptimizer

        if not isinstance(optimizer, SurgeryOptimizer):
            raise TypeError(f"`optimizer` must be a SurgeryOptimizer. Found {type(optimizer).__name__}.")
        self._model = model
        self._optimizer = optimizer

    def state_dict(self) -> dict[str, Any]:
        """What is saved, and what is loaded into."""
        model, inner = get_state_dict(self._model, self._optimizer.optimizer)
        return {"model": model, "optimizer": inner, "surgery": self._surgery()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continues from what was loaded."""
        saved = state_dict["surgery"]
        about = json.loads(saved["about"])
        reuse = about.pop("reuse")
        if about.pop("reuses"):
            reuse.update(weights=saved["weights"], own=saved["own"])
        self._optimizer.load_surgery({**about, "state": saved["state"], "generator": saved["generator"], "reuse": reuse})
        set_state_dict(
            self._model,
            self._optimizer.optimizer,
            model_state_dict=state_dict["model"],
            optim_state_dict=state_dict["optimizer"],
        )

    def _surgery(self) -> dict[str, Any]:
        saved = self._optimizer.surgery_state()
        if saved["tasks"] is None:
            raise ValueError(
                "The optimizer does not know the tasks yet, and what they are called is part of its state: make it with "
                "tasks=[...], their names or number."
            )
        state, generator = saved.pop("state"), saved.pop("generator")
        weights, own = (saved["reuse"].pop(key).cpu().double() for key in ("weights", "own"))
        reuses = len(weights) > 0
        none = torch.ones(len(saved["tasks"]), dtype=torch.float64)  # as what is there has to be of one shape
        return {
            "about": json.dumps({**saved, "reuses": reuses}),
            "state": _own(state),
            "generator": generator.clone(),
            "weights": weights.clone() if reuses else none,
            "own": own.clone() if reuses else none.clone(),
        }


def _own(state: State) -> State:
    """A copy whose tensors have memory of their own, to load into."""
    return {
        key: _own(value) if isinstance(value, dict) else value.contiguous().clone() if isinstance(value, Tensor) else value
        for key, value in state.items()
    }
