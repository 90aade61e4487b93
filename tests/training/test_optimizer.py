"""Which parameters learn faster and which decay."""

from __future__ import annotations

import pytest
import torch

import wkv
from wkv.errors import WkvError
from wkv.training import create_optimizer, parameter_groups

from .helpers import tiny_model

MATRICES = [
    f"blocks.{i}.{key}.weight"
    for i in (0, 1)
    for key in ("att.receptance", "att.key", "att.value", "att.output", "ffn.key", "ffn.value")
]


def test_rwkv7_groups_are_exactly_the_official_ones() -> None:
    model = tiny_model()
    groups = {(g["factor"], g["weight_decay"]): set(g["names"]) for g in parameter_groups(model, 0.1)}
    assert groups[2.0, 0.0] == {"blocks.0.att.w0", "blocks.1.att.w0"}
    assert groups[1.0, 0.1] == {"emb.weight", "head.weight", *MATRICES}
    names = {name for name, _ in model.named_parameters()}
    assert groups[1.0, 0.0] == names - groups[2.0, 0.0] - groups[1.0, 0.1]
    assert len(groups) == 3


FAST = {
    "rwkv4": {"time_decay": 2.0, "time_first": 3.0}, "rwkv5_0": {"time_decay": 2.0, "time_first": 3.0},
    "rwkv5_1": {"time_decay": 2.0}, "rwkv5": {"time_decay": 2.0}, "rwkv6": {"time_decay": 2.0},
    "rwkv7": {"w0": 2.0}, "rwkv7a": {"w0": 2.0}, "meta_state": {"w0": 2.0},
    **{name: {"time_decay": 2.0, "time_first": 3.0} for name in ("temporal", "rrwkv")},
    "hybrid": {"state_heads.w0": 2.0}, "based": {}, "transformer": {},
}  # fmt: skip


@pytest.mark.parametrize("name", wkv.list_models())
def test_every_model_has_its_fast_parameters_and_decays_matrices_only(name: str) -> None:
    model = wkv.create_model(name, vocab_size=16, hidden_size=64, num_layers=2)
    groups = parameter_groups(model, 0.1)
    fast = {n: g["factor"] for g in groups for n in g["names"] if g["factor"] != 1}
    assert fast == {f"blocks.{i}.att.{n}": factor for i in (0, 1) for n, factor in FAST[name].items()}
    decays = {n for g in groups for n in g["names"] if g["weight_decay"]}
    matrices = {n for n, p in model.named_parameters() if n.endswith(".weight") and p.squeeze().ndim >= 2}
    assert decays == matrices - set(fast)


def test_every_parameter_is_in_one_group_and_frozen_ones_in_none() -> None:
    model = tiny_model()
    model.emb.weight.requires_grad_(False)
    listed = [name for group in parameter_groups(model, 0.1) for name in group["names"]]
    assert sorted([*listed, "emb.weight"]) == sorted(name for name, _ in model.named_parameters())


def test_nothing_to_train_is_an_error() -> None:
    with pytest.raises(WkvError, match="no trainable parameter"):
        parameter_groups(tiny_model().requires_grad_(False), 0.1)


@pytest.mark.parametrize(("name", "eps"), [("rwkv4", 1e-8), ("rwkv7", 1e-18)])
def test_official_constants(name: str, eps: float) -> None:
    model = wkv.create_model(name, vocab_size=16, hidden_size=64, num_layers=1)
    optimizer = create_optimizer(model, 1e-3)
    assert optimizer.defaults["eps"] == eps
    assert optimizer.defaults["betas"] == (0.9, 0.99)


def test_first_step_is_sign_descent_with_decay_on_matrices_only() -> None:
    """With eps far below any gradient, Adam's first step moves every parameter by exactly its learning rate."""
    model = tiny_model().double()
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    for parameter in model.parameters():
        parameter.grad = torch.full_like(parameter, 1e-12)
    create_optimizer(model, 0.01, weight_decay=0.5).step()
    for name, parameter in model.named_parameters():
        factor = 2 if name.endswith("att.w0") else 1
        keep = 1 - 0.01 * 0.5 if name in {"emb.weight", "head.weight", *MATRICES} else 1.0
        torch.testing.assert_close(parameter.detach(), before[name] * keep - 0.01 * factor, rtol=1e-5, atol=1e-7)
