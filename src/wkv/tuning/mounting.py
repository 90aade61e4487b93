"""Which layers of a model an adapter is for, and how they are put in place and taken away."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from fnmatch import fnmatchcase
from typing import Any

from torch import nn

from wkv.errors import WkvError
from wkv.layers.language_model import LanguageModel
from wkv.tuning.side import AdaptedLinear

STATE = "initial_state"  # where a tuned initial state is in a model


def linear_layers(model: LanguageModel) -> dict[str, nn.Module]:
    """Path -> linear layer of all blocks, those with quantised weights and those with adapters included."""
    found: dict[str, nn.Module] = {}
    for path, module in model.named_modules():
        inside = any(path.startswith(f"{outer}.") for outer in found)
        if path.startswith("blocks.") and not inside and hasattr(module, "in_features"):
            found[path] = module
    return found


def choose_layers(model: LanguageModel, targets: str | Sequence[str] | None) -> list[str]:
    """Paths of the layers that `targets` names.

    Args:
        targets: names such as "key" (every layer so called), "att.key", "att", "blocks.3", "blocks.0.ffn.value", or
            patterns such as "blocks.[0-3].att.*". None: all matrices of time mix and channel mix.

    Raises:
        WkvError: for a name that no layer has.
    """
    layers = list(linear_layers(model))
    if targets is None:
        return [path for path in layers if not path.endswith("s_emb_x")]  # RWKV-7a's is a part of its embedding
    names = [targets] if isinstance(targets, str) else list(targets)
    chosen: set[str] = set()
    for name in names:
        found = [path for path in layers if _matches(path, name)]
        if not found:
            known = sorted({path.split(".", 2)[2] for path in layers})
            raise WkvError(f"targets: no linear layer of {model.name} is called {name!r}; there are {', '.join(known)}")
        chosen.update(found)
    if not chosen:
        raise WkvError("targets: name at least one layer")
    return [path for path in layers if path in chosen]


def _matches(path: str, name: str) -> bool:
    """Whether `name` is a run of whole parts of `path`, or a pattern for all of it."""
    return f".{name}." in f".{path}." or fnmatchcase(path, name)


def adapted(model: LanguageModel, path: str) -> AdaptedLinear:
    """The layer at `path` with room for adapters; it is put into the model if there is none yet."""
    layer = model.get_submodule(path)
    if isinstance(layer, AdaptedLinear):
        return layer
    made = AdaptedLinear(layer)
    made.train(layer.training)
    replace(model, path, made)
    return made


def replace(model: nn.Module, path: str, layer: nn.Module) -> None:
    """Put `layer` at `path`."""
    parent, _, leaf = path.rpartition(".")
    setattr(model.get_submodule(parent), leaf, layer)


def base_parameters(model: LanguageModel) -> Iterator[tuple[str, nn.Parameter]]:
    """Official name and parameter of everything that is the model's own and not quantised."""
    for name, parameter in model.named_parameters():
        if not name.startswith(f"{STATE}.") and ".sides." not in name:
            yield name.replace(".base.", "."), parameter


def require_language_model(model: Any) -> LanguageModel:
    """The model, if it is one of this library."""
    if not isinstance(model, LanguageModel):
        raise WkvError(f"adapters are for the language models of this library, found {type(model).__name__}")
    return model
