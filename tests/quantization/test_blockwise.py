"""Weights in blocks: the golden vectors of bitsandbytes, odd sizes, zeros, rounding, types, errors."""

from __future__ import annotations

import subprocess
import sys

import hypothesis
import pytest
import torch
from hypothesis import strategies as st

from tests.ops.helpers import golden, max_error
from tests.quantization.helpers import relative
from wkv.errors import WkvError
from wkv.quantization import blockwise
from wkv.quantization.blockwise import BLOCK_KINDS, BlockKind, Blocks, code_values, quantize_blocks

GOLDEN = golden("bnb_quant", "bnb_quant")
CASES: list[tuple[BlockKind, bool]] = [
    ("nf4", False), ("nf4", True), ("fp4", False), ("fp4", True), ("int8-block", False), ("int8-row", False)
]  # fmt: skip


def normal(*shape: int, seed: int = 3) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def codes_of(blocks: Blocks) -> torch.Tensor:
    """One code for each weight, flat."""
    if blocks.kind not in ("nf4", "fp4"):
        return blocks.codes
    return torch.stack([blocks.codes >> 4, blocks.codes & 15], 1).flatten()[: blocks.shape[0] * blocks.shape[1]]


# ---------------------------------------------------------------- golden vectors


@pytest.mark.parametrize("double", [False, True])
@pytest.mark.parametrize("size", [64, 128])
@pytest.mark.parametrize("kind", ["nf4", "fp4"])
def test_golden_4_bits(kind: BlockKind, size: int, double: bool) -> None:
    key = f"{kind}.b{size}.{'dq' if double else 'sq'}"
    blocks = quantize_blocks(GOLDEN["W"], kind, size, double)
    assert torch.equal(code_values(kind), GOLDEN[f"{key}.code"])
    assert torch.equal(blocks.codes, GOLDEN[f"{key}.packed"])
    assert torch.equal(blocks.absmax, GOLDEN[f"{key}.absmax"])
    assert blocks.absmax.dtype == GOLDEN[f"{key}.absmax"].dtype
    for name in ("offset", "nested_absmax") if double else ():
        assert max_error(getattr(blocks, name), GOLDEN[f"{key}.{name}"]) < 1e-6
    if size == 64:
        assert max_error(blocks.dequantize(), GOLDEN[f"{key}.deq"]) < 1e-6


@pytest.mark.parametrize("double", [False, True])
@pytest.mark.parametrize("kind", ["nf4", "fp4"])
def test_blocks_of_128_by_the_equation(kind: BlockKind, double: bool) -> None:
    key = f"{kind}.b128.{'dq' if double else 'sq'}"
    blocks = quantize_blocks(GOLDEN["W"], kind, 128, double)
    scales = GOLDEN[f"{key}.absmax"].double()
    if double:
        nested = GOLDEN[f"{key}.nested_absmax"].double()
        scales = GOLDEN["int8blk.code"].double()[scales.long()] * nested + GOLDEN[f"{key}.offset"].double()
    expected = GOLDEN[f"{key}.code"].double()[codes_of(blocks).long()].view(-1, 128) * scales[:, None]
    assert max_error(blocks.dequantize(), expected.view(32, 64)) < 1e-6


@pytest.mark.parametrize("size", [256, 4096])
def test_golden_dynamic_map(size: int) -> None:
    blocks = quantize_blocks(GOLDEN["W"], "int8-block", size)
    assert torch.equal(code_values("int8-block"), GOLDEN["int8blk.code"])
    assert torch.equal(blocks.codes.view(32, 64), GOLDEN[f"int8blk.b{size}.q"])
    assert torch.equal(blocks.absmax, GOLDEN[f"int8blk.b{size}.absmax"])
    assert max_error(blocks.dequantize(), GOLDEN[f"int8blk.b{size}.deq"]) < 1e-6


def test_rows_by_the_equation() -> None:
    weight = normal(40, 70) * torch.logspace(-6, 3, 40)[:, None]
    blocks = quantize_blocks(weight, "int8-row")
    absmax = weight.abs().amax(1)
    assert torch.equal(blocks.absmax, absmax)
    codes = blocks.codes.view(40, 70)
    assert codes.dtype == torch.int8
    exact = weight.double() * 127 / absmax.double()[:, None]
    assert float((codes - exact).abs().max()) <= 0.5 + 1e-5
    assert torch.equal(codes.long().abs().amax(1), torch.full((40,), 127))
    assert max_error(blocks.dequantize(), codes.double() / 127 * absmax.double()[:, None]) < 1e-6


# ---------------------------------------------------------------- codes


