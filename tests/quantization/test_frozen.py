"""Frozen layers and bases: products and gradients of the dequantised weights, memory, copies, every model."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

import wkv
from tests.quantization.helpers import LANGUAGE_MODELS, small_model, tokens
from wkv.errors import WkvError
from wkv.layers.language_model import LanguageModel
from wkv.quantization import quantize_model, resident_bytes
from wkv.quantization.blockwise import BlockKind
from wkv.quantization.frozen import FrozenLinear, freeze_base, freeze_linear, frozen_layers, is_frozen, thaw

CASES: list[tuple[BlockKind, bool]] = [
    ("nf4", False), ("nf4", True), ("fp4", False), ("fp4", True), ("int8-block", False), ("int8-row", False)
]  # fmt: skip
FLOATS = [torch.float32, torch.bfloat16, torch.float16, torch.float64]


def linear(kind: BlockKind, double: bool = False, inputs: int = 70, outputs: int = 90) -> FrozenLinear:
    torch.manual_seed(5)
    return freeze_linear(nn.Linear(inputs, outputs, bias=False), kind, 64, double)


def plain(layer: FrozenLinear, dtype: torch.dtype) -> nn.Linear:
    """What the layer stands for."""
    made = nn.Linear(layer.in_features, layer.out_features, bias=False, dtype=dtype)
    made.weight = nn.Parameter(layer.dequantize().to(dtype), requires_grad=False)
    return made


def run(layer: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
    """y, and the gradient of x for random gradients of y."""
    x = x.detach().clone().requires_grad_()
    y = layer(x)
    y.backward(torch.randn(y.shape, generator=torch.Generator().manual_seed(9)).to(y.dtype))
    assert x.grad is not None
    return y.detach(), x.grad


class WithLowRank(nn.Module):
    """A trainable y = base(x) + B A x beside a frozen layer."""

    def __init__(self, base: FrozenLinear | nn.Linear) -> None:
        super().__init__()
        self.base = base
        random = torch.Generator().manual_seed(base.in_features)
        self.a = nn.Parameter(torch.randn(4, base.in_features, generator=random) / base.in_features)
        self.b = nn.Parameter(torch.randn(base.out_features, 4, generator=random))

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.base(x)
        return y + F.linear(F.linear(x, self.a.to(x.dtype)), self.b.to(x.dtype))


def train_step(model: LanguageModel, names: list[str]) -> tuple[Tensor, dict[str, Tensor]]:
    """Logits, and the gradients of all that trains, with low-rank adapters on the layers `names`."""
    model.requires_grad_(False)
    for name in names:
        parent, _, leaf = name.removesuffix(".weight").rpartition(".")
        setattr(model.get_submodule(parent), leaf, WithLowRank(model.get_submodule(parent).get_submodule(leaf)))  # type: ignore[arg-type]
    logits = model(tokens()).logits
    F.cross_entropy(logits.flatten(0, 1).float(), tokens().flatten()).backward()
    found = {name: parameter.grad for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert all(grad is not None and bool((grad != 0).any()) for grad in found.values())
    return logits.detach(), found  # type: ignore[return-value]


# ---------------------------------------------------------------- one layer


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("shape", [(70,), (4, 70), (2, 3, 70), (2, 0, 70)])
@pytest.mark.parametrize(("kind", "double"), CASES)
def test_product_and_gradient_are_those_of_the_dequantised_weight(
    kind: BlockKind, double: bool, shape: tuple[int, ...], dtype: torch.dtype
) -> None:
    layer = linear(kind, double)
    x = torch.randn(shape, generator=torch.Generator().manual_seed(2)).to(dtype)
    found, expected = run(layer, x), run(plain(layer, dtype), x)
    assert found[0].dtype == found[1].dtype == dtype
    assert found[0].shape == (*shape[:-1], 90)
    assert torch.equal(found[0], expected[0])
    assert torch.equal(found[1], expected[1])
    assert not list(layer.parameters())
    assert not layer(x).requires_grad


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_autocast_as_in_a_plain_layer(dtype: torch.dtype) -> None:
    layer = linear("nf4")
    x = torch.randn(3, 70, dtype=dtype)
    with torch.autocast("cpu", torch.bfloat16):
        found, expected = run(layer, x), run(plain(layer, torch.float64 if dtype == torch.float64 else dtype), x)
    assert found[0].dtype == expected[0].dtype
    assert found[1].dtype == dtype
    assert torch.equal(found[0], expected[0])
    assert torch.equal(found[1], expected[1])


def test_second_derivatives() -> None:
    layer = linear("nf4", inputs=6, outputs=5)
    x = torch.randn(3, 6, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(layer, x)
    assert torch.autograd.gradgradcheck(layer, x)


def test_nothing_of_the_size_of_the_weight_is_kept() -> None:
    layer = linear("nf4", inputs=128, outputs=256)
    kept: list[int] = []

    def pack(tensor: Tensor) -> Tensor:
        kept.append(tensor.numel())
        return tensor

    def differentiate_twice(base: FrozenLinear | nn.Linear) -> int:
        kept.clear()
        x = torch.randn(2, 128, requires_grad=True)
        with saved_tensors_hooks(pack, lambda tensor: tensor):
            y = WithLowRank(base)(x)
            torch.autograd.grad(y.square().sum(), x, create_graph=True)
        return max(kept)

    assert differentiate_twice(plain(layer, torch.float32)) == 128 * 256
    assert differentiate_twice(layer) <= 256 * 4
    node = layer(torch.randn(2, 128, requires_grad=True)).grad_fn
    assert not any(isinstance(value, Tensor) for value in vars(node).values())


def test_types_and_copies() -> None:
    layer = linear("nf4", True)
    weight = layer.dequantize()
    types = {name: buffer.dtype for name, buffer in layer.named_buffers()}
    assert list(types) == ["codes", "absmax", "offset", "nested_absmax"]
    for changed in (copy.deepcopy(layer).half(), copy.deepcopy(layer).to(torch.bfloat16), layer.double()):
        assert {name: buffer.dtype for name, buffer in changed.named_buffers()} == types
        assert torch.equal(changed.dequantize(), weight)  # scales were not rounded on the way
    other = copy.deepcopy(layer)
    other.codes.zero_()
    assert torch.equal(layer.dequantize(), weight)
    assert copy.deepcopy(layer).to("meta").codes.is_meta
    assert layer.num_weights == 90 * 70
    assert "in_features=70, out_features=90, nf4, block_size=64, double" in repr(layer)
    assert "int8-row, block_size=70)" in repr(linear("int8-row"))


@pytest.mark.parametrize(("kind", "double"), CASES)
def test_state_dict_round_trip(kind: BlockKind, double: bool) -> None:
    layer = linear(kind, double)
    other = freeze_linear(nn.Linear(70, 90, bias=False), kind, 64, double)
    assert not torch.equal(other.dequantize(), layer.dequantize())
    other.load_state_dict(layer.state_dict())
    assert torch.equal(other.dequantize(), layer.dequantize())


def test_errors() -> None:
    with pytest.raises(WkvError, match="bias"):
        freeze_linear(nn.Linear(4, 4), "nf4")
    with pytest.raises(WkvError, match=r"expected \[..., 70\], found \[1, 69\]"):
        linear("nf4")(torch.zeros(1, 69))


# ---------------------------------------------------------------- whole models


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("kind", "double"), [("nf4", True), ("int8-row", False)])
@pytest.mark.parametrize("name", LANGUAGE_MODELS)
def test_adapters_learn_as_on_the_thawed_model(name: str, kind: BlockKind, double: bool, dtype: torch.dtype) -> None:
    frozen = freeze_base(small_model(name).to(dtype), kind, double=double)
    assert type(frozen) is type(small_model(name))
    names = list(frozen_layers(frozen))
    found, expected = train_step(thaw(frozen), names), train_step(frozen, names)
    assert found[0].dtype == dtype
    assert torch.equal(found[0], expected[0])
    assert found[1].keys() == expected[1].keys()
    assert len(found[1]) == 2 * len(names)
    for key, grad in found[1].items():
        assert torch.equal(grad, expected[1][key]), key


def test_every_version_is_covered() -> None:
    assert set(wkv.list_models("rwkv*")) <= set(LANGUAGE_MODELS)


def test_gradient_checkpointing_gives_the_same() -> None:
    frozen = freeze_base(small_model())
    names = list(frozen_layers(frozen))
    expected = train_step(copy.deepcopy(frozen), names)[1]
    frozen.gradient_checkpointing = True
    for key, grad in train_step(frozen, names)[1].items():
        assert torch.equal(grad, expected[key]), key


@pytest.mark.parametrize("name", LANGUAGE_MODELS)
def test_what_is_frozen_and_what_is_shared(name: str) -> None:
    model = small_model(name).train()
    model.tuned_state = model.init_state(1)
    model.ln_out.weight.requires_grad_(False)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    frozen = freeze_base(model)
    layers = frozen_layers(frozen)
    matrices = {key for key, value in model.named_parameters() if key.startswith("blocks.") and key.endswith(".weight")
                and value.ndim == 2 and "emb" not in key}  # fmt: skip
    assert layers.keys() == matrices
    assert is_frozen(frozen)
    assert not is_frozen(model)
    for key, parameter in frozen.named_parameters():
        original = model.get_parameter(key)
        assert parameter.data_ptr() == original.data_ptr()
        assert parameter.requires_grad == original.requires_grad
    assert frozen.training
    assert not freeze_base(model.eval()).training
    assert frozen.tokenizer is model.tokenizer
    assert frozen.tuned_state is model.tuned_state
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_bytes_in_memory() -> None:
    model = small_model(hidden_size=128)
    frozen = freeze_base(model, "nf4")
    weights = sum(layer.num_weights for layer in frozen_layers(frozen).values())
    assert resident_bytes(model) - resident_bytes(frozen) == weights * 4 - weights * 4.5 / 8


@pytest.mark.parametrize(
    ("targets", "number"),
    [(None, 12), (["att", "ffn"], 12), (("key",), 4), ("att.key", 2), ("blocks.1", 6), (["blocks.0.ffn.value"], 1),
     ("blocks.*.att.*", 8), (["ffn.key", "key"], 4)],
)  # fmt: skip
def test_targets(targets: str | list[str] | None, number: int) -> None:
    frozen = freeze_base(small_model(), targets=targets)
    assert len(frozen_layers(frozen)) == number
    assert bool(frozen(tokens()).logits.isfinite().all())


@pytest.mark.parametrize("targets", ["head", ["att", "keys"], "emb", ["w1"], ["blocks.7"]])
def test_targets_that_name_nothing(targets: str | list[str]) -> None:
    with pytest.raises(WkvError, match=r"no large matrix is called .* att\.key, .*ffn\.value"):
        freeze_base(small_model(), targets=targets)
    with pytest.raises(WkvError, match="at least one"):
        freeze_base(small_model(), targets=[])


def test_thaw() -> None:
    model = small_model("rwkv6").bfloat16()
    frozen = freeze_base(model, "int8-block", 256)
    usual, wide = thaw(frozen), thaw(frozen, torch.float32)
    assert not is_frozen(usual)
    assert {parameter.dtype for parameter in usual.parameters()} == {torch.bfloat16}
    assert {parameter.dtype for parameter in wide.parameters()} == {torch.float32}
    for name, layer in frozen_layers(frozen).items():
        assert torch.equal(wide.get_parameter(name), layer.dequantize())
        assert torch.equal(usual.get_parameter(name), layer.dequantize().bfloat16())
    assert usual.tokenizer is model.tokenizer
    assert torch.equal(usual(tokens()).logits, frozen(tokens()).logits)
    again = freeze_base(thaw(freeze_base(model, "nf4")), "nf4")
    assert again(tokens()).logits.dtype == torch.bfloat16


def test_copies_and_types_of_models() -> None:
    frozen = freeze_base(small_model(), double=True)
    expected = frozen(tokens()).logits
    assert torch.equal(copy.deepcopy(frozen)(tokens()).logits, expected)
    other = freeze_base(small_model(seed=1), double=True)
    other.load_state_dict(frozen.state_dict())
    assert torch.equal(other(tokens()).logits, expected)
    halves = copy.deepcopy(frozen).bfloat16()
    assert halves(tokens()).logits.dtype == torch.bfloat16
    for name, layer in frozen_layers(halves).items():
        assert torch.equal(layer.dequantize(), frozen_layers(frozen)[name].dequantize())


def test_models_that_cannot_be_frozen() -> None:
    model = small_model()
    with pytest.raises(WkvError, match="frozen already"):
        freeze_base(freeze_base(model))
    with pytest.raises(WkvError, match="quantised already"):
        freeze_base(quantize_model(model))
    with torch.device("meta"):
        empty = wkv.create_model("rwkv7", vocab_size=8, hidden_size=32, num_layers=1, head_size=32)
    with pytest.raises(WkvError, match="meta"):
        freeze_base(empty)
    with pytest.raises(WkvError, match="takes a model of this library, found Linear"):
        freeze_base(nn.Linear(2, 2))  # type: ignore[arg-type]
    with pytest.raises(WkvError, match="power of two"):
        freeze_base(model, block_size=100)
    with pytest.raises(WkvError, match="unknown kind"):
        freeze_base(model, "int4")  # type: ignore[arg-type]
    with torch.no_grad():
        model.blocks[1].ffn.key.weight[0, 0] = torch.nan
    with pytest.raises(WkvError, match=r"blocks\.1\.ffn\.key: .*infinite or NaN"):
        freeze_base(model)
    model.blocks[0].att.extra = nn.Linear(4, 4, bias=False)
    with pytest.raises(WkvError, match="other parameters than its class"):
        freeze_base(model)
