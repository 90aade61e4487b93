"""What the tests of native kernels share."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor

from wkv import native

needs_native = pytest.mark.skipif(not native.available(), reason=f"native kernels: {native.unavailable()}")


def instruction_sets() -> list[str]:
    """Those of this build and machine."""
    usable = []
    for name in native.INSTRUCTION_SETS if native.available() else ():
        if native.function("wkv_use_instruction_set", "i")(native.INSTRUCTION_SETS.index(name)) == 0:
            usable.append(name)  # in ascending order: the last one is the best, which stays in use
    return usable


@contextmanager
def threads(count: int) -> Iterator[None]:
    """Run with `count` threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextmanager
def poisoned_memory() -> Iterator[None]:
    """Whatever torch allocates without a value holds NaN."""
    torch.use_deterministic_algorithms(True)
    try:
        assert torch.empty(3).isnan().all()
        assert torch.empty(3).new_empty(2).isnan().all()
        yield
    finally:
        torch.use_deterministic_algorithms(False)


def assert_near(actual: dict[str, Tensor], expected: dict[str, Tensor], bar: float) -> None:
    """Every tensor within `bar` of its counterpart's largest entry, or of 1 where all entries are smaller."""
    assert actual.keys() == expected.keys()
    errors = {}
    for name, tensor in expected.items():
        scale = max(1.0, tensor.detach().double().abs().max().item())
        errors[name] = (actual[name].detach().double() - tensor.detach().double()).abs().max().item() / scale
    assert all(error <= bar for error in errors.values()), errors
