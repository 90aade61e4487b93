"""Weights in blocks with a scale each, as bitsandbytes 0.50 stores them: NF4, FP4, 8-bit dynamic map, 8 bits by row.

A block is a run of consecutive weights of the matrix in row-major order; the last one may be short. Its scale `absmax`
is its largest magnitude, and a weight becomes the code of a table value near w / absmax, which lies in [-1, 1].

nf4: 16 values, quantiles of the normal distribution (QLoRA, arXiv 2305.14314, section 3 and appendix E).
fp4: 16 values: sign, two bits of exponent, one of mantissa, divided by the largest. Zero has two codes.
int8-block: 256 values of the "dynamic map" (arXiv 2110.02861): fine near zero, seven decades.
int8-row: code / 127 with codes -127 .. 127; a block is a row of the matrix.

nf4 and fp4 pack two codes into a byte, the first weight in its upper half. With `double` their scales are stored in 8
bits too, in blocks of 256: absmax = map[code] * nested_absmax + offset (QLoRA, section 3).
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from wkv.errors import WkvError

BlockKind = Literal["nf4", "fp4", "int8-block", "int8-row"]
BLOCK_KINDS: tuple[str, ...] = get_args(BlockKind)
NESTED_BLOCK = 256

_FOUR_BITS = ("nf4", "fp4")
_SMALLEST_BLOCK = 16
# Weights handled at a time: temporary arrays stay small and, on the CPU, in its cache.
_SLAB, _SLAB_ELSEWHERE = 1 << 18, 1 << 24
_CELLS = 4096  # of [-1, 1]: the limits between values of 4-bit tables are 5 cells apart or more
_STEPS = 65535  # codes of the dynamic map are looked up by w / absmax rounded to this many steps

_NF4 = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip
_FP4_TWELFTHS = (0.0, 0.0625, 8.0, 12.0, 4.0, 6.0, 2.0, 3.0)


@dataclass(frozen=True, eq=False)
class Blocks:
    """A matrix [O, I] in blocks.

    Args:
        kind: "nf4", "fp4", "int8-block" or "int8-row".
        block_size: weights of one scale; I for int8-row.
        shape: (O, I).
        codes: flat, in row-major order; uint8 [ceil(O I / 2)] for 4 bits, uint8 [O I], or int8 [O I] for int8-row.
        absmax: scales, float32 [number of blocks]; uint8 if they are quantised themselves.
        offset, nested_absmax: float32 [1] and float32 [ceil(number of blocks / 256)] then, else None.

    Raises:
        WkvError: if the tensors do not fit each other.
    """

    kind: BlockKind
    block_size: int
    shape: tuple[int, int]
    codes: Tensor
    absmax: Tensor
    offset: Tensor | None = None
    nested_absmax: Tensor | None = None

    def __post_init__(self) -> None:
        _check_kind(self.kind)
        rows, columns = self.shape
        if self.kind == "int8-row" and self.block_size != columns:
            raise WkvError(f"blocks of int8-row are rows of {columns} weights, found block_size {self.block_size}")
        num_codes, num_blocks = rows * columns, -(-rows * columns // self.block_size)
        if self.kind in _FOUR_BITS:
            num_codes = -(-num_codes // 2)
        _check_tensor("codes", self.codes, torch.int8 if self.kind == "int8-row" else torch.uint8, num_codes)
        _check_tensor("absmax", self.absmax, torch.uint8 if self.double else torch.float32, num_blocks)
        if self.double:
            _check_tensor("offset", self.offset, torch.float32, 1)
            _check_tensor("nested_absmax", self.nested_absmax, torch.float32, -(-num_blocks // NESTED_BLOCK))

    @property
    def double(self) -> bool:
        """Whether the scales are quantised."""
        return self.nested_absmax is not None or self.offset is not None

    @property
    def num_bytes(self) -> int:
        """Bytes of codes and scales."""
        tensors = (self.codes, self.absmax, self.offset, self.nested_absmax)
        return sum(tensor.nbytes for tensor in tensors if tensor is not None)

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The matrix [O, I] the codes stand for, computed in float32 and rounded once to `dtype`."""
        stored = (self.codes, self.absmax, self.offset, self.nested_absmax)
        run = _dequantize_op if torch.compiler.is_compiling() else _dequantize
        values: Tensor = run(*stored, self.kind, self.block_size, math.prod(self.shape), dtype)
        return values.view(self.shape)


