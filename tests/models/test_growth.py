"""Growth preserves what a model computes, at the moment it happens and to the last bit that rounding allows."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import wkv
from wkv.layers.language_model import LanguageModel
from wkv.models.growth import add_heads, add_layers, add_param_tokens, grow, grow_optimizer_state, grow_state
from wkv.models.rwkv7 import RWKV7
from wkv.quantization import quantize_model
from wkv.training import create_optimizer, next_token_loss

V = 29
NAMES = ("rwkv7", "meta_state", "rwkv7a")
OPERATORS: dict[str, Callable[[Any], Any]] = {
    "heads": lambda model: add_heads(model, 2),
    "tokens": lambda model: add_param_tokens(model, 24),
    "layer behind": lambda model: add_layers(model, 1),
    "layers between": lambda model: add_layers(model, 2, 1),
    "all": lambda model: add_layers(add_param_tokens(add_heads(add_layers(model, 1, 1), 1), 8), 1),
}
each_model = pytest.mark.parametrize("name", NAMES)
each_operator = pytest.mark.parametrize("operator", OPERATORS)


def build(name: str = "rwkv7", dtype: torch.dtype = torch.float32, noise: float = 0.2, **options: object) -> Any:
    """A small model; with `noise` every parameter is away from its special initial values."""
    torch.manual_seed(0)
    sizes = {"vocab_size": V, "hidden_size": 32, "num_layers": 3, "head_size": 8, "ffn_size": 40, **options}
    model = wkv.create_model(name, **sizes)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(noise * torch.randn_like(parameter))
    return model.to(dtype)


def tokens(seed: int = 0, batch: int = 2, length: int = 24) -> Tensor:
    return torch.randint(0, V, (batch, length), generator=torch.Generator().manual_seed(seed))


def loss(model: LanguageModel, seed: int = 0) -> Tensor:
    ids = tokens(seed)
    return next_token_loss(model(ids[:, :-1]).logits, ids[:, 1:])


def train(model: LanguageModel, optimizer: torch.optim.Optimizer, steps: int) -> None:
    for seed in range(steps):
        optimizer.zero_grad()
        loss(model, seed).backward()
        optimizer.step()


@torch.no_grad()
def largest_difference(one: LanguageModel, other: LanguageModel) -> float:
    return float((one(tokens(9)).logits - other(tokens(9)).logits).abs().max())


@each_operator
@each_model
def test_logits_stay(name: str, operator: str) -> None:
    """Random weights: 1e-5 in float32, and rounding alone in float64; the old model is left as it was."""
    for dtype, bar in ((torch.float32, 1e-5), (torch.float64, 1e-12)):
        model = build(name, dtype)
        before = {key: value.clone() for key, value in model.state_dict().items()}
        grown = OPERATORS[operator](model)
        assert type(grown) is type(model)
        assert grown.num_parameters > model.num_parameters
        assert {p.dtype for p in grown.parameters()} == {dtype}
        assert largest_difference(grown, model) <= bar
        assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
        with torch.no_grad():
            for parameter in grown.parameters():
                parameter.zero_()
        assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


@each_operator
@pytest.mark.parametrize("name", ["rwkv7", "meta_state"])
def test_logits_stay_after_training(name: str, operator: str) -> None:
    model = build(name, noise=0.0)
    train(model, create_optimizer(model, 1e-2), 10)
    assert largest_difference(OPERATORS[operator](model), model) <= 1e-5


@pytest.mark.parametrize("options", [{"own_state": True}, {"mode": "replace"}, {"mode": "replace", "own_state": True}])
def test_other_modes(options: dict[str, object]) -> None:
    model = build("meta_state", torch.float64, **options)
    assert largest_difference(OPERATORS["all"](model), model) <= 1e-12


def test_pure_mode_can_have_more_heads() -> None:
    model = build("meta_state", torch.float64, mode="pure", own_state=True)
    grown = add_heads(model, 5)
    assert grown.config.meta_heads == model.config.meta_heads == [3]
    assert largest_difference(grown, model) <= 1e-12


@pytest.mark.parametrize("operator", ["heads", "all"])
def test_states_go_on(operator: str) -> None:
    """A conversation that began with the small model goes on with the large one, tuned states included."""
    model = build("meta_state", torch.float64, own_state=True)
    model.tuned_state = model(tokens(3, batch=1)).state.detach()
    grown = OPERATORS[operator](model)
    _, state = model(tokens(1))
    expected, final = model(tokens(2), state=state)
    found, grown_final = grown(tokens(2), state=grow_state(state, model, grown))
    torch.testing.assert_close(found, expected, atol=1e-12, rtol=1e-9)
    for old, layer in zip(final.layers, places(grown, model), strict=True):
        new = grown_final.layers[layer]["wkv"][:, : old["wkv"].shape[1]]
        torch.testing.assert_close(new, old["wkv"], atol=1e-12, rtol=1e-9)
    assert grown.tuned_state.layers[-1]["wkv"].shape[1] == grown.config.num_heads


def places(grown: RWKV7, model: RWKV7) -> list[int]:
    """Where the layers of a small model are in the grown one, by their values."""
    now = [float(block.att.k_k.detach().flatten()[0]) for block in grown.blocks]
    return [now.index(float(block.att.k_k.detach().flatten()[0])) for block in model.blocks]


@pytest.mark.parametrize("operator", ["heads", "tokens", "layer behind"])
@pytest.mark.parametrize("name", ["rwkv7", "meta_state"])
def test_gradients_reach_what_is_new(name: str, operator: str) -> None:
    """First only the zeros, since all else that is new speaks through them; after two steps everything has moved."""
    grown = OPERATORS[operator](build(name))
    start = {key: value.clone() for key, value in grown.state_dict().items()}
    new = _new_parts(grown, build(name))
    optimizer = torch.optim.AdamW(grown.parameters(), lr=1e-3, weight_decay=0.0)
    loss(grown).backward()
    gradients = {key: p.grad[new[key]] for key, p in grown.named_parameters() if key in new}
    alive = {key for key, gradient in gradients.items() if gradient.abs().sum() > 0}
    assert alive == {key for key in new if key.endswith(("att.output.weight", "ffn.value.weight"))}
    assert all((gradients[key] == 0).all() for key in new.keys() - alive)
    optimizer.step()
    # The first factors of low-rank maps are zero: their second factors wait for one more step.
    train(grown, optimizer, 2 if operator == "layer behind" else 1)
    still = {key for key, part in new.items() if torch.equal(grown.state_dict()[key][part], start[key][part])}
    assert not still


def _new_parts(grown: RWKV7, model: RWKV7) -> dict[str, tuple[slice, ...]]:
    """Key of a tensor that has grown or is new -> where the new entries are; what a forward pass never uses is out."""
    parts = {}
    old = model.state_dict()
    for key, value in grown.state_dict().items():
        shape = old[key].shape if key in old else torch.Size([0] * value.ndim)
        if shape != value.shape and not key.startswith("blocks.0.att.v"):
            grows = [small != size for small, size in zip(shape, value.shape, strict=True)]
            whole = key not in old
            parts[key] = tuple(
                slice(None) if whole or not g else slice(s, None) for g, s in zip(grows, shape, strict=True)
            )
    return parts


def test_saved_with_its_history(tmp_path: Any) -> None:
    grown = OPERATORS["all"](build("meta_state"))
    wkv.save_model(grown, tmp_path / "m.safetensors")
    loaded = wkv.load_model(tmp_path / "m.safetensors")
    assert loaded.config == grown.config
    assert loaded.config.growth == grown.config.growth != []
    assert largest_difference(loaded, grown) == 0
    assert largest_difference(OPERATORS["all"](loaded), grown) <= 1e-5


def test_history() -> None:
    model = build()
    grown = OPERATORS["all"](model)
    assert model.config.growth == []
    assert grown.config.growth == [
        {"layers": 1, "index": 1}, {"heads": 1}, {"param_tokens": 8}, {"layers": 1, "index": 4},
    ]  # fmt: skip
    assert (grown.config.num_layers, grown.config.num_heads, grown.config.ffn_size) == (5, 5, 48)


def test_grow_to_sizes() -> None:
    model = build("meta_state", torch.float64)
    grown = grow(model, attention_size=48, ffn_size=64, num_layers=4, head_size=8)
    assert (grown.config.attention_size, grown.config.ffn_size, grown.config.num_layers) == (48, 64, 4)
    assert largest_difference(grown, model) <= 1e-12
    assert grow(model, ffn_size=40) is model


@pytest.mark.parametrize("operator", ["tokens", "layers between", "all"])
def test_moments_of_old_entries_are_kept(operator: str) -> None:
    """Also where layers move: one more step moves old entries as it moves them in the small model."""
    model = build("meta_state", torch.float64)
    optimizer = create_optimizer(model, 1e-3, eps=1e-8)
    train(model, optimizer, 3)
    grown = OPERATORS[operator](model)
    layers = places(grown, model)
    new_optimizer = create_optimizer(grown, 1e-3, eps=1e-8)
    grow_optimizer_state(optimizer, model, new_optimizer, grown)
    for x, o in ((model, optimizer), (grown, new_optimizer)):
        o.zero_grad()
        loss(x, 5).backward()
        o.step()
    found = dict(grown.named_parameters())
    for key, parameter in model.named_parameters():
        name = re.sub(r"(?<=^blocks\.)\d+", lambda layer: str(layers[int(layer[0])]), key)
        corner = tuple(slice(size) for size in parameter.shape)
        torch.testing.assert_close(found[name][corner], parameter, atol=1e-9, rtol=1e-9)
        if parameter in optimizer.state:
            state = new_optimizer.state[found[name]]
            assert torch.equal(state["step"], optimizer.state[parameter]["step"])
            assert state["exp_avg"].shape == found[name].shape


def test_new_moments_start_at_zero() -> None:
    model = build()
    optimizer = create_optimizer(model, 1e-3)
    train(model, optimizer, 2)
    grown = add_param_tokens(add_layers(model, 1), 8)
    new_optimizer = create_optimizer(grown, 1e-3)
    grow_optimizer_state(optimizer, model, new_optimizer, grown)
    key = grown.blocks[0].ffn.key.weight
    state = new_optimizer.state[key]
    assert torch.equal(state["exp_avg"][:40], optimizer.state[model.blocks[0].ffn.key.weight]["exp_avg"])
    assert not state["exp_avg"][40:].any()
    assert not state["exp_avg_sq"][40:].any()
    assert grown.blocks[3].ffn.key.weight not in new_optimizer.state
    train(grown, new_optimizer, 1)


@pytest.mark.parametrize(
    ("act", "message"),
    [
        (lambda: add_heads(wkv.create_model("rwkv6", vocab_size=9, hidden_size=8, num_layers=1, head_size=8), 1),
         "only RWKV-7 and models made from it can grow, found 'rwkv6'"),
        (lambda: add_heads(build(), 0), "heads must be a positive integer, found 0"),
        (lambda: add_layers(build(), 1, 0), "no layer can be put before the first"),
        (lambda: add_layers(build(), 1, 4), "index must be an integer from 1 to 3, found 4"),
        (lambda: add_layers(build("meta_state", mode="pure"), 1), "a new layer of mode 'pure' would change"),
        (lambda: add_param_tokens(build("meta_state", mode="pure"), 1), "has no parameter tokens"),
        (lambda: grow(build(), head_size=16), "head_size cannot grow"),
        (lambda: grow(build(), ffn_size=39), "ffn_size cannot grow from 40 to 39"),
        (lambda: grow(build(), attention_size=36), "attention_size cannot grow from 32 to 36"),
        (lambda: grow_state(build().init_state(1), add_heads(build(), 1), build()), "was not grown from"),
        (lambda: wkv.create_model("rwkv7", vocab_size=9, hidden_size=8, num_layers=1, head_size=8, growth=[{"x": 1}]),
         "growth must be a list of growth steps"),
    ],
)  # fmt: skip
def test_refusals(act: Callable[[], object], message: str) -> None:
    with pytest.raises(wkv.WkvError, match=message):
        act()


def test_quantised_and_adapted_models_are_refused() -> None:
    with pytest.raises(wkv.WkvError, match="dequantise it"):
        add_heads(quantize_model(build(), 8), 1)
    model = build()
    model.adapters["lora"] = object()
    with pytest.raises(wkv.WkvError, match="carries an adapter"):
        add_heads(model, 1)


def test_a_tuned_start_is_refused() -> None:
    model = build()
    model.initial_state = torch.nn.Identity()
    with pytest.raises(wkv.WkvError, match="starts from a state that is being tuned"):
        add_heads(model, 1)


def test_config_fields_are_copied() -> None:
    """Growing does not touch the list of the old configuration, nor that of a copy."""
    model = add_heads(build(), 1)
    copied = dataclasses.replace(model.config)
    add_heads(model, 1)
    assert model.config.growth == copied.growth == [{"heads": 1}]
