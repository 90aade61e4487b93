"""State tuning: goldens of RWKV-PEFT, and what holds for every registered model."""

from __future__ import annotations

import functools
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

import wkv
from tests.test_registry import MODELS, build, tokens
from wkv.errors import WkvError
from wkv.layers.language_model import LanguageModel
from wkv.models.rwkv7 import RWKV7
from wkv.state import State
from wkv.training import next_token_loss
from wkv.training.head_loss import head_loss
from wkv.training.segments import segmented_backward
from wkv.tuning.state import InitialState, empty_state, prompt_state
from wkv.tuning.state_slots import LowRank

GOLDEN = Path(__file__).parent.parent / "golden" / "state_tuning"
SLOTS = {"att.time_state": "wkv", "att.ts_state": "att_shift", "ffn.ts_state": "ffn_shift"}
FILES = {"state_x070": "state", "state_x060": "state", "fullstate_x070": "fullstate"}

# A cache that grows is all that a transformer remembers.
TUNABLE = [name for name in MODELS if name != "transformer"]
QUOTIENTS = ("rwkv4", "temporal", "rrwkv")  # they remember quotients, and no matrices
MATRICES = [name for name in TUNABLE if name not in QUOTIENTS]
TRAINED = ("wkv", "kv", "meta", "num")

all_models = pytest.mark.parametrize("name", TUNABLE)
both_methods = pytest.mark.parametrize("method", ["state", "fullstate"])
all_files = pytest.mark.parametrize("file", FILES)


@functools.cache
def golden(name: str) -> dict[str, Tensor]:
    return load_file(GOLDEN / f"{name}.safetensors")


def golden_state(file: str) -> tuple[LanguageModel, InitialState, dict[str, Tensor]]:
    """The frozen model, the module with the golden's initial values mounted on it, and the golden."""
    model, data = wkv.load_model(GOLDEN / f"model_{file[-4:]}.safetensors"), golden(file)
    model.requires_grad_(False)
    initial = InitialState(model, FILES[file])
    with torch.no_grad():
        for name, value in parameters(initial, data, "s0").items():
            initial.get_parameter(name).copy_(value)
    model.set_initial_state(initial)
    return model, initial, data


