"""The Bone family on single layers: golden vectors, gradients, structure, types, memory, quantised bases."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.ops.helpers import golden, max_error
from tests.tuning.memory import LargeTensors, saved_tensors
from wkv.errors import WkvError
from wkv.quantization.frozen import freeze_linear
from wkv.quantization.model import FloatLinear
from wkv.quantization.modules import quantize_linear
from wkv.tuning import bone_product
from wkv.tuning.bone import (
    GUIDED,
    VARIANTS,
    BoneSide,
    count_parameters,
    equal_rank,
    merge_weight,
    miss_to_lora,
    unmerge_weight,
)

GOLDEN = golden("bone", "bone_family")
# name in the golden file -> our variant, and its parameters with their names there
NAMES = {
    "bone_col": ("bone-col", {"B": "bone"}),
    "bone_row": ("bone-row", {"B": "bone"}),
    "bone_ab": ("bone-ab", {"A": "bone_A", "B": "bone_B"}),
    "miss": ("miss", {"D": "D"}),
    "miss_mini": ("miss-mini", {"D": "D"}),
    "peft_bat": ("bone-col", {"B": "D"}),
}
CASES = sorted({tuple(key.split(".")[:2]) for key in GOLDEN if key.count(".") == 2})


def linear(weight: Tensor, bias: Tensor | None = None) -> nn.Linear:
    layer = nn.Linear(*reversed(weight.shape), bias=bias is not None, dtype=weight.dtype)
    layer.weight.data.copy_(weight)
    if bias is not None:
        layer.bias.data.copy_(bias)
    return layer.requires_grad_(False)


def random_linear(outputs: int, inputs: int, dtype: torch.dtype = torch.float32, bias: bool = False) -> nn.Linear:
    weight = torch.randn(outputs, inputs, dtype=torch.float64) / math.sqrt(inputs)
    return linear(weight.to(dtype), torch.randn(outputs, dtype=torch.float64).to(dtype) if bias else None)


def make_side(variant: str, outputs: int, inputs: int, rank: int, std: float = 0.0) -> BoneSide:
    side = BoneSide(variant, outputs, inputs, rank, outputs // 2 if variant == "miss-mini" else None)
    for parameter in side.parameters():
        nn.init.normal_(parameter, std=std)
    return side


def gradients(side: BoneSide, x: Tensor, base: nn.Module, dy: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """y; and the gradients of x and of the parameters."""
    side.zero_grad()
    x = x.detach().requires_grad_()
    y = side(x, base)
    y.backward(dy)
    named = {"x": x, **dict(side.named_parameters())}
    return y.detach(), {name: tensor.grad.clone() for name, tensor in named.items() if tensor.grad is not None}


@pytest.fixture(params=[None, 1], ids=["whole", "slabs"])
def slab(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the usual slabs, and with one output block at a time."""
    if request.param:
        monkeypatch.setitem(bone_product.SLAB, "cpu", request.param)


# ---------------------------------------------------------------- golden vectors


@pytest.mark.parametrize(("tag", "case"), CASES)
@pytest.mark.usefixtures("slab")
def test_golden(tag: str, case: str) -> None:
    variant, names = NAMES[case]
    expected = {key.split(".", 2)[2]: value for key, value in GOLDEN.items() if key.startswith(f"{tag}.{case}.")}
    weight = GOLDEN[f"{tag}.W"]
    own = {ours: expected[theirs] for ours, theirs in names.items()}
    rank = own["D"].shape[0] if "D" in own else own["B"].shape[-1]
    side = BoneSide(variant, *weight.shape, rank, own["D"].shape[1] if variant == "miss-mini" else None)
    side.load_state_dict(own)
    y, found = gradients(side, GOLDEN[f"{tag}.x"], linear(weight), GOLDEN[f"{tag}.gy"])
    assert max_error(y, expected["y"]) <= 2e-6
    assert max_error(found["x"], expected["gx"]) <= 2e-6
    for ours, theirs in names.items():
        assert max_error(found[ours], expected[f"g_{theirs}"]) <= 1e-5
    merged = side.merged_weight(weight)
    if "W_merged" in expected:
        assert max_error(merged, expected["W_merged"]) <= 2e-6
    assert max_error(GOLDEN[f"{tag}.x"] @ merged.T, expected["y"]) <= 2e-6
    assert max_error(unmerge_weight(variant, merged, own), weight) <= 2e-6