def quantize_blocks(weight: Tensor, kind: BlockKind, block_size: int = 64, double: bool = False) -> Blocks:
    """Quantise a matrix.

    Args:
        weight: floating point [O, I], finite.
        kind: "nf4", "fp4", "int8-block" or "int8-row".
        block_size: weights of one scale: a power of two, at least 16. A block of int8-row is a row whatever it says.
        double: quantise the scales as well; for nf4 and fp4.

    Raises:
        WkvError: for an unknown kind or size, or if `weight` is not a finite floating-point matrix.
    """
    _check_options(kind, block_size, double)
    if weight.ndim != 2 or not weight.dtype.is_floating_point or weight.numel() == 0:
        raise WkvError(f"only floating-point matrices can be quantised, found {list(weight.shape)} of {weight.dtype}")
    if weight.is_meta:
        raise WkvError("the matrix has no values (it is on the meta device); load or initialise it first")
    shape = (weight.shape[0], weight.shape[1])
    size = shape[1] if kind == "int8-row" else block_size
    flat = weight.detach().reshape(-1)
    absmax = _largest(flat, size)
    if not bool(absmax.isfinite().all()):
        raise WkvError("a matrix with weights that are infinite or NaN in float32 cannot be quantised")
    codes = _codes(flat, absmax, size, kind)
    return Blocks(kind, size, shape, codes, *(_nested(absmax) if double else (absmax,)))


# ---------------------------------------------------------------- tables


@functools.cache
def _table(make: Callable[[str], Tensor], kind: str, device: torch.device) -> Tensor:
    """`make(kind)`, made once for each device."""
    with torch.device("cpu"):  # wherever new tensors go at the time
        return make(kind).to(device)


def code_values(kind: str) -> Tensor:
    """The float32 values of the codes 0, 1, ...: 16 or 256 in [-1, 1]; for int8-row those of -127, -126, ..., 127."""
    if kind == "nf4":
        return torch.tensor(_NF4, dtype=torch.float32)
    if kind == "fp4":
        magnitudes = torch.tensor(_FP4_TWELFTHS, dtype=torch.float32) / 12
        return torch.cat([magnitudes, 0 - magnitudes])
    return _dynamic_map() if kind == "int8-block" else torch.arange(-127, 128).float() / 127


def _dynamic_map() -> Tensor:
    """0, 1, and +-10^(e - 6) times the middles of 2^e equal parts of [0.1, 1], for e = 0 .. 6; ascending."""
    values = [torch.tensor([0, 1], dtype=torch.float32)]
    for exponent in range(7):
        edges = torch.linspace(0.1, 1, 2**exponent + 1, dtype=torch.float32)
        middles = 10.0 ** (exponent - 6) * (edges[1:] + edges[:-1]) / 2
        values += [middles, -middles]
    return torch.cat(values).sort().values


def _limits(kind: str) -> Tensor:
    """The middles between the values of a table in ascending order."""
    values = code_values(kind).sort().values
    return (values[1:] + values[:-1]) / 2


def _rank_below(kind: str) -> Tensor:
    """For each of the cells into which [-1, 1] is cut, the index of the limit nearest to its middle; uint8."""
    middles = (torch.arange(_CELLS + 1).float() + 0.5) * 2 / _CELLS - 1
    return (middles[:, None] - _limits(kind)).abs().argmin(1).to(torch.uint8)


def _cell_limits(kind: str) -> Tensor:
    """The limits themselves. No cell holds two: `_CELLS`."""
    return _limits(kind)[_rank_below(kind).long()]


def _byte_codes(kind: str) -> Tensor:
    """Byte of two ranks among ascending values -> byte of two codes."""
    order = code_values(kind).sort(stable=True).indices
    return (16 * order[:, None] + order).to(torch.uint8).flatten()


def _byte_values(kind: str) -> Tensor:
    """What a byte stands for: two float32 values, seen as one int64, so that one look-up finds both."""
    values, byte = code_values(kind), torch.arange(256)
    return torch.stack([values[byte >> 4], values[byte & 15]], 1).view(torch.int64).flatten()


def _map_codes(kind: str) -> Tensor:
    """Step 0 .. 65535 of [-1, 1] -> the code of the dynamic map that is nearest to it; uint8."""
    steps = 2 * torch.arange(_STEPS + 1).double() / _STEPS - 1
    return torch.bucketize(steps, _limits(kind).double()).to(torch.uint8)


# ---------------------------------------------------------------- weights -> codes


def _largest(flat: Tensor, size: int) -> Tensor:
    """Largest magnitude of each block, float32; NaN if there is one."""
    slabs = _slabs(flat, size)
    return torch.cat([_in_blocks(flat[slab].float(), size).abs().amax(1) for slab in slabs])


def _codes(flat: Tensor, absmax: Tensor, size: int, kind: str) -> Tensor:
    """Codes of finite weights, as `Blocks` stores them."""
    parts = []
    for slab in _slabs(flat, size):
        largest = absmax[_blocks_of(slab, size)]
        divisor = torch.where(largest > 0, largest, 1)  # a block of zeros stays zero
        x = (_in_blocks(flat[slab].float(), size) / divisor[:, None]).flatten()[: slab.stop - slab.start]
        parts.append(_encode(x, kind))
    return torch.cat(parts)


