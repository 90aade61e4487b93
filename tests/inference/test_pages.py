"""Giving pages of a mapped file back changes what is resident and nothing else."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

from wkv.inference.pages import give_back, give_back_libraries, read_singly

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="pages are given back on Linux only")
SIZE = 1 << 20


def resident(tensor: Tensor) -> int:
    """Pages of the tensor's memory that are present."""
    with open("/proc/self/pagemap", "rb", buffering=0) as file:
        file.seek(tensor.data_ptr() // 4096 * 8)
        return sum(entry >> 7 for entry in file.read(tensor.nbytes // 4096 * 8)[7::8])


def mapped(path: Path) -> Tensor:
    path.write_bytes(bytes(range(256)) * (SIZE // 256))
    return torch.from_file(str(path), shared=False, size=SIZE, dtype=torch.uint8)


def test_pages_of_a_file_are_given_back_and_come_again(tmp_path: Path) -> None:
    weight = mapped(tmp_path / "weights")
    expected = weight.clone()
    before = resident(weight)
    give_back([weight])
    assert resident(weight) < before == SIZE // 4096
    assert torch.equal(weight, expected)


def test_changed_weights_and_ordinary_memory_are_left_alone(tmp_path: Path) -> None:
    changed, ordinary = mapped(tmp_path / "weights"), torch.arange(SIZE, dtype=torch.int32)
    changed[SIZE // 2] = 7
    expected = changed.clone(), ordinary.clone()
    give_back([changed, ordinary, torch.empty(0)])
    assert torch.equal(changed, expected[0])
    assert torch.equal(ordinary, expected[1])


def test_rows_that_are_read_singly_are_the_same(tmp_path: Path) -> None:
    table = mapped(tmp_path / "weights")
    read_singly(table)
    assert table[::4097].tolist() == [index % 256 for index in range(0, SIZE, 4097)]


def resident_files() -> int:
    """Bytes of this process's memory that are pages of files."""
    return int(Path("/proc/self/statm").read_text().split()[2]) * 4096


def test_code_that_is_given_back_still_runs() -> None:
    torch.randn(40, 40) @ torch.randn(40, 40)
    before = resident_files()
    give_back_libraries()
    assert resident_files() < before - 10_000_000
    assert torch.equal(torch.ones(3, 4) @ torch.ones(4, 2), torch.full((3, 2), 4.0))
    give_back_libraries("no-such-library")
