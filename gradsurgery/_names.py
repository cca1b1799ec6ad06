"""Names of an optimizer's parameters."""

from __future__ import annotations

import torch
from torch import nn

from ._groups import some


def parameter_names(optimizer: torch.optim.Optimizer, model: nn.Module | None) -> dict[str, nn.Parameter]:
    """All parameters that the optimizer holds, in its order, by name.

    The names are the model's; without a model, those that the optimizer was given
    (``AdamW(model.named_parameters())``), or ``param0``, ``param1``, ….

    Raises:
        ValueError: if the optimizer lacks a trainable parameter of the model, or holds one that is not the model's.
    """
    held: dict[int, tuple[str, nn.Parameter]] = {}
    for group in optimizer.param_groups:
        names = group.get("param_names") or [f"param{len(held) + i}" for i in range(len(group["params"]))]
        for name, parameter in zip(names, group["params"], strict=True):
            held[id(parameter)] = name, parameter
    if model is None:
        return dict(held.values())

    known = {id(parameter): name for name, parameter in model.named_parameters()}
    missing = [
        name for name, parameter in model.named_parameters() if parameter.requires_grad and id(parameter) not in held
    ]
    if missing:
        raise ValueError(
            f"The model has trainable parameters that the optimizer does not hold: {some(missing)}. Add them to the "
            "optimizer, freeze them with requires_grad_(False), or pass as `model` only what this optimizer trains."
        )
    foreign = [f"{name} {tuple(parameter.shape)}" for key, (name, parameter) in held.items() if key not in known]
    if foreign:
        raise ValueError(
            f"The optimizer holds parameters that are not in `model`: {some(foreign)}. Pass the module that contains "
            "them all, say nn.ModuleList([model, criterion])."
        )
    return {known[key]: parameter for key, (_, parameter) in held.items()}
