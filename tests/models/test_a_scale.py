"""RWKV-7's option `a_scale`: in-context learning rates up to 2."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import normalize

import wkv
from tests.ops.helpers import max_error
from tests.ops.native_helpers import needs_native
from tests.ops.test_wkv7_chunked import run
from wkv.inference.native_rwkv7 import unsupported
from wkv.ops.native_matrix import wkv7 as native
from wkv.ops.wkv7 import chunked, reference

SIZES: dict[str, Any] = {"vocab_size": 19, "hidden_size": 32, "num_layers": 2, "head_size": 16}


def leaves(case: str, seed: int = 0) -> list[Tensor]:
    """Arguments of the operator and a state; T = 256.

    "random": rates over (0, 2), any direction. "high": most rates above 1.5. "one direction": the same removal key at
    every token. "flips": that, at a rate of 2 and without forgetting: every token reflects the state, and all that was
    ever written or rounded stays.
    """
    torch.manual_seed(seed)
    r, k, v, kk, iclr, q = (torch.randn(2, 256, 2, 16, dtype=torch.float64) for _ in range(6))
    iclr = 2 * torch.sigmoid(iclr + (3 if case == "high" else 0))
    if case in ("one direction", "flips"):
        kk = kk[:, :1].expand_as(kk)
    if case == "flips":
        q, iclr = torch.full_like(q, -14), torch.full_like(q, 2)
    log_w, kk = -math.exp(-0.5) * torch.sigmoid(q), normalize(kk, dim=-1)
    state = torch.randn(2, 2, 16, 16, dtype=torch.float64)
    return [x.float().double() for x in (r, log_w, k, v, -kk, kk * iclr, state)]


# Rounding stays in the state where nothing is forgotten; a chunk adds its 16 reflections up before they cancel.
FLOAT32_BARS = {"random": 5e-6, "high": 5e-6, "one direction": 5e-6, "flips": 2e-4}


@needs_native
@pytest.mark.parametrize("case", FLOAT32_BARS)
def test_operators_stay_exact(case: str) -> None:
    """Outputs, final state and all gradients of the fast forms against the equation in float64."""
    xs = leaves(case)
    expected = run(reference, xs)
    single = [x.float() for x in xs]
    for function in (chunked, native):
        assert max(max_error(x, y) for x, y in zip(run(function, xs), expected, strict=True)) < 1e-12
        errors = [max_error(x.double(), y) for x, y in zip(run(function, single), expected, strict=True)]
        assert max(errors) < (5e-6 if function is native else FLOAT32_BARS[case]), errors


@pytest.mark.parametrize("scale", [1.0, 1.5, 2.0])
def test_eigenvalues_stay_within_the_documented_bound(scale: float) -> None:
    """diag(w) - kk^T (a kk) has real eigenvalues in (0.545 - scale, 1)."""
    torch.manual_seed(0)
    low = math.exp(-math.exp(-0.5))
    w, a = low + (1 - low) * torch.rand(2000, 8).double(), scale * torch.rand(2000, 8).double().sqrt()
    w[:500] = low + 1e-3
    kk = normalize(torch.randn(2000, 8).double(), dim=-1)
    values = torch.linalg.eigvals(torch.diag_embed(w) - kk[:, :, None] * (a * kk)[:, None])
    assert values.imag.abs().max() < 1e-6
    assert low - scale < values.real.min() < low - 0.8 * scale
    assert values.real.max() < 1


def with_constant_rates(scale: float, rate: float) -> wkv.layers.language_model.LanguageModel:
    """A model whose rates are `rate` everywhere."""
    torch.manual_seed(0)
    model = wkv.create_model("rwkv7", **SIZES, a_scale=scale).double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
        for block in model.blocks:
            block.att.a1.zero_()
            block.att.a0.fill_(math.log(rate / (scale - rate)))
    return model


def test_removal_and_writing_take_the_same_rate() -> None:
    """What a rate below 1 does is the same whichever scale it comes from: the scale is seen in the rate alone."""
    tokens = torch.arange(19)[None]
    plain, scaled = with_constant_rates(1.0, 0.7), with_constant_rates(2.0, 0.7)
    torch.testing.assert_close(scaled(tokens).logits, plain(tokens).logits, atol=1e-12, rtol=1e-9)
    assert not torch.allclose(with_constant_rates(2.0, 1.4)(tokens).logits, plain(tokens).logits, atol=1e-3)


def test_the_state_can_flip_its_sign() -> None:
    """At a rate of 2 two tokens with one direction undo each other, (I - 2 kk^T kk)^2 = I; at 1 they erase."""
    kk = normalize(torch.ones(1, 2, 1, 4, dtype=torch.float64), dim=-1)
    nothing, state = torch.zeros_like(kk), torch.ones(1, 1, 4, 4, dtype=torch.float64)
    for rate, factors in ((2.0, (-1, 1)), (1.0, (0, 0))):
        for length, factor in zip((1, 2), factors, strict=True):
            xs = (nothing, nothing, nothing, nothing, -kk, rate * kk)
            _, after = wkv.ops.wkv7(*(x[:, :length] for x in xs), state)
            torch.testing.assert_close(after, factor * state)


@pytest.mark.parametrize("bad", [0, -1.0, 2.1, True, "2", None])
def test_bad_scales(bad: object) -> None:
    with pytest.raises(wkv.WkvError, match=r"a_scale must be a number in \(0, 2\]"):
        wkv.create_model("rwkv7", **SIZES, a_scale=bad)


def test_the_native_engine_refuses() -> None:
    assert "a_scale is 2, and the kernels know only 1" in str(
        unsupported(wkv.create_model("rwkv7", **SIZES, a_scale=2))
    )


def test_saved_with_its_scale(tmp_path: Any) -> None:
    model = wkv.create_model("rwkv7", **SIZES, a_scale=1.5)
    wkv.save_model(model, tmp_path / "m.safetensors")
    assert wkv.load_model(tmp_path / "m.safetensors").config == model.config
