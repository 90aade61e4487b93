"""BASED against the official modules (tests/golden/based), and what is its own."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

import wkv
from wkv.checkpoints.based_names import from_released
from wkv.errors import WkvError
from wkv.layers.short_convolution import ShortConvolution
from wkv.layers.timeline import Timeline
from wkv.models.based import BasedConfig, build_mixer
from wkv.ops import use_backend
from wkv.ops.taylor import to_official
from wkv.state import LayerState
from wkv.training.losses import next_token_loss

GOLDEN = Path(__file__).parent.parent / "golden" / "based"
SIZES = json.loads((GOLDEN / "config.json").read_text())
FORWARD, GRADIENT = 2e-5, 1e-4
LAYER = "transformer.layers.0."
KINDS: dict[str, Any] = {"linear_layers": [1], "window_layers": [2], "attention_layers": [3], "num_layers": 4}

backends = pytest.mark.parametrize("backend", ["reference", "chunked"])


def golden(file: str) -> dict[str, Tensor]:
    return load_file(GOLDEN / f"{file}.safetensors")


def part(values: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {key.removeprefix(prefix): value for key, value in values.items() if key.startswith(prefix)}


def mixer_values(values: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """Parameters or gradients of one official mixer, by our names."""
    found = from_released({f"{LAYER}mixer.{key}": value for key, value in part(values, prefix).items()})
    return part(found, "blocks.0.att.")


def mixer(kind: str, values: dict[str, Tensor], **options: Any) -> tuple[nn.Module, LayerState]:
    """One layer of a kind with the values of an official one, and its empty state."""
    lists = {name: [0] if name == f"{kind}_layers" else [] for name in ("linear_layers", "window_layers")}
    sizes = {"hidden_size": SIZES["d"], "head_size": SIZES["d"] // SIZES["h"], "feature_size": SIZES["f"]}
    model = wkv.create_model("based", **{"vocab_size": 8, "num_layers": 1, **sizes, **lists, **options})
    att = model.blocks[0].att
    att.load_state_dict(values)
    return att, model.init_state(SIZES["B"]).layers[0]


def read(att: nn.Module, x: Tensor, state: LayerState) -> tuple[Tensor, LayerState]:
    y, _, slots = att(x, {}, state, Timeline())
    return y, slots


def assert_official(att: nn.Module, state: LayerState, values: dict[str, Tensor], y: str, grads: Any) -> None:
    """Output and all gradients of a layer."""
    x = values["x"].requires_grad_()
    found, _ = read(att, x, state)
    torch.testing.assert_close(found, values[y], atol=FORWARD, rtol=0)
    found.backward(values["dy"])
    assert_gradient(x, values["dx"])
    assert grads.keys() == dict(att.named_parameters()).keys()
    for name, parameter in att.named_parameters():
        assert_gradient(parameter, grads[name])


def assert_gradient(parameter: Tensor, expected: Tensor) -> None:
    assert parameter.grad is not None
    assert (parameter.grad - expected).norm() <= GRADIENT * expected.norm()


@torch.no_grad()
def prefill_and_decode(att: nn.Module, state: LayerState, values: dict[str, Tensor]) -> tuple[LayerState, LayerState]:
    """States after the first half and at the end, both outputs compared on the way."""
    half = values["prefill_y"].shape[1]
    y, state = read(att, values["x"][:, :half], state)
    torch.testing.assert_close(y, values["prefill_y"], atol=FORWARD, rtol=0)
    after, steps = state, []
    for t in range(half, values["x"].shape[1]):
        y, state = read(att, values["x"][:, t : t + 1], state)
        steps.append(y)
    torch.testing.assert_close(torch.cat(steps, 1), values["decode_y"], atol=FORWARD, rtol=0)
    return after, state


@backends
def test_linear_attention_is_the_official_one(backend: str) -> None:
    values = golden("linear_attention")
    att, state = mixer("linear", mixer_values(values, "param."))
    with use_backend(backend):
        assert_official(att, state, values, "y_parallel", mixer_values(values, "grad."))
        states = prefill_and_decode(att, state, values)
    for slots, name in zip(states, ("prefill", "final"), strict=True):
        kv, z = to_official((slots["kv"], slots["z"]))
        torch.testing.assert_close(kv, values[f"{name}_kv_state"], atol=FORWARD, rtol=1e-6)
        torch.testing.assert_close(z, values[f"{name}_k_state"], atol=FORWARD, rtol=1e-6)


def test_gated_convolution_is_the_official_one() -> None:
    values = golden("base_conv")
    att, state = mixer("convolution", mixer_values(values, "param."))
    assert_official(att, state, values, "y", mixer_values(values, "grad."))
    for slots, name in zip(prefill_and_decode(att, state, values), ("prefill", "final"), strict=True):
        # The official state also keeps the oldest input, which nothing reads again.
        expected = values[f"{name}_conv_state"].mT[:, 1:]
        torch.testing.assert_close(slots["conv_shift"], expected, atol=FORWARD, rtol=0)


def test_window_attention_is_the_official_one() -> None:
    values = golden("sliding_attention")
    att, state = mixer("window", mixer_values(values, "param."), window=SIZES["w"] // 2)
    assert_official(att, state, values, "y", mixer_values(values, "grad."))


def zoology(prefix: str) -> tuple[dict[str, Tensor], dict[str, int]]:
    values = part(golden("zoology_mixers"), prefix)
    return values, json.loads((GOLDEN / "zoology_mixers.json").read_text())


def test_plain_convolution_is_that_of_zoology() -> None:
    values, sizes = zoology("base_conv.")
    names = {"projection.weight": "gate.weight", "projection.bias": "gate.bias",
             "conv.conv.weight": "conv.weight", "conv.conv.bias": "conv.bias"}  # fmt: skip
    ours, grads = ({own: values[f"{kind}.{key}"] for key, own in names.items()} for kind in ("param", "grad"))
    att, state = mixer("convolution", ours, hidden_size=sizes["d"], head_size=sizes["d"], conv_form="zoology")
    assert_official(att, state, values, "y", grads)


def test_window_attention_of_zoology_differs_in_biases_heads_and_positions_alone() -> None:
    values, sizes = zoology("slide.")
    weights = mixer_values(part(values, "param."), "")
    options = {"window": sizes["block_size"], "rotary": False, "hidden_size": sizes["d"], "head_size": sizes["d"]}
    att, state = mixer("window", {key: value for key, value in weights.items() if key.endswith("weight")}, **options)
    packed = [getattr(att, name) for name in ("query", "key", "value")]
    for linear, bias in zip(packed, values["param.Wqkv.bias"].chunk(3), strict=True):
        linear.bias = nn.Parameter(bias.clone())
    att.output.bias = nn.Parameter(values["param.out_proj.bias"].clone())
    x = values["x"].requires_grad_()
    y, _ = read(att, x, state)
    torch.testing.assert_close(y, values["y"], atol=FORWARD, rtol=0)
    y.backward(values["dy"])
    assert_gradient(x, values["dx"])
    for name in ("weight", "bias"):
        # Whole official tensors: the third that is the keys' bias has no gradient but rounding (softmax is shifted).
        found = torch.cat([getattr(linear, name).grad for linear in packed])
        expected = values[f"grad.Wqkv.{name}"]
        assert (found - expected).norm() <= GRADIENT * expected.norm()
        assert_gradient(getattr(att.output, name), values[f"grad.out_proj.{name}"])


def golden_model(dtype: torch.dtype = torch.float32) -> tuple[Any, dict[str, Tensor]]:
    values = golden("based_lm")
    model = wkv.create_model(
        "based", vocab_size=SIZES["V"], hidden_size=SIZES["lm_d"], num_layers=4, feature_size=SIZES["f"],
        head_size=SIZES["lm_d"] // SIZES["lm_h"], window=SIZES["w"] // 2,
    )  # fmt: skip
    assert model.config.layout == ["convolution", "linear", "window", "convolution"]
    assert model.config.ffn_size == 256
    model.load_state_dict(from_released(part(values, "param.")))
    return model.to(dtype), values


@backends
def test_language_model_is_the_official_one(backend: str) -> None:
    model, values = golden_model()
    ids = values["input_ids"]
    with use_backend(backend):
        logits = model(ids).logits
        loss = next_token_loss(logits[:, :-1], ids[:, 1:], l2wrap=0.0)
        loss.backward()
    torch.testing.assert_close(logits, values["logits"], atol=FORWARD, rtol=0)
    torch.testing.assert_close(loss, values["loss"], atol=FORWARD, rtol=0)
    found = {name: parameter.grad for name, parameter in model.named_parameters()}
    expected = from_released(part(values, "grad."))
    assert found.keys() - expected.keys() == {name for name in found if ".ffn." in name}
    for name, gradient in expected.items():
        assert (found[name] - gradient).norm() <= GRADIENT * gradient.norm(), name
    for name, norm in part(values, "gradnorm.").items():
        pieces = [found[own] for own in from_released({name: torch.zeros(12)})]
        total = torch.stack([piece.norm() for piece in pieces]).norm()
        assert abs(total - norm) <= GRADIENT * norm, name


@torch.no_grad()
def test_language_model_step_by_step() -> None:
    model, values = golden_model()
    state, steps = None, []
    for ids in values["input_ids"].split(1, 1):
        logits, state = model(ids, state)
        steps.append(logits)
    torch.testing.assert_close(torch.cat(steps, 1), values["logits"], atol=FORWARD, rtol=0)


def build(**options: Any) -> Any:
    """A small model with random values."""
    torch.manual_seed(1)
    sizes = {"vocab_size": 29, "hidden_size": 16, "num_layers": 3, "head_size": 4, "feature_size": 3, "window": 4}
    model = wkv.create_model("based", **{**sizes, **options})
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return model.double().eval()


@torch.no_grad()
@pytest.mark.parametrize("options", [
    KINDS, {**KINDS, "conv_form": "zoology", "ffn_size": 0, "rotary": False}, {"conv_size": 5, "conv_expansion": 1},
])  # fmt: skip
def test_every_kind_of_layer_keeps_the_promises(options: dict[str, Any]) -> None:
    model, ids = build(**options), torch.arange(40).reshape(2, 20) * 7 % 29
    generator = torch.Generator().manual_seed(3)
    mask = torch.rand(2, 20, generator=generator) < 0.7
    reset = torch.rand(2, 20, generator=generator) < 0.15
    logits, state = model(ids, mask=mask, reset=reset)
    for row in range(2):
        kept, alone, steps = mask[row], None, []
        for one, first in zip(ids[row][kept], reset[row][kept], strict=True):
            step, alone = model(one.reshape(1, 1), alone, reset=first.reshape(1, 1))
            steps.append(step[0])
        torch.testing.assert_close(logits[row][kept], torch.cat(steps), atol=1e-9, rtol=1e-9)
        for slots, expected in zip(state.select(row).layers, alone.layers, strict=True):
            for name, value in expected.items():
                found = slots[name][:, -value.shape[1] or None :] if name.endswith("cache") else slots[name]
                torch.testing.assert_close(found, value, atol=1e-9, rtol=1e-9)


@torch.no_grad()
def test_memory_is_constant_without_full_attention() -> None:
    model, sizes = build(), []
    state = None
    for length in (1, 2, 2, 40, 1, 7):
        _, state = model(torch.arange(length)[None] % 29, state)
        sizes.append(state.num_bytes)
    assert sizes[0] < sizes[1] < sizes[2]  # the window fills up
    assert len(set(sizes[2:])) == 1
    _, long = build(**KINDS)(torch.arange(80)[None] % 29)
    assert long.num_bytes > build(**KINDS)(torch.arange(40)[None] % 29).state.num_bytes


def test_state_has_the_size_of_the_paper() -> None:
    """H N E + H E numbers for a linear layer; 2 windows of A; the inputs of a convolution that are read again."""
    model = build()
    _, state = model(torch.arange(20)[None])
    counts = [sum(x.numel() for x in slots.values() if x.is_floating_point()) for slots in state.layers]
    features = 1 + 3 + 6
    assert counts == [2 * 32, 4 * (4 + 1) * features, 2 * 4 * 16]


@pytest.mark.parametrize(("layers", "options", "expected"), [
    (1, {}, "l"), (2, {}, "cl"), (3, {}, "clw"), (7, {}, "clwcccc"), (8, {}, "clwccclw"),
    (27, {}, "clwccclwccclwccclwccclwcccc"),
    (2, {"attention_layers": [1]}, "ca"), (2, {"window_layers": [1]}, "cw"), (3, {"attention_layers": [0]}, "alw"),
    (4, {"linear_layers": [], "window_layers": [3]}, "cccw"), (4, {"linear_layers": [2]}, "ccl" + "c"),
    (3, {"linear_layers": [0, 1, 2]}, "lll"),
])  # fmt: skip
def test_layout(layers: int, options: dict[str, Any], expected: str) -> None:
    config = BasedConfig(vocab_size=8, hidden_size=64, num_layers=layers, **options)
    assert "".join(kind[0] for kind in config.layout) == expected
    assert BasedConfig(**config.to_dict()) == config


@pytest.mark.parametrize(("name", "hidden", "heads", "ffn", "linear"), [("360m", 1024, 16, 2048, 5),
                                                                        ("1b", 1792, 16, 3584, 7)])  # fmt: skip
def test_presets_are_the_released_sizes(name: str, hidden: int, heads: int, ffn: int, linear: int) -> None:
    with torch.device("meta"):
        model = wkv.create_model("based", name)
    config: Any = model.config
    assert (config.hidden_size, config.num_heads, config.ffn_size) == (hidden, heads, ffn)
    assert config.layout.count("linear") == config.layout.count("window") == linear
    assert all(b == "window" for a, b in itertools.pairwise(config.layout) if a == "linear")
    assert config.vocab_size % 8 == 0


def test_initial_values() -> None:
    model = wkv.create_model("based", vocab_size=64, hidden_size=128, num_layers=4, head_size=32)
    spread = {key: float(value.detach().std()) for key, value in model.named_parameters() if value.ndim == 2}
    for key, found in spread.items():
        expected = 0.02 / 8**0.5 if key.endswith(("output.weight", "down.weight")) else 0.02
        assert found == pytest.approx(expected, rel=0.05), key
    assert not any(value.any() for key, value in model.named_parameters() if key.endswith("bias"))
    conv = model.blocks[0].att.conv.weight.detach()
    assert conv.abs().max() <= 3**-0.5
    assert float(conv.std()) == pytest.approx(1 / 3, rel=0.1)


def test_without_network_no_parameter_is_idle() -> None:
    model = build(ffn_size=0, conv_form="zoology", num_layers=2)
    assert not any(".ffn." in name or ".ln2." in name for name, _ in model.named_parameters())
    model(torch.arange(29)[None]).logits.square().sum().backward()
    assert all(parameter.grad.any() for parameter in model.parameters())


@pytest.mark.parametrize("size", [2, 3, 6])
def test_short_convolution_is_that_of_torch(size: int) -> None:
    torch.manual_seed(0)
    conv = ShortConvolution(5, size, bias=True).double()
    conv.reset_parameters()
    x_BTK = torch.randn(2, 11, 5).double()
    padded = nn.functional.pad(x_BTK.mT, (size - 1, 0))
    expected = nn.functional.conv1d(padded, conv.weight, conv.bias, groups=5).mT
    y, carried = conv(x_BTK, conv.empty(2, x_BTK), Timeline())
    torch.testing.assert_close(y, expected)
    torch.testing.assert_close(carried, x_BTK[:, 1 - size :])


@pytest.mark.parametrize(("options", "message"), [
    ({"linear_layers": [1], "window_layers": [1]}, "layer 1 is in more than one of linear_layers, window_layers"),
    ({"attention_layers": [3]}, "there is no layer 3 among the layers 0 to 2"),
    ({"linear_layers": [2, 1]}, "linear_layers must be a list of different indices in rising order"),
    ({"conv_form": "plain"}, "conv_form must be one of 'gated', 'zoology', found 'plain'"),
    ({"conv_size": 1}, "conv_size must be an integer of at least 2, found 1"),
    ({"ffn_size": -1}, "ffn_size must be an integer of at least 0, found -1"),
    ({"window": 0}, "window must be a positive integer, found 0"),
    ({"head_size": 1}, "rotary positions turn pairs of channels, found head_size 1"),
])  # fmt: skip
def test_bad_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(WkvError, match=message):
        build(**options)


def test_odd_heads_are_fine_where_nothing_turns() -> None:
    assert build(head_size=1, rotary=False).config.num_heads == 16
    assert build_mixer(build(head_size=1, window_layers=[]).config, 1)
