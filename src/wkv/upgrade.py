"""From a trained model to a descendant of its architecture that says the same at first."""

from __future__ import annotations

from typing import Any

from wkv.errors import WkvError
from wkv.layers.language_model import LanguageModel
from wkv.registry import entry, list_models


def upgrade_model(model: LanguageModel, name: str, **options: Any) -> LanguageModel:
    """A new model of another architecture with the weights of `model`; its logits are the same before any training.

    RWKV-4 becomes "temporal" or "rrwkv", RWKV-7 "meta_state" or "hybrid", a transformer "hybrid".

    Args:
        model: the trained model; not changed. Type, device, tokenizer and mode stay those of it.
        name: the architecture.
        options: of the new parts, see the configuration of that model.

    Raises:
        WkvError: if `name` is unknown or not made of other models, or `model` is not what it is made of.
    """
    found = getattr(entry(name).model_class, "from_base", None)
    if found is None:
        targets = [other for other in list_models() if hasattr(entry(other).model_class, "from_base")]
        raise WkvError(f"{name} is not made of other models; one of {', '.join(targets)}")
    if not isinstance(model, LanguageModel):
        raise WkvError(f"upgrade_model takes a model of this library, found {type(model).__name__}")
    if model.adapters:
        raise WkvError(f"the model carries the adapter {next(iter(model.adapters))!r}: merge or remove it first")
    upgraded: LanguageModel = found(model, **options)
    upgraded.tokenizer = model.tokenizer
    return upgraded.train(model.training)