def _encode(x: Tensor, kind: str) -> Tensor:
    """Values in [-1, 1] -> codes."""
    if kind == "int8-row":
        return torch.round(x * 127).to(torch.int8)
    if kind == "int8-block":
        # Not the entry nearest to x but the one nearest to x in 65536 steps, as bitsandbytes finds it.
        step = ((x / 2 + 0.5) * _STEPS + 0.5).int()
        return _table(_map_codes, kind, x.device).index_select(0, step)
    # Two look-ups and a comparison: several times as fast as torch.bucketize.
    cell = ((x + 1) * (_CELLS / 2)).int()
    above = x > _table(_cell_limits, kind, x.device).index_select(0, cell)
    rank = _table(_rank_below, kind, x.device).index_select(0, cell) + above.view(torch.uint8)
    pairs = _in_blocks(rank, 2)
    packed = pairs[:, 0] << 4 | pairs[:, 1]
    return packed if kind == "nf4" else _table(_byte_codes, kind, x.device).index_select(0, packed.int())


def _nested(absmax: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Scales in 8 bits, their offset, and the scales of the scales."""
    offset = absmax.mean().reshape(1)
    centred = absmax - offset
    nested_absmax = _largest(centred, NESTED_BLOCK)
    return _codes(centred, nested_absmax, NESTED_BLOCK, "int8-block"), offset, nested_absmax


# ---------------------------------------------------------------- codes -> weights


def _dequantize(
    codes: Tensor,
    absmax: Tensor,
    offset: Tensor | None,
    nested_absmax: Tensor | None,
    kind: str,
    block_size: int,
    numel: int,
    dtype: torch.dtype,
) -> Tensor:
    """Flat weights [numel] of what `Blocks` holds."""
    if offset is not None and nested_absmax is not None:
        absmax = _scaled(_values(absmax, "int8-block"), nested_absmax, NESTED_BLOCK) + offset
    result = torch.empty(numel, dtype=dtype, device=codes.device)
    per_byte = 2 if kind in _FOUR_BITS else 1
    for slab in _slabs(result, block_size):
        part = codes[slab.start // per_byte : -(-slab.stop // per_byte)]
        values = _values(part, kind)[: slab.stop - slab.start]
        result[slab] = _scaled(values, absmax[_blocks_of(slab, block_size)], block_size)
    return result


# For torch.compile, which does not see the tables and slabs inside. As it costs 0.05 ms, others call the function.
_dequantize_op = torch.library.custom_op("wkv::dequantize_blocks", _dequantize, mutates_args=())


@_dequantize_op.register_fake
def _dequantize_fake(
    codes: Tensor,
    absmax: Tensor,
    offset: Tensor | None,
    nested_absmax: Tensor | None,
    kind: str,
    block_size: int,
    numel: int,
    dtype: torch.dtype,
) -> Tensor:
    return codes.new_empty(numel, dtype=dtype)


def _values(codes: Tensor, kind: str) -> Tensor:
    """Flat codes -> flat float32 values in [-1, 1]; those of 4 bits are twice as many as their bytes."""
    if kind == "int8-row":
        return codes.float() / 127
    make = _byte_values if kind in _FOUR_BITS else code_values
    return _table(make, kind, codes.device).index_select(0, codes.int()).view(torch.float32)


def _scaled(values: Tensor, scales: Tensor, size: int) -> Tensor:
    """Values times the scales of their blocks, flat."""
    return (_in_blocks(values, size) * scales[:, None]).flatten()[: values.numel()]


# ---------------------------------------------------------------- blocks and slabs


def _slabs(flat: Tensor, size: int) -> Iterator[slice]:
    """Slices of whole blocks, an even number of weights each but the last."""
    limit = _SLAB if flat.device.type == "cpu" else _SLAB_ELSEWHERE
    step = 2 * size * max(1, limit // (2 * size))
    for begin in range(0, flat.numel(), step):
        yield slice(begin, min(begin + step, flat.numel()))


def _blocks_of(slab: slice, size: int) -> slice:
    return slice(slab.start // size, -(-slab.stop // size))


def _in_blocks(flat: Tensor, size: int) -> Tensor:
    """[n] -> [ceil(n / size), size], zeros behind the end."""
    missing = -flat.numel() % size
    return (F.pad(flat, (0, missing)) if missing else flat).view(-1, size)


# ---------------------------------------------------------------- checks


def _check_kind(kind: str) -> None:
    if kind not in BLOCK_KINDS:
        raise WkvError(f"unknown kind {kind!r}; one of {', '.join(BLOCK_KINDS)}")


def _check_options(kind: str, block_size: int, double: bool) -> None:
    _check_kind(kind)
    number = isinstance(block_size, int) and not isinstance(block_size, bool)
    if not number or block_size < _SMALLEST_BLOCK or block_size & (block_size - 1):
        raise WkvError(f"block_size must be a power of two, at least {_SMALLEST_BLOCK}, found {block_size!r}")
    if double and kind not in _FOUR_BITS:
        raise WkvError(f"double quantisation is for {' and '.join(_FOUR_BITS)}, not for {kind!r}")


def _check_tensor(name: str, tensor: Tensor | None, dtype: torch.dtype, size: int) -> None:
    if tensor is None or tensor.dtype != dtype or tensor.shape != (size,):
        found = "nothing" if tensor is None else f"{tensor.dtype} {list(tensor.shape)}"
        raise WkvError(f"{name} must be {dtype} [{size}], found {found}")