def test_golden_is_complete() -> None:
    assert len(CASES) == 4 * 6 + 2  # every variant on four shapes; the ragged shape fits only those without guide
    assert {case for _, case in CASES} == set(NAMES)


# ---------------------------------------------------------------- gradients


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.usefixtures("slab")
def test_gradients_numerically(variant: str, bias: bool) -> None:
    torch.manual_seed(1)
    inputs = 6 if variant in GUIDED else 5  # MiSS with a last chunk that is shorter
    base = random_linear(4, inputs, torch.float64, bias)
    side = make_side(variant, 4, inputs, 2, 0.5).double()
    x = torch.randn(2, 3, inputs, dtype=torch.float64, requires_grad=True)
    names = list(dict(side.named_parameters()))

    def run(x: Tensor, *parameters: Tensor) -> Tensor:
        return torch.func.functional_call(side, dict(zip(names, parameters, strict=True)), (x, base))

    assert torch.autograd.gradcheck(run, (x, *side.parameters()))
    expected = nn.functional.linear(x, side.merged_weight(base.weight), base.bias)
    assert max_error(side(x, base), expected) < 1e-14


@pytest.mark.parametrize("variant", VARIANTS)
def test_only_what_is_asked_for_gets_a_gradient(variant: str) -> None:
    torch.manual_seed(2)
    base, side = random_linear(8, 12), make_side(variant, 8, 12, 4, 0.3)
    x, dy = torch.randn(3, 12), torch.randn(3, 8)
    _, full = gradients(side, x, base, dy)
    side(x, base).backward(dy)  # x without gradient; those of the parameters add up
    for name, parameter in side.named_parameters():
        assert parameter.grad is not None
        assert torch.equal(parameter.grad, 2 * full[name])
    side.requires_grad_(False)
    x.requires_grad_()
    side(x, base).backward(dy)
    assert x.grad is not None
    assert torch.equal(x.grad, full["x"])
    with torch.inference_mode():
        assert not side(x, base).requires_grad


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_parameter_has_a_gradient_at_the_start(variant: str) -> None:
    """Unlike LoRA, where one factor has none."""
    torch.manual_seed(3)
    _, found = gradients(make_side(variant, 8, 12, 4), torch.randn(5, 12), random_linear(8, 12), torch.randn(5, 8))
    for gradient in found.values():
        assert bool((gradient != 0).all())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("variant", VARIANTS)
def test_one_block_for_the_whole_layer(variant: str, dtype: torch.dtype) -> None:
    torch.manual_seed(13)
    base, x, dy = random_linear(6, 6, dtype), torch.randn(5, 6).to(dtype), torch.randn(5, 6).to(dtype)
    side = make_side(variant, 6, 6, 6, 0.3)
    kept = x.clone(), dy.clone(), base.weight.clone()
    y, found = gradients(side, x, base, dy)
    weight = side.merged_weight(base.weight)
    bar = 1e-6 if dtype == torch.float32 else 2e-2
    assert max_error(y, x.float() @ weight.T) < bar
    assert max_error(found["x"], dy.float() @ weight) < bar
    assert all(torch.equal(now, before) for now, before in zip((x, dy, base.weight), kept, strict=True))


def test_no_tokens() -> None:
    for variant in VARIANTS:
        y, found = gradients(make_side(variant, 8, 12, 4), torch.ones(0, 12), random_linear(8, 12), torch.ones(0, 8))
        assert y.shape == (0, 8)
        assert all(bool((gradient == 0).all()) for gradient in found.values())


# ---------------------------------------------------------------- the start


