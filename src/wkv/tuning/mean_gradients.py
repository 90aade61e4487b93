"""The mean gradient of weights on a few batches, from which LoRA-GA starts (arXiv 2407.05000, section 3)."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from wkv.errors import WkvError
from wkv.layers.language_model import LanguageModel
from wkv.tuning.adapter import active_adapter
from wkv.tuning.side import AdaptedLinear


def mean_gradients(model: LanguageModel, paths: Iterable[str], batches: Iterable[Any]) -> dict[str, Tensor]:
    """The mean over batches of the gradient of each batch's mean cross-entropy. The model ends as it was.

    Memory: one float32 copy of the chosen weights, and the gradient of one of them at a time.

    Args:
        model: no adapter of its weights has an effect on the result.
        paths: of the linear layers.
        batches: `wkv.data.Batch`es, or pairs of inputs and targets, int64 [B, T].

    Returns:
        path -> float32 [O, I].

    Raises:
        WkvError: if a layer's weights are quantised, or there is no batch.
    """
    weights = {path: _weight(model, path) for path in paths}
    sums = {path: torch.zeros_like(weight, dtype=torch.float32) for path, weight in weights.items()}
    count = 0
    with _without_adapter(model), _collecting(model, weights, sums), torch.enable_grad():
        for batch in batches:
            _loss(model, batch).backward()
            count += 1
    if count == 0:
        raise WkvError("batches: found none; LoRA-GA needs a few to estimate the gradient")
    return {path: total.div_(count) for path, total in sums.items()}


def _weight(model: LanguageModel, path: str) -> nn.Parameter:
    layer: Any = model.get_submodule(path)
    base = layer.base if isinstance(layer, AdaptedLinear) else layer
    if not isinstance(base, nn.Linear):
        kind = type(base).__name__
        raise WkvError(f"{path}: {kind} has no gradient for LoRA-GA to start from; it needs weights in floating point")
    weight: Any = base.weight
    return weight


def _loss(model: LanguageModel, batch: Any) -> Tensor:
    from wkv.data import Batch  # reading text needs more than a model does

    if not isinstance(batch, Batch):
        if not isinstance(batch, tuple | list) or len(batch) != 2:
            raise WkvError(f"batches must be of Batch or pairs (inputs, targets), found {type(batch).__name__}")
        batch = Batch(*batch)
    batch = batch.to(model.ln_out.weight.device)
    logits = model(batch.inputs, mask=batch.mask, reset=batch.reset).logits
    counted = torch.ones_like(batch.targets, dtype=torch.bool) if batch.loss_mask is None else batch.loss_mask
    if not bool(counted.any()):
        raise WkvError("batches: one has no target that counts")
    return F.cross_entropy(logits[counted].float(), batch.targets[counted])


@contextmanager
def _without_adapter(model: LanguageModel) -> Iterator[None]:
    adapter = active_adapter(model, "weights")
    if adapter is not None:
        adapter.deactivate()
    try:
        yield
    finally:
        if adapter is not None:
            adapter.activate()


@contextmanager
def _collecting(model: LanguageModel, weights: dict[str, nn.Parameter], sums: dict[str, Tensor]) -> Iterator[None]:
    """Inside the block only `weights` have gradients, which go to `sums`; flags and gradients are kept."""
    parameters = list(model.parameters())
    before = [(parameter.requires_grad, parameter.grad) for parameter in parameters]
    for parameter in parameters:
        parameter.requires_grad_(False)
        parameter.grad = None
    hooks = []
    for path, weight in weights.items():
        weight.requires_grad_(True)
        hooks.append(weight.register_post_accumulate_grad_hook(_adding_to(sums[path])))
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
        for parameter, (flag, grad) in zip(parameters, before, strict=True):
            parameter.requires_grad_(flag)
            parameter.grad = grad


def _adding_to(total: Tensor) -> Any:
    def hook(weight: Tensor) -> None:
        assert weight.grad is not None
        total.add_(weight.grad)
        weight.grad = None

    return hook
