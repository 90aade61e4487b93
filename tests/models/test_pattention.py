"""Pattention against TokenFormer's own code, and growth that preserves what it computes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from wkv.errors import WkvError
from wkv.layers.pattention import NORMS, Pattention

GOLDEN = Path(__file__).parent.parent / "golden" / "tokenformer_pattention"
each_norm = pytest.mark.parametrize("norm", NORMS)


def golden(norm: str) -> tuple[Pattention, dict[str, Tensor]]:
    """A layer with the reference's keys and values, and all of its tensors."""
    tensors = load_file(GOLDEN / "pattention.safetensors")
    own = {key.removeprefix(f"{norm}."): value for key, value in tensors.items() if key.startswith(f"{norm}.")}
    (tokens, inputs), outputs = own["key"].shape, own["value"].shape[1]
    layer = Pattention(inputs, outputs, tokens, norm)
    layer.load_state_dict({**layer.state_dict(), "key": own["key"], "value": own["value"]})
    return layer, own


@each_norm
def test_golden(norm: str) -> None:
    layer, expected = golden(norm)
    x = expected["x"].requires_grad_()
    y = layer(x)
    torch.testing.assert_close(y, expected["y"], atol=2e-5, rtol=0)
    y.backward(expected["dy"])
    for name, gradient in (("dx", x.grad), ("dkey", layer.key.grad), ("dvalue", layer.value.grad)):
        bar = 1e-4 * float(expected[name].abs().max())
        torch.testing.assert_close(gradient, expected[name], atol=bar, rtol=0)


@each_norm
@torch.no_grad()
def test_golden_growth_changes_the_output(norm: str) -> None:
    """With the factor of the new number of tokens, as there."""
    layer, expected = golden(norm)
    extra = json.loads((GOLDEN / "config.json").read_text())["extra"]
    grown = layer.grown(extra, freeze_scale=False)
    grown.value[-extra:] = expected["grown_value_new"]
    torch.testing.assert_close(grown(expected["x"]), expected["grown_y"], atol=2e-5, rtol=0)
    assert (expected["grown_y"] - expected["y"]).abs().max() > 0.1


@pytest.mark.parametrize("norm", ["l2_norm_gelu", "gelu_l2_norm"])
@torch.no_grad()
def test_growth_with_a_frozen_scale_changes_nothing(norm: str) -> None:
    layer, expected = golden(norm)
    grown = layer.grown(7)
    assert grown.key.shape[0] == layer.key.shape[0] + 7
    assert torch.equal(grown.scale, layer.scale)
    grown.value[-7:].normal_()  # any values
    torch.testing.assert_close(grown(expected["x"]), layer(expected["x"]), atol=1e-6, rtol=1e-6)
    again = Pattention(*grown.key.shape[1:], grown.value.shape[1], grown.key.shape[0], norm)
    again.load_state_dict(grown.state_dict())  # the factor is saved, too
    assert torch.equal(again(expected["x"]), grown(expected["x"]))


def test_new_tokens_learn() -> None:
    torch.manual_seed(0)
    grown = Pattention(6, 5, 8, value_std=0.5).double().grown(4)
    grown(torch.randn(3, 6).double()).square().sum().backward()
    assert (grown.key.grad[-4:].abs().sum(-1) > 0).all()


@each_norm
def test_half_precision_and_zero_inputs(norm: str) -> None:
    layer = Pattention(6, 5, 8, norm).bfloat16()
    y = layer(torch.zeros(2, 6, dtype=torch.bfloat16))
    assert y.dtype == torch.bfloat16
    assert y.isfinite().all()


def test_refusals() -> None:
    with pytest.raises(WkvError, match="under softmax new tokens take weight"):
        Pattention(6, 5, 8, "softmax").grown(1)
    with pytest.raises(WkvError, match="tokens must be a positive integer, found 0"):
        Pattention(6, 5, 8).grown(0)
    with pytest.raises(WkvError, match="norm 'relu' is unknown; one of l2_norm_gelu"):
        Pattention(6, 5, 8, "relu")
