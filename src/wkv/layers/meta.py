"""Models without values, about to be loaded."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode


class _NoNormal(TorchFunctionMode):
    """Leaves out `nn.init.normal_`, which on the meta device makes torch import its compiler: 80 MB and a second."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is nn.init.normal_:
            return args[0] if args else kwargs["tensor"]
        return func(*args, **(kwargs or {}))


@contextmanager
def without_values() -> Iterator[None]:
    """Modules made inside this block are on the meta device: they have shapes and no memory."""
    with torch.device("meta"), _NoNormal():
        yield