@pytest.mark.parametrize("kind", ["nf4", "fp4"])
def test_every_value_gets_the_nearest_code(kind: BlockKind) -> None:
    """Also beside the edges of the cells in which codes are looked up, and beside the limits between codes."""
    values, order = code_values(kind).sort(stable=True)
    limits = (values[1:] + values[:-1]) / 2
    points = torch.cat([torch.arange(blockwise._CELLS + 1) * 2 / blockwise._CELLS - 1, limits])
    sides = [points.nextafter(torch.tensor(side)) for side in (-2.0, 2.0)]
    x = torch.cat([points, *sides, normal(1, 9999).flatten().clamp(-1, 1)]).clamp(-1, 1)
    x = torch.cat([x, torch.ones(1 + x.numel() % 2)])  # an even number, and absmax is 1
    blocks = quantize_blocks(x[None], kind, 1 << 17)
    assert torch.equal(blocks.absmax, torch.ones(1))
    expected = order[torch.bucketize(x, limits)]
    assert torch.equal(codes_of(blocks).long(), expected[: x.numel()])


def test_the_two_zeros_of_fp4() -> None:
    weight = torch.zeros(1, 16)
    weight[0, :4] = torch.tensor([1, 1e-4, -1e-4, 0])
    assert codes_of(quantize_blocks(weight, "fp4", 16)).tolist()[:4] == [3, 8, 0, 0]


@pytest.mark.parametrize(("kind", "double"), CASES)
def test_codes_do_not_depend_on_slabs(kind: BlockKind, double: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    weight = normal(37, 51)
    whole = quantize_blocks(weight, kind, 16, double)
    values = whole.dequantize()
    for slab in (1, 64, 1000):
        monkeypatch.setattr(blockwise, "_SLAB", slab)
        parts = quantize_blocks(weight, kind, 16, double)
        assert torch.equal(parts.codes, whole.codes)
        assert torch.equal(parts.absmax, whole.absmax)
        assert torch.equal(parts.dequantize(), values)


@hypothesis.given(
    case=st.sampled_from(CASES),
    rows=st.integers(1, 9),
    columns=st.integers(1, 50),
    size=st.sampled_from([16, 64, 4096]),
    seed=st.integers(0, 100),
)
@hypothesis.settings(max_examples=60)
def test_any_shape(case: tuple[BlockKind, bool], rows: int, columns: int, size: int, seed: int) -> None:
    kind, double = case
    weight = normal(rows, columns, seed=seed)
    blocks = quantize_blocks(weight, kind, size, double)
    found = blocks.dequantize()
    assert found.shape == weight.shape
    # Half of the widest gap between values of the table, and a step of the scale where it is quantised.
    gap = {"nf4": 0.152, "fp4": 0.167, "int8-block": 0.0071, "int8-row": 0.004}[kind] + (0.02 if double else 0)
    assert float((found - weight).abs().max()) <= gap * float(weight.abs().max())
    assert blocks.num_bytes == sum(
        tensor.nbytes for tensor in (blocks.codes, blocks.absmax, blocks.offset, blocks.nested_absmax)
        if tensor is not None
    )  # fmt: skip


@pytest.mark.parametrize("kind", ["nf4", "fp4", "int8-row"])
def test_quantising_again_changes_nothing(kind: BlockKind) -> None:
    blocks = quantize_blocks(normal(48, 40), kind)
    again = quantize_blocks(blocks.dequantize(), kind)
    assert torch.equal(again.absmax, blocks.absmax)
    assert torch.equal(again.dequantize(), blocks.dequantize())


@pytest.mark.parametrize(("kind", "double"), CASES)
def test_zeros_and_tiny_weights(kind: BlockKind, double: bool) -> None:
    assert torch.equal(quantize_blocks(torch.zeros(6, 16), kind, 16, double).dequantize(), torch.zeros(6, 16))
    weight = normal(6, 16) * 1e-42
    weight[2] = 0
    found = quantize_blocks(weight, kind, 16, double).dequantize()
    assert bool(found.isfinite().all())
    assert float((found - weight).abs().max()) <= 0.2 * float(weight.abs().max())


def test_errors_on_normal_weights_are_those_of_the_documentation() -> None:
    weight = normal(512, 768)
    found = [relative(quantize_blocks(weight, kind, 64, double).dequantize(), weight) for kind, double in CASES]
    expected = [0.0920, 0.0920, 0.1220, 0.1220, 0.0095, 0.0077]
    assert found == pytest.approx(expected, rel=0.01)
    bits = [8 * quantize_blocks(weight, kind, 64, double).num_bytes / weight.numel() for kind, double in CASES]
    assert bits == pytest.approx([4.5, 4.127, 4.5, 4.127, 8.5, 8.042], abs=0.001)


# ---------------------------------------------------------------- types and surroundings


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize(("kind", "double"), CASES)
def test_other_types(kind: BlockKind, double: bool, dtype: torch.dtype) -> None:
    weight = normal(16, 32).to(dtype)
    blocks = quantize_blocks(weight, kind, 64, double)
    plain = quantize_blocks(weight.float(), kind, 64, double)
    assert torch.equal(blocks.codes, plain.codes)
    assert torch.equal(blocks.dequantize(dtype), plain.dequantize().to(dtype))


def test_weights_that_are_not_contiguous() -> None:
    weight = normal(32, 16)
    assert torch.equal(quantize_blocks(weight.T, "nf4").codes, quantize_blocks(weight.T.contiguous(), "nf4").codes)
    parameter = torch.nn.Parameter(weight)
    assert not quantize_blocks(parameter, "nf4").dequantize().requires_grad


def test_tables_do_not_depend_on_who_asks_first() -> None:
    code = """
import torch
from wkv.quantization.blockwise import quantize_blocks
weight = torch.randn(8, 16, generator=torch.Generator().manual_seed(0))
torch.set_default_dtype(torch.float64)
with torch.device("meta"), torch.inference_mode():
    found = [quantize_blocks(weight, *case).dequantize().sum().item()
             for case in (("nf4", 16, True), ("fp4", 16), ("int8-block", 16), ("int8-row",))]
torch.set_default_dtype(torch.float32)
print(found == [quantize_blocks(weight, *case).dequantize().sum().item()
                for case in (("nf4", 16, True), ("fp4", 16), ("int8-block", 16), ("int8-row",))],
      quantize_blocks(weight, "nf4").dequantize().dtype)
"""
    done = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, timeout=60)
    assert done.stdout.split() == ["True", "torch.float32"], done.stderr


