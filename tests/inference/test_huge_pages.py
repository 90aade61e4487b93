"""Moving weights to large pages changes where they are and nothing else."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

import wkv
from wkv.inference.huge_pages import use_huge_pages
from wkv.inference.native_rwkv7 import copied_names
from wkv.quantization import quantize_model

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="large pages are asked for on Linux only")


@pytest.mark.parametrize("bits", [None, 8, 4])
def test_values_and_parameters_stay(bits: int | None, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = wkv.create_model("rwkv7", vocab_size=300, hidden_size=128, num_layers=2)
    if bits is not None:
        wkv.save_model(quantize_model(model, bits=bits), tmp_path / "model.safetensors")
        model = wkv.load_model(tmp_path / "model.safetensors")
    tokens = torch.randint(0, 300, (2, 9))
    before, parameters = model(tokens).logits.detach(), list(model.parameters())
    addresses = [x.data_ptr() for x in [*model.parameters(), *model.buffers()] if x.nbytes > 1 << 14]
    assert use_huge_pages(model) > 100_000
    assert all(a is b for a, b in zip(parameters, model.parameters(), strict=True))
    moved = [x.data_ptr() for x in [*model.parameters(), *model.buffers()] if x.nbytes > 1 << 14]
    staying = 2 + sum(model.get_parameter(name).nbytes > 1 << 14 for name in copied_names(model))  # 2: embeddings
    assert sum(a != b for a, b in zip(addresses, moved, strict=True)) >= len(addresses) - staying
    assert all(address % 64 == 0 for address in moved if address not in addresses)
    assert torch.equal(model(tokens).logits, before)


def test_tied_weights_stay_tied_and_train() -> None:
    model = wkv.create_model("rwkv7", vocab_size=300, hidden_size=128, num_layers=1)
    model.blocks[0].att.value.weight = model.blocks[0].att.key.weight
    use_huge_pages(model)
    assert model.blocks[0].att.value.weight.data_ptr() == model.blocks[0].att.key.weight.data_ptr()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model(torch.tensor([[1, 2, 3]])).logits.square().sum().backward()
    before = model.head.weight.detach().clone()
    optimizer.step()
    assert not torch.equal(model.head.weight, before)


def test_a_model_without_large_weights() -> None:
    assert use_huge_pages(torch.nn.Linear(2, 2)) == 0