def bases(outputs: int, inputs: int) -> dict[str, tuple[nn.Module, torch.dtype]]:
    """Every kind of layer, and the type of its input."""
    plain = {str(t): random_linear(outputs, inputs, t) for t in (torch.float64, torch.float32, torch.bfloat16)}
    found: dict[str, tuple[nn.Module, torch.dtype]] = {name: (x, x.weight.dtype) for name, x in plain.items()}
    found["float16 with bias"] = (random_linear(outputs, inputs, torch.float16, bias=True), torch.float16)
    mixed = FloatLinear(inputs, outputs, bias=False)
    mixed.load_state_dict({"weight": plain["torch.float32"].weight})
    found["FloatLinear"] = (mixed.half().requires_grad_(False), torch.float32)
    for dtype in (torch.float32, torch.bfloat16):
        found[f"int8 {dtype}"] = (quantize_linear(plain["torch.float32"], "int8"), dtype)
        found[f"int4 {dtype}"] = (quantize_linear(plain["torch.float32"], "int4"), dtype)
        found[f"nf4 {dtype}"] = (freeze_linear(plain["torch.float32"], "nf4"), dtype)
    return found


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.usefixtures("slab")
def test_starts_as_the_base_bit_for_bit(variant: str, autocast: bool) -> None:
    torch.manual_seed(4)
    side = make_side(variant, 64, 96, 8)
    for name, (base, dtype) in bases(64, 96).items():
        x = torch.randn(2, 5, 96).to(dtype)
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            y, expected = side(x, base), base(x)
        assert y.dtype == expected.dtype, name
        assert torch.equal(y, expected), name


# ---------------------------------------------------------------- structure


def test_miss_is_a_lora() -> None:
    torch.manual_seed(5)
    side, base, x = make_side("miss", 20, 30, 8, 1.0), random_linear(20, 30), torch.randn(4, 30)
    a, b = miss_to_lora(side.D.detach(), 30)
    assert a.shape == (8, 30)
    assert torch.equal(b, side.D.T)
    assert max_error(side(x, base), base(x) + (x @ a.T) @ b.T) < 1e-6
    delta = side.merged_weight(torch.zeros(20, 30))
    assert torch.equal(delta, b @ a)
    assert int(torch.linalg.matrix_rank(delta.double())) == 8
    mini = make_side("miss-mini", 20, 30, 8, 1.0)
    a, b = miss_to_lora(mini.D.detach(), 30, 20)
    assert torch.equal(mini.merged_weight(torch.zeros(20, 30)), b @ a)
    with pytest.raises(WkvError, match="7 does not divide"):
        miss_to_lora(torch.zeros(4, 7), 30, 20)
    with pytest.raises(WkvError, match=r"\[rank, outputs\]"):
        miss_to_lora(torch.zeros(4, 7, 7), 30)


def test_miss_of_full_rank_is_any_update_and_of_rank_one_a_shift() -> None:
    target = torch.randn(6, 10)
    full = BoneSide("miss", 6, 10, 10)
    full.load_state_dict({"D": target.T})
    assert torch.equal(full.merged_weight(torch.zeros(6, 10)), target)
    one = BoneSide("miss", 6, 10, 1)
    one.load_state_dict({"D": torch.arange(6.0)[None]})
    assert torch.equal(one.merged_weight(torch.zeros(6, 10)), torch.arange(6.0)[:, None].expand(6, 10))


@pytest.mark.parametrize("variant", GUIDED)
def test_guided_updates_have_full_rank_and_are_linear(variant: str) -> None:
    torch.manual_seed(6)
    weight = torch.randn(24, 32, dtype=torch.float64)
    first, second = (dict(make_side(variant, 24, 32, 8, 1.0).double().named_parameters()) for _ in range(2))
    both = {name: first[name] + 2 * second[name] for name in first}
    one, two, sum_of_both = (merge_weight(variant, weight, own) - weight for own in (first, second, both))
    assert int(torch.linalg.matrix_rank(one)) == 24  # with 8 x 8 blocks
    assert max_error(sum_of_both, one + 2 * two) < 1e-13