def test_compiled() -> None:
    blocks = quantize_blocks(normal(8, 16), "nf4", 16, True)
    torch.compiler.reset()
    compiled = torch.compile(lambda: blocks.dequantize() * 2, backend="aot_eager", fullgraph=True)
    assert torch.equal(compiled(), blocks.dequantize() * 2)


# ---------------------------------------------------------------- errors


@pytest.mark.parametrize("value", [torch.inf, -torch.inf, torch.nan])
@pytest.mark.parametrize(("kind", "double"), CASES)
def test_weights_that_are_not_finite(kind: BlockKind, double: bool, value: float) -> None:
    weight = normal(8, 16)
    weight[3, 5] = value
    with pytest.raises(WkvError, match="infinite or NaN"):
        quantize_blocks(weight, kind, 64, double)


def test_weights_too_large_for_float32() -> None:
    with pytest.raises(WkvError, match="in float32"):
        quantize_blocks(torch.full((2, 2), 1e200, dtype=torch.float64), "nf4")


@pytest.mark.parametrize("size", [0, 8, 48, -64, 64.0, True, None])
def test_block_sizes(size: object) -> None:
    with pytest.raises(WkvError, match="power of two"):
        quantize_blocks(normal(2, 16), "nf4", size)  # type: ignore[arg-type]


def test_other_arguments() -> None:
    with pytest.raises(WkvError, match=f"unknown kind 'int8'; one of {', '.join(BLOCK_KINDS)}"):
        quantize_blocks(normal(2, 16), "int8")  # type: ignore[arg-type]
    for kind in ("int8-block", "int8-row"):
        with pytest.raises(WkvError, match="nf4 and fp4"):
            quantize_blocks(normal(2, 16), kind, double=True)
    for weight in (normal(4), normal(2, 2, 2), torch.ones(2, 2, dtype=torch.int64), torch.ones(0, 4)):
        with pytest.raises(WkvError, match="only floating-point matrices"):
            quantize_blocks(weight, "nf4")
    with pytest.raises(WkvError, match="meta"):
        quantize_blocks(torch.empty(2, 2, device="meta"), "nf4")


def test_tensors_that_do_not_fit() -> None:
    codes, absmax = torch.zeros(32, dtype=torch.uint8), torch.zeros(1)
    assert Blocks("nf4", 64, (8, 8), codes, absmax).dequantize().shape == (8, 8)
    with pytest.raises(WkvError, match=r"codes must be torch.uint8 \[32\], found torch.uint8 \[31\]"):
        Blocks("nf4", 64, (8, 8), codes[1:], absmax)
    with pytest.raises(WkvError, match=r"codes must be torch\.int8"):
        Blocks("int8-row", 8, (8, 8), codes, absmax)
    with pytest.raises(WkvError, match="rows of 8 weights"):
        Blocks("int8-row", 64, (8, 8), codes, absmax)
    with pytest.raises(WkvError, match=r"absmax must be torch.float32 \[1\]"):
        Blocks("nf4", 64, (8, 8), codes, absmax.double())
    with pytest.raises(WkvError, match=r"nested_absmax must be .* found nothing"):
        Blocks("nf4", 64, (8, 8), codes, absmax.to(torch.uint8), offset=absmax)
    with pytest.raises(WkvError, match="unknown kind"):
        Blocks("nf5", 64, (8, 8), codes, absmax)  # type: ignore[arg-type]
