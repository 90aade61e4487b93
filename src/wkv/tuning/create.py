"""`create` and `load`: adapters on models."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import nn

from wkv.errors import WkvError
from wkv.layers.language_model import LanguageModel
from wkv.tuning.adapter import Adapter, active_adapter, check_unmerged
from wkv.tuning.files import AdapterFile, read_adapter
from wkv.tuning.fingerprint import check_same_base
from wkv.tuning.methods import METHODS, canonical
from wkv.tuning.mounting import base_parameters, require_language_model


def create(method: str, model: LanguageModel, name: str = "default", **options: Any) -> Adapter:
    """Mount a new adapter on a model, active; the model's own parameters are frozen.

    At first it changes nothing (methods that start from a decomposition of the weights: only by rounding).

    Args:
        method: one of `wkv.tuning.methods()`.
        model: a language model of this library, also with quantised weights where the method can.
        name: of this adapter among those of the model.
        options: of the method: `rank`, `targets` and others, see the method's class.

    Raises:
        WkvError: for an unknown method, name or option, or sizes that do not fit; the model is as it was then.
    """
    found = canonical(method)
    model = require_language_model(model)
    return _mounted(METHODS[found].adapter_class(), model, found, name, options)


def load(
    path: str | os.PathLike[str], model: LanguageModel, name: str | None = None, check_base: bool = True
) -> Adapter:
    """Mount an adapter from a file written by `Adapter.save`, active.

    Args:
        path: the file.
        model: the model it was trained on, in any floating type, or quantised.
        name: of the adapter among those of the model; by default the file's name.
        check_base: refuse a model with other weights.

    Raises:
        CheckpointError: if the file cannot be read.
        WkvError: if it is for another model.
    """
    return mount_file(read_adapter(path), model, name or Path(path).stem.replace(".", "-"), str(path), check_base)


def mount_file(file: AdapterFile, model: LanguageModel, name: str, what: str, check_base: bool = True) -> Adapter:
    """Mount an adapter that has been read; `what` is how errors call it."""
    model = require_language_model(model)
    check_unmerged(model)
    if file.model != model.name:
        raise WkvError(f"{what} is an adapter of {file.model}, the model is {model.name}")
    sizes = model.config.to_dict()
    other = [key for key, value in file.config.items() if sizes.get(key) != value]
    if other:
        found = f"{other[0]} {file.config[other[0]]}, the model has {sizes.get(other[0])}"
        raise WkvError(f"{what} is an adapter of a model with {found}; load the checkpoint it was trained on")
    if check_base and file.base:
        check_same_base(file.base, model, what)
    method = canonical(file.method)
    made = METHODS[method].adapter_class()
    adapter = _mounted(made, model, method, name, file.options, restoring=True)
    try:
        adapter.load_tensors(file.tensors)
    except WkvError as error:
        adapter.remove()
        raise WkvError(f"{what}: {error}") from error
    if file.base:
        adapter.base = file.base
    return adapter


def _mounted(
    kind: type[Adapter], model: LanguageModel, method: str, name: str, options: dict[str, Any], restoring: bool = False
) -> Adapter:
    check_unmerged(model)
    if not name or not isinstance(name, str) or "." in name or hasattr(nn.ModuleDict, name):
        raise WkvError(f"the name of an adapter is a text without dots, and no method of a module, found {name!r}")
    if name in model.adapters:
        raise WkvError(f"the model has an adapter {name!r} already; remove it, or choose another name")
    adapter = kind.build(model, method, name, options, restoring)
    adapter.mount()
    model.adapters[name] = adapter
    for _, parameter in base_parameters(model):
        parameter.requires_grad_(False)
    adapter.activate()
    return adapter


@contextmanager
def using(model: LanguageModel, *names: str) -> Iterator[None]:
    """Inside the block exactly the adapters of these names have an effect on the model; afterwards those from before.

    Without names the model does what its base does. A service switches adapters between requests with this.

    Raises:
        WkvError: for an unknown name, or two adapters of one kind.
    """
    unknown = next((name for name in names if name not in model.adapters), None)
    if unknown is not None:
        raise WkvError(f"the model has no adapter {unknown!r}; it has {', '.join(model.adapters) or 'none'}")
    chosen = [model.adapters[name] for name in names]
    if len({adapter.kind for adapter in chosen}) < len(chosen):
        raise WkvError(f"of each kind one adapter can be active, found {', '.join(names)}")
    before = [adapter for kind in list(model.active_adapters) if (adapter := active_adapter(model, kind)) is not None]
    _switch(before, chosen)
    try:
        yield
    finally:
        _switch(chosen, before)


def _switch(before: list[Adapter], after: list[Adapter]) -> None:
    for adapter in before:
        if adapter not in after:
            adapter.deactivate()
    for adapter in after:
        adapter.activate()