@pytest.mark.parametrize("variant", VARIANTS)
def test_merging_and_back(variant: str) -> None:
    torch.manual_seed(7)
    side, base, x = make_side(variant, 48, 64, 8, 0.2), random_linear(48, 64), torch.randn(9, 64)
    merged = side.merged_weight(base.weight)
    assert merged.dtype == torch.float32
    assert max_error(x @ merged.T, side(x, base)) <= 2e-6
    own = dict(side.named_parameters())
    assert float((unmerge_weight(variant, merged, own) - base.weight).abs().max()) <= 1e-6
    # with the layer in 16 bits what comes back is the merged weight's own rounding away
    assert max_error(unmerge_weight(variant, merged.bfloat16(), own), base.weight) < 0.05


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("variant", VARIANTS)
def test_merging_changes_neither_adapter_nor_weight(variant: str, dtype: torch.dtype) -> None:
    torch.manual_seed(8)
    side, weight = make_side(variant, 12, 8, 4, 0.2).to(dtype), torch.randn(12, 8).to(dtype)
    before = {name: value.clone() for name, value in side.state_dict().items()}
    kept = weight.clone()
    first, second = side.merged_weight(weight), side.merged_weight(weight)
    assert torch.equal(first, second)
    assert not first.requires_grad
    assert torch.equal(weight, kept)
    assert all(torch.equal(value, before[name]) for name, value in side.state_dict().items())


def test_what_cannot_be_unmerged() -> None:
    blocks = torch.zeros(3, 4, 4)
    blocks[1] = -torch.eye(4)
    with pytest.raises(WkvError, match=r"I \+ B is near singular in block 1 .*own file"):
        unmerge_weight("bone-row", torch.ones(8, 12), {"B": blocks})
    with pytest.raises(WkvError, match=r"I \+ A is near singular in block 1"):
        unmerge_weight("bone-ab", torch.ones(8, 12), {"A": blocks, "B": torch.zeros(3, 4, 4)})
    blocks[1] = torch.nan
    with pytest.raises(WkvError, match="infinite or NaN"):
        unmerge_weight("bone-col", torch.ones(12, 8), {"B": blocks})
    with pytest.raises(WkvError, match="needs a matrix and its B"):
        merge_weight("bone-row", torch.ones(8, 12), {"D": torch.ones(3, 4)})
    with pytest.raises(WkvError, match=r"on a layer \[8, 12\] needs"):
        merge_weight("bone-row", torch.ones(8, 12), {"B": torch.ones(2, 4, 4)})


# ---------------------------------------------------------------- 16 bits


@pytest.mark.parametrize("setting", ["bfloat16", "float16", "float16 with bias", "autocast"])
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.usefixtures("slab")
def test_sixteen_bits(variant: str, setting: str) -> None:
    torch.manual_seed(9)
    kind = "bfloat16" if setting == "autocast" else setting.split()[0]
    low: torch.dtype = getattr(torch, kind)
    base = random_linear(64, 96, torch.float32 if setting == "autocast" else low, bias="bias" in setting)
    side, x, dy = make_side(variant, 64, 96, 8, 0.05), torch.randn(40, 96).to(low), torch.randn(40, 64).to(low)
    exact = linear(base.weight.double(), None if base.bias is None else base.bias.double())
    expected_y, expected = gradients(make_like(side).double(), x.double(), exact, dy.double())
    with torch.autocast("cpu", low, enabled=setting == "autocast"):
        y, found = gradients(side, x.float() if setting == "autocast" else x, base, dy)
    assert y.dtype == low
    bar = 1e-2 if kind == "bfloat16" else 1.5e-3  # a few roundings of 2^-9 or 2^-12
    assert max_error(y, expected_y) < bar
    for name, gradient in found.items():
        assert max_error(gradient, expected[name]) < bar, name
        assert gradient.dtype == (x.dtype if name == "x" and setting != "autocast" else torch.float32)


def make_like(side: BoneSide) -> BoneSide:
    copy = BoneSide(side.variant, side.out_features, side.in_features, side.rank, side.mini_rank)
    copy.load_state_dict(side.state_dict())
    return copy


def effect(found: Tensor, base: Tensor, update: Tensor) -> float:
    """How much of the update is in `found`: 1 if all, 0 if none (regression of found - base on it)."""
    found, base, update = (tensor.detach().double() for tensor in (found, base, update))
    return float(((found - base) * update).sum() / update.square().sum())


