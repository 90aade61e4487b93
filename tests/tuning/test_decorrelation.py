"""Decorrelated backpropagation: the rule against its released code, and W R in the place of a matrix."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tests.ops.helpers import golden, max_error
from wkv.errors import WkvError
from wkv.ops import wkv7
from wkv.tuning.decorrelation import DecorrelatedMatrix, Decorrelation, covariance

FAST = Decorrelation(rate=0.05, kappa=0.1, sample=1.0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("method", ["standard", "normalized"])
@pytest.mark.parametrize("form", ["full", "tril"])
def test_the_rule_is_that_of_the_released_code(method: str, form: str, dtype: torch.dtype) -> None:
    expected = golden("dbp", "dbp")
    rule = Decorrelation(0.05, 0.3, method == "normalized", form == "full", reference=True, sample=1.0)
    R, losses = expected["R0"].to(dtype), []
    for step in range(3):
        X = covariance(expected[f"z{step}"].to(dtype) @ R.mT)
        losses.append(rule.loss(X))
        R = rule.step(R, X)
        if step == 0:
            assert max_error(R, expected[f"{method}.{form}.R1"]) < 1e-6
    assert max_error(R, expected[f"{method}.{form}.R3"]) < 1e-6
    assert max_error(torch.stack(losses), expected[f"{method}.{form}.losses"]) < 1e-6


def correlated(rows: int, seed: int) -> Tensor:
    """Vectors [rows, 6] that are mildly correlated."""
    mixing = torch.eye(6) + 0.4 * torch.randn(6, 6, generator=torch.Generator().manual_seed(0))
    return torch.randn(rows, 6, generator=torch.Generator().manual_seed(seed)) @ mixing.mT


@pytest.mark.parametrize("normalized", [False, True])
def test_vectors_become_uncorrelated(normalized: bool) -> None:
    rule = Decorrelation(0.05 * (5 if normalized else 1), 0.1, normalized)
    R, energy = torch.eye(6), []
    for step in range(200):
        X = covariance(correlated(128, 1 + step) @ R.mT)
        energy.append(float((X - X.diag().diag()).square().sum()))
        R = rule.step(R, X)
    test = covariance(correlated(4096, 1000) @ R.mT)
    assert float((test - test.diag().diag()).square().sum()) < energy[0] / 100


def test_rows_scale_each_component_to_unit_size_and_columns_are_another_rule() -> None:
    R = torch.randn(5, 5, generator=torch.Generator().manual_seed(1))
    X = covariance(torch.randn(50, 5, generator=torch.Generator().manual_seed(2)))
    v = (X.diagonal() - 1).diag()
    assert torch.allclose(Decorrelation(1.0, 1.0).step(R, X), R - v @ R, atol=1e-6)
    assert torch.allclose(Decorrelation(1.0, 1.0, reference=True).step(R, X), R - R @ v, atol=1e-6)


@pytest.mark.parametrize("values", [{"rate": -1.0}, {"kappa": 1.5}, {"sample": 0.0}, {"sample": 2.0}])
def test_numbers_out_of_range_are_refused(values: dict[str, float]) -> None:
    with pytest.raises(WkvError, match="decorrelation needs"):
        Decorrelation(**values)


def matrix(rule: Decorrelation = FAST) -> tuple[DecorrelatedMatrix, Tensor]:
    """A matrix of 2 heads, 4 from 6 values, and vectors for it."""
    generator = torch.Generator().manual_seed(3)
    value = torch.randn(2, 4, 6, generator=generator, dtype=torch.float64)
    x = torch.stack([correlated(30, 5), correlated(30, 6)], 1).view(3, 10, 2, 6).double()
    return DecorrelatedMatrix(value, rule), x


def step(module: DecorrelatedMatrix, x: Tensor, optimizer: torch.optim.Optimizer) -> None:
    optimizer.zero_grad()
    module(x).square().sum().backward()
    optimizer.step()


@pytest.mark.parametrize("fused", [False, True])
def test_r_makes_one_step_for_every_step_of_w(fused: bool) -> None:
    module, x = matrix()
    optimizer = torch.optim.AdamW(module.parameters(), lr=1e-2, fused=fused)
    expected = module.decorrelation.clone()
    for _ in range(3):
        z = torch.einsum("hij,bthj->hbti", expected, x).flatten(1, 2)
        step(module, x, optimizer)
        assert torch.equal(module.decorrelation, expected)
        expected = FAST.step(expected, covariance(z))
        module.settle()
        assert torch.allclose(module.decorrelation, expected, atol=1e-12)
        expected = module.decorrelation.clone()
        module.settle()
        assert torch.equal(module.decorrelation, expected)
    assert module.loss is not None
    assert module.loss.shape == (2,)


def test_r_stays_during_several_passes_of_one_step_and_in_evaluation() -> None:
    module, x = matrix()
    start = module.decorrelation.clone()
    optimizer = torch.optim.SGD(module.parameters(), lr=1e-2)
    for part in x:  # gradient accumulation
        module(part[None]).square().sum().backward()
    assert torch.equal(module.decorrelation, start)
    optimizer.step()
    module.eval()
    module(x)
    assert torch.equal(module.decorrelation, start)
    module.train()
    module(x)
    z = torch.einsum("hij,bthj->hbti", start, x).flatten(1, 2)
    assert torch.allclose(module.decorrelation, FAST.step(start, covariance(z)), atol=1e-12)


def test_folded_it_is_one_matrix_with_the_same_outputs() -> None:
    module, x = matrix()
    optimizer = torch.optim.SGD(module.parameters(), lr=1e-3)
    for _ in range(4):
        step(module, x, optimizer)
    module.eval()
    assert torch.allclose(torch.einsum("hvk,bthk->bthv", module.folded(), x), module(x), atol=1e-13)


def test_zeros_and_vectors_left_out_do_not_count() -> None:
    module, x = matrix(Decorrelation(0.05, 0.1, sample=0.5))
    with_zeros = torch.cat([x, torch.zeros_like(x)], 1)
    module(with_zeros)
    module.decorrelate()
    rows = x.flatten(0, 1)[::2].transpose(0, 1)
    expected = module.rule.step(torch.eye(6).double().repeat(2, 1, 1), covariance(rows))
    assert torch.allclose(module.decorrelation, expected, atol=1e-12)


def test_an_initial_state_acts_as_a_linear_layer_on_what_the_identity_gives() -> None:
    generator = torch.Generator().manual_seed(7)
    r, k, v, kk = (torch.randn(2, 9, 3, 8, generator=generator, dtype=torch.float64) for _ in range(4))
    kk = torch.nn.functional.normalize(kk, dim=-1)
    iclr, decay = (torch.rand(2, 9, 3, 8, generator=generator, dtype=torch.float64) for _ in range(2))
    S = torch.randn(2, 3, 8, 8, generator=generator, dtype=torch.float64)
    rest = -0.6 * decay, k, v, -kk, iclr * kk
    identity = torch.eye(8).double().expand(2, 3, 8, 8)
    x, _ = wkv7(r, rest[0], torch.zeros_like(k), torch.zeros_like(v), *rest[3:], identity)
    difference = wkv7(r, *rest, S)[0] - wkv7(r, *rest)[0]
    assert max_error(torch.einsum("bhvk,bthk->bthv", S, x), difference) < 1e-14