def parameters(initial: InitialState, data: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """Parameter name -> golden tensor of `prefix`; every parameter has one, and none is left over."""
    found = {}
    for key, value in data.items():
        if key.startswith(f"{prefix}.blocks."):
            _, _, layer, name = key.split(".", 3)
            found[f"layers.{layer}.{SLOTS[name]}.value"] = value
    assert found.keys() == dict(initial.named_parameters()).keys()
    return found


def error(found: Tensor, expected: Tensor) -> float:
    found, expected = found.detach().double(), expected.double()
    return float((found - expected).abs().max() / expected.abs().max())


def loss_of(model: LanguageModel, data: dict[str, Tensor], l2wrap: float, fused: bool = False) -> Tensor:
    targets = data["targets"].long()
    if fused:
        hidden, _ = model.forward_features(data["idx"])
        return head_loss(hidden, model.head, targets, targets >= 0, l2wrap)
    return next_token_loss(model(data["idx"]).logits, targets.clamp(min=0), targets >= 0, l2wrap)


@all_files
def test_golden_logits_and_loss(file: str) -> None:
    model, _, data = golden_state(file)
    assert error(model(data["idx"]).logits, data["logits"]) < 5e-6
    assert error(loss_of(model, data, 0.0), data["loss"]) < 1e-6
    model.set_initial_state(None)
    assert error(model(data["idx"]).logits, data["logits_zero_state"]) < 5e-6


@all_files
@pytest.mark.parametrize("fused", [False, True])
def test_golden_gradients(file: str, fused: bool) -> None:
    model, initial, data = golden_state(file)
    found = {}
    for l2wrap in (0.0, 1e-4):
        initial.zero_grad()
        loss_of(model, data, l2wrap, fused).backward()
        found[l2wrap] = {name: p.grad.clone() for name, p in initial.named_parameters()}
    plain, wrapped = parameters(initial, data, "grad"), parameters(initial, data, "grad_l2wrap")
    for name, expected in plain.items():
        assert error(found[0.0][name], expected) < 1e-5, name
        assert error(found[1e-4][name], wrapped[name]) < 1e-5, name
        assert error(found[1e-4][name] - found[0.0][name], wrapped[name] - expected) < 2e-2, name


@all_files
def test_golden_adam(file: str) -> None:
    model, initial, data = golden_state(file)
    optimizer = torch.optim.Adam(initial.parameters(), lr=0.05, betas=(0.9, 0.99), eps=1e-8)
    losses = []
    for _ in range(3):
        optimizer.zero_grad()
        loss = loss_of(model, data, 0.0)
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    assert error(torch.stack(losses), data["adam3_losses"]) < 1e-6
    for name, expected in parameters(initial, data, "adam3").items():
        assert error(initial.get_parameter(name), expected) < 1e-5, name


@all_models
@both_methods
@pytest.mark.parametrize("rank", [None, 2])
def test_the_start_changes_nothing(name: str, method: str, rank: int | None) -> None:
    model, ids = build(name, torch.float32), tokens()
    with torch.no_grad():
        expected, end = model(ids)
        mount(model, method, rank=None if name in QUOTIENTS else rank)
        found, tuned_end = model(ids)
    if name in QUOTIENTS:  # another normaliser of the same empty past
        assert error(found, expected) < 1e-6
        return
    assert torch.equal(found, expected)
    assert all(torch.equal(a[slot], b[slot]) for a, b in zip(tuned_end.layers, end.layers, strict=True) for slot in b)


def trained(model: LanguageModel, method: str = "state") -> list[set[str]]:
    """Slots of every layer that a method trains."""
    ends = ("shift",) if method == "fullstate" else ()
    return [{slot for slot in layer if slot in TRAINED or slot.endswith(ends)} for layer in empty_state(model).layers]


def low_rank(initial: InitialState) -> list[LowRank]:
    """The slots that are products."""
    return [module for module in initial.modules() if isinstance(module, LowRank)]


def test_there_is_nothing_to_tune_in_a_cache() -> None:
    with pytest.raises(WkvError, match="transformer has no state of constant size to tune; use an adapter of its"):
        wkv.tuning.create("state", build("transformer", torch.float32))


def mount(model: LanguageModel, method: str = "state", **options: object) -> InitialState:
    model.requires_grad_(False)
    initial = InitialState(model, method, **options)
    model.set_initial_state(initial)
    return initial


def shake(initial: InitialState, scale: float = 0.3) -> None:
    """Values as training could leave them."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in initial.parameters():
            parameter.add_(scale * torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype))


@all_models
@both_methods
def test_gradients_reach_what_is_trained_and_nothing_else(name: str, method: str) -> None:
    model, ids = build(name, torch.float32), tokens()
    initial = mount(model, method)
    next_token_loss(model(ids).logits, ids).backward()
    names = {f"layers.{layer}.{slot}.value" for layer, slots in enumerate(trained(model, method)) for slot in slots}
    assert dict(initial.named_parameters()).keys() == names
    for key, parameter in model.named_parameters():
        if key.startswith("initial_state."):
            assert torch.isfinite(parameter.grad).all(), key
            assert parameter.grad.any(), key
        else:
            assert parameter.grad is None, key


@all_models
def test_gradients_are_those_of_finite_differences(name: str) -> None:
    model, ids = build(name), tokens(1, 5)
    initial = mount(model, "fullstate").double()
    shake(initial)

    def loss() -> Tensor:
        return next_token_loss(model(ids).logits, ids.roll(-1, 1), l2wrap=0.0)

    gradients = torch.autograd.grad(loss(), list(initial.parameters()))
    for parameter, gradient in zip(initial.parameters(), gradients, strict=True):
        place = int(gradient.abs().flatten().argmax())
        flat, step, values = parameter.data.view(-1), 1e-5, []
        for sign in (1, -2):  # up, then down from there
            flat[place] += sign * step
            values.append(float(loss().detach()))
        flat[place] += step
        slope = (values[0] - values[1]) / (2 * step)
        assert slope == pytest.approx(float(gradient.flatten()[place]), rel=1e-5)


@all_models
def test_low_rank_gradients(name: str) -> None:
    model, ids = build(name, torch.float32), tokens()
    if name in QUOTIENTS:
        with pytest.raises(WkvError, match=f"rank is for matrix states, and {name} has none"):
            InitialState(model, rank=2)
        return
    initial = mount(model, rank=2)
    places = low_rank(initial)
    if name in ("rwkv5", "rwkv6", "rwkv7"):
        assert [tuple(place.left.shape) for place in places] == [(4, 8, 2)] * 3
    optimizer = torch.optim.Adam(initial.parameters(), lr=0.01)
    for step in range(2):
        optimizer.zero_grad()
        next_token_loss(model(ids).logits, ids).backward()
        assert all(place.left.grad.any() for place in places)
        assert all(bool(place.right.grad.any()) == (step > 0) for place in places)
        optimizer.step()
    again = low_rank(InitialState(model, rank=2))[-1].right
    assert torch.equal(again, low_rank(InitialState(model, rank=2))[-1].right)
    assert not torch.equal(again, low_rank(InitialState(model, rank=2, seed=1))[-1].right)


@all_models
@both_methods
def test_a_prompt_as_start_is_the_prompt_read_first(name: str, method: str) -> None:
    model, ids = build(name, torch.float32), tokens(1)
    with torch.no_grad():
        _, state = model(ids[:, :9])
        expected, end = model(ids[:, 9:], state)
        mount(model, method, init=state)
        found, tuned_end = model(ids[:, 9:])
    assert torch.equal(found, expected)
    assert all(torch.equal(a[slot], b[slot]) for a, b in zip(tuned_end.layers, end.layers, strict=True) for slot in b)
    next_token_loss(model(ids[:, 9:]).logits, ids[:, 9:]).backward()
    assert all(p.grad.any() for p in model.initial_state.parameters())


@pytest.mark.parametrize("name", MATRICES)
def test_ranks_of_a_prompt(name: str) -> None:
    model, ids = build(name, torch.float32), tokens(1)
    with torch.no_grad():
        state = model(ids).state
    whole = InitialState(model, init=state, rank=8).state()
    low = InitialState(model, init=state, rank=3).state()
    for wanted, slots, found, near in zip(state.layers, trained(model), whole.layers, low.layers, strict=True):
        for slot, value in wanted.items():
            if slot not in slots:
                assert torch.equal(found[slot], value)
                continue
            assert error(found[slot], value) < 1e-6
            tail = torch.linalg.svdvals(value.double())[..., 3:].square().sum(-1).sqrt()
            distance = (near[slot] - value).double().norm(dim=(-2, -1))
            torch.testing.assert_close(distance, tail, rtol=1e-4, atol=1e-6)
    with pytest.raises(WkvError, match="rank must be at most 8"):
        InitialState(model, rank=9)


@all_models
def test_some_layers_only(name: str) -> None:
    model = build(name, torch.float32)
    initial = mount(model, "fullstate", layers=[2, 0])
    with_something = {str(layer) for layer, slots in enumerate(trained(model, "fullstate")) if slots}
    assert {key.split(".")[1] for key, _ in initial.named_parameters()} == {"0", "2"} & with_something
    shake(initial)
    untouched = model.init_state(2).layers[1]
    assert all(
        torch.equal(untouched[slot], x.expand_as(untouched[slot])) for slot, x in empty_state(model).layers[1].items()
    )
    state = prompt_state(model, [3, 1, 4])
    kept = InitialState(model, "fullstate", layers=[0], init=state).state()
    assert all(torch.equal(kept.layers[1][slot], x) for slot, x in state.layers[1].items())


@all_models
def test_a_state_of_its_own_for_every_sequence(name: str) -> None:
    model, ids = build(name), tokens(3)
    states = []
    for seed in range(3):
        initial = InitialState(model, "fullstate", init=prompt_state(model, [seed + 1, 5, 7]))
        shake(initial, 0.1 * seed)
        states.append(initial.state())
    with torch.no_grad():
        together = model(ids, State.stack(states)).logits
        for row, state in enumerate(states):
            torch.testing.assert_close(model(ids[row : row + 1], state).logits[0], together[row], atol=1e-9, rtol=1e-9)
        model.set_initial_state(initial)
        torch.testing.assert_close(model(ids[2:]).logits[0], together[2], atol=1e-9, rtol=1e-9)
        for slot in model.init_state(1).layers[0].values():
            slot.fill_(9)  # whoever reads on may write to it
        torch.testing.assert_close(model(ids[2:]).logits[0], together[2], atol=1e-9, rtol=1e-9)


@all_models
@pytest.mark.parametrize("backend", ["reference", "chunked", "native"])
def test_every_backend_starts_from_it(name: str, backend: str) -> None:
    model, ids = build(name, torch.float32), tokens()
    initial = mount(model, "fullstate")
    shake(initial)
    gradients = {}
    for used in ("reference", backend):
        initial.zero_grad()
        with wkv.ops.use_backend(used):
            next_token_loss(model(ids).logits, ids).backward()
        gradients[used] = [p.grad.clone() for p in initial.parameters()]
    for found, expected in zip(gradients[backend], gradients["reference"], strict=True):
        assert error(found, expected) < 1e-4


@all_models
def test_segments_and_recomputation_give_the_same_gradients(name: str) -> None:
    model, ids = build(name), tokens()
    initial = mount(model, "fullstate").double()
    shake(initial)
    inputs, targets = ids[:, :-1], ids[:, 1:]
    next_token_loss(model(inputs).logits, targets).backward()
    expected = [p.grad.clone() for p in initial.parameters()]
    initial.zero_grad()
    segmented_backward(model, inputs=inputs, targets=targets, segment=5, mode="exact")
    segmented = [p.grad.clone() for p in initial.parameters()]
    initial.zero_grad()
    model.gradient_checkpointing = True
    next_token_loss(model(inputs).logits, targets).backward()
    for parameter, one, wanted in zip(initial.parameters(), segmented, expected, strict=True):
        assert error(one, wanted) < 1e-9
        assert error(parameter.grad, wanted) < 1e-9


@all_models
def test_half_precision_models_keep_the_state_in_float32(name: str) -> None:
    model, ids = build(name, torch.float32), tokens()
    initial = mount(model, "fullstate")
    shake(initial)
    before = initial.state()
    with torch.no_grad():
        expected = model(ids).logits
    model.bfloat16()
    assert {p.dtype for p in initial.parameters()} == {torch.float32}
    assert all(
        torch.equal(a[slot], b[slot]) for a, b in zip(initial.state().layers, before.layers, strict=True) for slot in a
    )
    start = model.init_state(2)
    for slot, x in start.layers[0].items():
        assert x.dtype == (torch.bfloat16 if slot.endswith(("shift", "cache")) else before.layers[0][slot].dtype), slot
    next_token_loss(model(ids).logits, ids).backward()
    assert all(p.grad.dtype == torch.float32 for p in initial.parameters())
    assert error(model(ids).logits.detach(), expected) < 0.1
    wide = [x.dtype for x in model.double().init_state(1).layers[0].values() if x.is_floating_point()]
    assert set(wide) == {torch.float64}


class Odd(RWKV7):
    """A descendant that remembers more: matrices of another name, and a counter."""

    def init_layer_state(self, batch_size: int, shift: Tensor, wide: Tensor, layer: int) -> dict[str, Tensor]:
        more = {"memory": wide.new_zeros(batch_size, 3, 5), "count": torch.zeros(batch_size, dtype=torch.long)}
        return {**super().init_layer_state(batch_size, shift, wide, layer), **more}


def test_states_of_other_models_are_found_by_their_slots() -> None:
    model = Odd(build("rwkv7").config)
    initial = InitialState(model, rank=2)
    shake(initial)
    assert {key.split(".", 2)[2] for key, _ in initial.named_parameters()} == {
        "wkv.left", "wkv.right", "memory.left", "memory.right",
    }  # fmt: skip
    state = initial.state()
    assert state.layers[1]["memory"].any()
    assert state.layers[1]["count"].dtype == torch.long
    state.layers[1]["count"] += 4
    assert int(InitialState(model, init=state).state().layers[1]["count"]) == 4


@pytest.mark.parametrize(("options", "message"), [
    ({"method": "states"}, "method 'states' is unknown"),
    ({"rank": 0}, "rank must be a positive integer"),
    ({"rank": 2.0}, "rank must be a positive integer"),
    ({"layers": []}, "at least one layer"),
    ({"layers": [0, 3]}, "found 3, expected numbers from 0 to 2"),
    ({"layers": [True]}, "found True"),
    ({"layers": 1}, "expected a list of numbers"),
    ({"init": 3}, r"must be a wkv\.State"),
    ({"init": build("rwkv7").init_state(2)}, "found a state of 2 sequences"),
    ({"init": build("rwkv6").init_state(1)}, "belongs to 'rwkv6', expected 'rwkv7'"),
    ({"init": build("rwkv7", num_layers=2).init_state(1)}, "has 2 layers, expected 3"),
    ({"init": build("rwkv7", head_size=16).init_state(1)}, "wkv has shape"),
])  # fmt: skip
def test_what_does_not_fit_is_refused(options: dict, message: str) -> None:
    with pytest.raises(WkvError, match=message):
        InitialState(build("rwkv7"), **options)


def test_values_that_are_not_finite_are_refused() -> None:
    model = build("rwkv7")
    state = model.init_state(1)
    state.layers[2]["wkv"][0, 1, 2, 3] = float("nan")
    with pytest.raises(WkvError, match="layer 2 of init: wkv holds values that are not finite"):
        InitialState(model, init=state)
    with pytest.raises(WkvError, match="belongs to 'rwkv6', expected 'rwkv7'"):
        InitialState(model)(build("rwkv6").init_state(1))