@pytest.mark.parametrize("variant", VARIANTS)
def test_small_updates_have_their_effect_in_bfloat16(variant: str) -> None:
    """Updates of 2^-12 of the weights: rounded weights, or a rounded product to which they are added, lose them."""
    torch.manual_seed(10)
    base, x = random_linear(256, 256, torch.bfloat16), torch.randn(400, 256).bfloat16()
    side = make_side(variant, 256, 256, 16, 1.0)
    exact_weight = base.weight.double()
    size = (side.merged_weight(exact_weight) - exact_weight).norm() / exact_weight.norm()
    with torch.no_grad():
        for parameter in side.parameters():
            parameter *= 2**-12 / size
    merged = make_like(side).double().merged_weight(exact_weight)
    update = x.double() @ (merged - exact_weight).T
    product = x.double() @ exact_weight.T
    assert effect(side(x, base), product, update) == pytest.approx(1, abs=0.2)
    assert effect((base(x).float() + update.float()).bfloat16(), base(x), update) < 0.6
    if variant in GUIDED:
        assert effect(x @ merged.bfloat16().T, base(x), update) < 0.6


def test_gradients_are_added_up_in_float32() -> None:
    """4096 equal contributions: added one by one in bfloat16, they would stop at 256."""
    base = linear(torch.zeros(4, 4).bfloat16())
    x, dy = torch.ones(4096, 4).bfloat16(), torch.ones(4096, 4).bfloat16()
    for variant in VARIANTS:
        side = BoneSide(variant, 4, 4, 2, 2 if variant == "miss-mini" else None)
        _, found = gradients(side, x, base, dy)
        expected = {"A": 0, "B": 4096 * 2, "D": 4096 * 2 * (2 if variant == "miss-mini" else 1)}
        for name, _ in side.named_parameters():
            assert bool((found[name] == expected[name]).all()), (variant, name)


# ---------------------------------------------------------------- quantised bases


