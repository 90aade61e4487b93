"""The list of models: name -> configuration class, model class, published sizes."""

from __future__ import annotations

import dataclasses
import fnmatch
import importlib
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, TypeVar

from wkv.errors import WkvError

if TYPE_CHECKING:
    from wkv.layers.config import LanguageModelConfig
    from wkv.layers.language_model import LanguageModel

# Where each model lives. The module is imported when its model is first asked for.
_MODULES = {
    "rwkv4": "wkv.models.rwkv4",
    "rwkv5": "wkv.models.rwkv5",
    "rwkv5_0": "wkv.models.rwkv5",
    "rwkv5_1": "wkv.models.rwkv5",
    "rwkv6": "wkv.models.rwkv6",
    "rwkv7": "wkv.models.rwkv7",
    "rwkv7a": "wkv.models.rwkv7a",
    "temporal": "wkv.models.temporal",
    "rrwkv": "wkv.models.rrwkv",
    "meta_state": "wkv.models.meta_state",
    "based": "wkv.models.based",
    "hybrid": "wkv.models.hybrid",
    "transformer": "wkv.models.transformer",
}


@dataclasses.dataclass(frozen=True)
class Entry:
    """One registered model. `presets` maps published sizes ("0.1b") to configuration fields."""

    config_class: type[Any]
    model_class: type[Any]
    presets: Mapping[str, Mapping[str, Any]]


_entries: dict[str, Entry] = {}
M = TypeVar("M", bound=type)


def register_model(
    name: str, config_class: type[Any], presets: Mapping[str, Mapping[str, Any]] | None = None
) -> Callable[[M], M]:
    """Class decorator: make the model known under `name`."""

    def add(model_class: M) -> M:
        _entries[name] = Entry(config_class, model_class, presets or {})
        return model_class

    return add


def list_models(pattern: str = "*") -> list[str]:
    """Names of all models, optionally those that match a shell pattern such as "rwkv5*"."""
    return sorted(fnmatch.filter(_MODULES.keys() | _entries.keys(), pattern))


def entry(name: str) -> Entry:
    """What is registered under `name`."""
    if name not in _entries and name in _MODULES:
        importlib.import_module(_MODULES[name])
    if name not in _entries:
        raise WkvError(f"model {name!r} is unknown; one of {', '.join(list_models())}")
    return _entries[name]


def create_config(name: str, preset: str | None = None, **overrides: Any) -> LanguageModelConfig:
    """The configuration of model `name`: the fields of `preset`, then `overrides`, the rest by the official rules."""
    found = entry(name)
    if preset is not None and preset not in found.presets:
        raise WkvError(f"{name} has no preset {preset!r}; one of {', '.join(found.presets) or 'none'}")
    fields = {**(found.presets[preset] if preset else {}), **overrides}
    known = {field.name for field in dataclasses.fields(found.config_class) if field.init}
    for key in fields:
        if key not in known:
            raise WkvError(f"{name} has no option {key!r}; one of {', '.join(sorted(known))}")
    missing = {"vocab_size", "hidden_size", "num_layers"} - fields.keys()
    if missing:
        raise WkvError(f"{name} needs {', '.join(sorted(missing))} (or a preset: {', '.join(found.presets) or 'none'})")
    return found.config_class(**fields)


def create_model(name: str, preset: str | None = None, **overrides: Any) -> LanguageModel:
    """A new model with the official initial values.

    Args:
        name: a name from `list_models()`.
        preset: a published size, such as "0.1b"; sizes can be overridden.
        overrides: configuration fields: vocab_size, hidden_size, num_layers, head_size, ...

    Raises:
        WkvError: for an unknown name, preset or option, or sizes that do not fit together.
    """
    config = create_config(name, preset, **overrides)
    model: LanguageModel = entry(name).model_class(config)
    return model
