"""AdamW with the official parameter groups (RWKV-LM trainers)."""

from __future__ import annotations

from typing import Any

import torch

from wkv.errors import WkvError
from wkv.layers.language_model import LanguageModel

# RWKV-4 was trained with Adam's usual eps, everything newer with one that never matters.
DEFAULT_EPS = {"rwkv4": 1e-8}
OFFICIAL_EPS = 1e-18
ADAPTER_EPS = 1e-8


def parameter_groups(model: LanguageModel, weight_decay: float) -> list[dict[str, Any]]:
    """Group the trainable parameters by `model.parameter_rule`, those of adapters by the adapter's.

    Returns:
        one dictionary per (factor, decays) that occurs: `params`, `names`, `factor` on the learning rate, and
        `weight_decay` (0 for parameters that must not decay).

    Raises:
        WkvError: if no parameter is trainable.
    """
    groups: dict[tuple[float, bool], dict[str, Any]] = {}
    rules = {id(p): a.parameter_rule for a in model.adapters.values() for p in a.named_parameters().values()}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        factor, decays = rules.get(id(parameter), model.parameter_rule)(name, parameter)
        fresh = {"params": [], "names": [], "factor": factor, "weight_decay": weight_decay if decays else 0.0}
        group = groups.setdefault((factor, decays), fresh)
        group["params"].append(parameter)
        group["names"].append(name)
    if not groups:
        raise WkvError("the model has no trainable parameter; set requires_grad on those that should learn")
    return list(groups.values())


def create_optimizer(
    model: LanguageModel,
    learning_rate: float,
    weight_decay: float = 0.0,
    betas: tuple[float, float] = (0.9, 0.99),
    eps: float | None = None,
) -> torch.optim.AdamW:
    """AdamW over `parameter_groups`, fused where torch can.

    Args:
        model: its class says which parameters learn faster and which decay.
        learning_rate: of the groups with factor 1.
        weight_decay: decoupled, of the matrices only.
        betas, eps: Adam's constants; eps None is 1e-8 for RWKV-4 and for adapters, 1e-18 for others.
    """
    groups = parameter_groups(model, weight_decay)
    if eps is None:
        eps = ADAPTER_EPS if model.adapters else DEFAULT_EPS.get(model.name, OFFICIAL_EPS)
    fused = all(parameter.device.type in ("cpu", "cuda") for group in groups for parameter in group["params"])
    optimizer = torch.optim.AdamW(groups, lr=learning_rate, betas=betas, eps=eps, fused=fused)
    set_learning_rate(optimizer, learning_rate)
    return optimizer


def set_learning_rate(optimizer: torch.optim.Optimizer, learning_rate: float) -> None:
    """Give every group `learning_rate` times its own factor."""
    for group in optimizer.param_groups:
        group["lr"] = learning_rate * group["factor"]