@pytest.mark.parametrize("kind", ["int8", "int4", "nf4"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_quantised_bases(variant: str, kind: Any) -> None:
    """Gradients are those with the dequantised weight; values differ by the kernels' 15-bit inputs alone."""
    torch.manual_seed(11)
    freeze: Callable[..., nn.Module] = freeze_linear if kind == "nf4" else quantize_linear
    base: Any = freeze(random_linear(64, 96), kind)
    side, x, dy = make_side(variant, 64, 96, 8, 0.1), torch.randn(2, 5, 96), torch.randn(2, 5, 64)
    y, found = gradients(side, x, base, dy)
    expected_y, expected = gradients(side, x, linear(base.dequantize()), dy)
    assert max_error(y, expected_y) < (2e-6 if kind == "nf4" else 2e-4)
    assert all(torch.equal(found[name], expected[name]) for name in found)
    assert max_error(x @ side.merged_weight(base.dequantize()).T, expected_y) < 2e-6
    y, found = gradients(side, x.bfloat16(), base, dy.bfloat16())
    assert y.dtype == torch.bfloat16
    assert max_error(y, expected_y) < 1e-2
    assert max(max_error(found[name], expected[name]) for name in found) < 2e-2


# ---------------------------------------------------------------- memory


@pytest.mark.parametrize("setting", ["float32", "bfloat16", "autocast", "int8", "nf4"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_memory(variant: str, setting: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing of the weight's size is kept for backward, and at most one tensor of that size is alive at a time.

    Quantised layers need more for a moment when they make their weight: so many, and none besides.
    """
    monkeypatch.setitem(bone_product.SLAB, "cpu", 1)
    torch.manual_seed(12)
    base: Any = random_linear(64, 96, torch.bfloat16 if setting == "bfloat16" else torch.float32)
    base = {"int8": quantize_linear, "nf4": freeze_linear}.get(setting, lambda layer, kind: layer)(base, setting)
    side = make_side(variant, 64, 96, 8, 0.1)
    x = torch.randn(6, 96).to(torch.bfloat16 if setting == "bfloat16" else torch.float32).requires_grad_()
    autocast = torch.autocast("cpu", torch.bfloat16, enabled=setting == "autocast")
    with autocast, saved_tensors() as saved, LargeTensors(64 * 96) as forward:
        y = side(x, base)
    with LargeTensors(64 * 96) as backward:
        y.sum().backward()
    with LargeTensors(64 * 96) as dequantizing:
        _ = base.dequantize() if setting in ("int8", "nf4") else None
    assert max(tensor.numel() for tensor in saved) < 64 * 96
    assert forward.most <= max(1, dequantizing.most)
    assert backward.most <= max(1, dequantizing.most)
    if setting in ("float32", "bfloat16") and (variant != "bone-col" or setting == "bfloat16"):
        assert forward.most == backward.most == 0
    if setting == "float32" and variant == "bone-col":
        assert (forward.most, backward.most) == (1, 0)


# ---------------------------------------------------------------- sizes


def test_shapes() -> None:
    found = {variant: make_side(variant, 48, 24, 8).state_dict() for variant in VARIANTS}
    assert {name: tuple(t.shape) for name, t in found["bone-ab"].items()} == {"A": (3, 8, 8), "B": (3, 8, 8)}
    assert found["bone-col"]["B"].shape == (6, 8, 8)
    assert found["bone-row"]["B"].shape == (3, 8, 8)
    assert found["miss"]["D"].shape == (8, 48)
    assert found["miss-mini"]["D"].shape == (8, 24)
    assert all(t.dtype == torch.float32 and not t.any() for own in found.values() for t in own.values())
    assert repr(make_side("miss-mini", 48, 24, 8)) == "BoneSide(miss-mini, 24 -> 48, rank=8, mini_rank=24)"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ("bone-row", 48, 36, 8),
            r"rank 8 does not divide both out_features 48 and in_features 36.* choose 6, or miss",
        ),
        (("bone-col", 20, 32, 8), "choose 4"),
        (("bone", 32, 32, 8), "'bone' is not a variant of Bone; one of bone-col"),
        (("miss", 32, 32, 33), "rank 33 is larger than in_features 32"),
        (("miss", 32, 32, 0), "rank must be a positive integer"),
        (("miss", 32, 32, 8, 4), "miss takes no mini_rank"),
        (("miss-mini", 32, 32, 8), "miss-mini needs a mini_rank"),
        (("miss-mini", 30, 32, 8, 8), "mini_rank 8 does not divide out_features 30; 6 would"),
        (("miss-mini", 30, 32, 8, 0), "mini_rank must be a positive integer"),
    ],
)
def test_sizes_that_do_not_fit(arguments: Any, message: str) -> None:
    with pytest.raises(WkvError, match=message):
        BoneSide(*arguments)


def test_inputs_and_layers_that_do_not_fit() -> None:
    side, base = make_side("miss", 8, 12, 4), random_linear(8, 12)
    with pytest.raises(WkvError, match=r"expected \[..., 12\], found \[3, 11\]"):
        side(torch.zeros(3, 11), base)
    base.requires_grad_()
    with pytest.raises(WkvError, match="must be frozen"):
        side(torch.zeros(3, 12), base)
    with torch.no_grad():
        side(torch.zeros(3, 12), base)


# ---------------------------------------------------------------- equal numbers of parameters

LLAMA2_7B = [shape for _ in range(32) for shape in [(4096, 4096)] * 4 + [(11008, 4096)] * 2 + [(4096, 11008)]]


def test_counts() -> None:
    """The numbers of the paper's tables."""
    assert count_parameters("miss", LLAMA2_7B, 64) == count_parameters("bone-col", LLAMA2_7B, 64) == 87_031_808
    assert count_parameters("lora", LLAMA2_7B, 36) == 89_948_160
    for variant in VARIANTS:
        side = make_side(variant, 48, 24, 8)
        found = count_parameters(variant, [(48, 24)], 8, side.mini_rank)
        assert found == sum(parameter.numel() for parameter in side.parameters())


def test_equal_rank() -> None:
    assert equal_rank("lora", LLAMA2_7B, "miss", 64) == (35, 87_449_600, 87_031_808)
    assert equal_rank("miss", LLAMA2_7B, "lora", 32) == (59, 80_232_448, 79_953_920)
    assert equal_rank("bone-row", LLAMA2_7B, "lora", 32).rank == 64  # divides all sizes
    assert equal_rank("lora", [(64, 64)], "miss-mini", 8, 16) == (1, 128, 128)
    assert equal_rank("miss-mini", [(64, 64)], "lora", 1, 16) == (8, 128, 128)
    assert equal_rank("lora", [(8, 8)], "bone-ab", 8).rank == 8
    with pytest.raises(WkvError, match="at least one layer"):
        equal_rank("lora", [], "miss", 8)
    with pytest.raises(WkvError, match="not a variant"):
        equal_rank("loha", [(8, 8)], "miss", 8)
