"""Watching memory: what autograd keeps, and how many large tensors exist at the same time."""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


@contextlib.contextmanager
def saved_tensors() -> Iterator[list[Tensor]]:
    """The tensors that autograd keeps for the backward pass of what runs inside."""
    saved: list[Tensor] = []

    def keep(tensor: Tensor) -> Tensor:
        saved.append(tensor.detach())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        yield saved


class LargeTensors(TorchDispatchMode):
    """`most`: how many memory blocks of at least `numel` values, made inside, were alive at the same time."""

    def __init__(self, numel: int) -> None:
        super().__init__()
        self.numel, self.most = numel, 0
        self.old: set[int] = set()
        self.alive: dict[int, list[weakref.ref[Tensor]]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        before = {self._place(leaf) for leaf in tree_leaves((args, kwargs or {})) if isinstance(leaf, Tensor)}
        self.old |= before - self.alive.keys()
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor) and leaf.untyped_storage().nbytes() // leaf.element_size() >= self.numel:
                place = self._place(leaf)
                if place not in self.old:
                    self.alive.setdefault(place, []).append(weakref.ref(leaf))
        self.alive = {
            place: rest for place, refs in self.alive.items() if (rest := [r for r in refs if r() is not None])
        }
        self.most = max(self.most, len(self.alive))
        return result

    @staticmethod
    def _place(tensor: Tensor) -> int:
        return tensor.untyped_storage().data_ptr()
