"""Weights in 8, 6 and 4 bits, in the order in which the native kernels read them.

int8: one scale per output row, w = scale * code with code in -127 .. 127.
int6: one half-precision scale per row and group of 32 inputs, w = scale * (code - 32), code in 0 .. 63: 6.5 bits.
int4: one half-precision scale per row and group of 32 inputs, w = scale * (code - 8) with code in 0 .. 15: 4.5 bits.
      The values are those of ggml's Q4_0; the scale is the one of least squared error, where Q4_0 takes the largest
      weight (relative error on normal weights 8.1 % against 8.6 %, see experiments/quantization_quality; wider and
      finer searches, or both signs of the scale, gain less than 0.01 %).

int8 and int4 exist in two orders. "tiled" is for any matrix. "sparse" is for matrices whose input is often exactly zero
(the value matrix of a squared-ReLU channel mix): all outputs of one input lie together and are skipped with it.
native/src/weights.h describes the bytes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from wkv.errors import WkvError

GROUP = 32
Kind = Literal["int8", "int6", "int4"]

_TILE_ROWS, _TILE_COLUMNS = 16, 64
_ROW_UNIT = {("int8", True): 64, ("int4", True): 128}  # tiled: 16
# Numbers of the formats in native/src/weights.h.
_FORMATS = {("int8", False): 6, ("int6", False): 10, ("int4", False): 7, ("int8", True): 8, ("int4", True): 9}
_SIXTEENTHS = {"int8": 16, "int6": 13, "int4": 9}  # bytes per 16 weights, scales of groups included
_MIDDLE = {"int8": 128, "int6": 32, "int4": 8}  # the code of zero
# Ranges tried for the scale of a group: its largest weight becomes this many steps.
_RANGES = {"int6": (28.0, 34.0), "int4": (6.6, 9.0)}


@dataclass(frozen=True)
class Packed:
    """A quantised matrix [N, K].

    Args:
        kind: "int8", "int6" or "int4".
        sparse: the order of the bytes, see above.
        shape: (N, K) before padding.
        data: uint8, flat.
        scale: float32 [N padded] for int8, else None (scales of groups are part of `data`).
    """

    kind: Kind
    sparse: bool
    shape: tuple[int, int]
    data: Tensor
    scale: Tensor | None

    def __post_init__(self) -> None:
        rows, columns = padded_shape(self.kind, self.sparse, self.shape)
        expected = num_bytes(self.kind, rows, columns)
        if self.data.dtype != torch.uint8 or self.data.shape != (expected,):
            raise WkvError(
                f"a packed {self.kind} matrix of {self.shape} needs {expected} bytes, "
                f"found {list(self.data.shape)} of {self.data.dtype}"
            )
        scales = None if self.scale is None else tuple(self.scale.shape)
        if scales != ((rows,) if self.kind == "int8" else None):
            raise WkvError(f"a packed {self.kind} matrix of {self.shape} does not fit scales of shape {scales}")

    @property
    def format(self) -> int:
        """The number of this format in the native library."""
        return _FORMATS[self.kind, self.sparse]

    @property
    def bits(self) -> int:
        """Of a code: 8, 6 or 4."""
        return int(self.kind.removeprefix("int"))

    @property
    def padded(self) -> tuple[int, int]:
        """(N, K) as stored."""
        return padded_shape(self.kind, self.sparse, self.shape)

    @property
    def num_bytes(self) -> int:
        """Bytes of codes and scales."""
        return self.data.nbytes + (0 if self.scale is None else self.scale.nbytes)

    def dequantize(self) -> Tensor:
        """The float32 matrix [N, K] that the codes stand for."""
        codes, scale = _unpack(self)
        rows, columns = self.shape
        if self.kind == "int8":
            return ((codes.float() - 128) * scale[:, None])[:rows, :columns]
        values = (codes.float() - _MIDDLE[self.kind]).unflatten(1, (-1, GROUP)) * scale[:, :, None]
        return values.flatten(1)[:rows, :columns]


def padded_shape(kind: Kind, sparse: bool, shape: tuple[int, int]) -> tuple[int, int]:
    """(N, K) rounded up to whole tiles."""
    unit = _ROW_UNIT.get((kind, sparse), _TILE_ROWS)
    return -(-shape[0] // unit) * unit, -(-shape[1] // _TILE_COLUMNS) * _TILE_COLUMNS


def num_bytes(kind: str, rows: int, columns: int) -> int:
    """Bytes of the codes, and of the scales among them, of a padded matrix."""
    return rows * columns * _SIXTEENTHS[kind] // 16


def quantize(weight: Tensor, kind: Kind, sparse: bool = False) -> Packed:
    """Quantise a matrix.

    Args:
        weight: floating point [N, K], finite.
        kind: "int8", "int6" or "int4".
        sparse: order for inputs that are often exactly zero; not for int6.

    Raises:
        WkvError: if `weight` is not a finite floating-point matrix, or there is no such order.
    """
    if (kind, sparse) not in _FORMATS:
        raise WkvError(f"there is no {'sparse' if sparse else 'tiled'} order for {kind!r}")
    if weight.ndim != 2 or not weight.dtype.is_floating_point or weight.numel() == 0:
        raise WkvError(f"only floating-point matrices can be quantised, found {list(weight.shape)} of {weight.dtype}")
    if not bool(weight.isfinite().all()):
        raise WkvError("a matrix with infinite or NaN weights cannot be quantised")
    shape = (weight.shape[0], weight.shape[1])
    rows, columns = padded_shape(kind, sparse, shape)
    codes = torch.full((rows, columns), _MIDDLE[kind], dtype=torch.uint8)
    scales = torch.zeros((rows,) if kind == "int8" else (rows, columns // GROUP))
    for begin in range(0, shape[0], 4096):  # slabs: bounds the memory of intermediate values
        part = weight[begin : begin + 4096].detach().float().cpu()
        found = _int8_codes(part) if kind == "int8" else _group_codes(part, kind)
        codes[begin : begin + 4096, : found[0].shape[1]][: part.shape[0]] = found[0]
        scales[begin : begin + part.shape[0]].view(part.shape[0], -1)[
            :, : found[1].view(part.shape[0], -1).shape[1]
        ] = found[1].view(part.shape[0], -1)
    return _pack(kind, sparse, shape, codes, scales)


def _int8_codes(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Codes + 128 [N, K] and scales [N]."""
    scale = weight.abs().amax(1) / 127
    inverse = torch.where(scale > 0, 1 / scale, 0)
    return (torch.round(weight * inverse[:, None]).clamp_(-127, 127) + 128).to(torch.uint8), scale


def _group_codes(weight: Tensor, kind: Kind) -> tuple[Tensor, Tensor]:
    """Codes [N, K padded to 32] and scales [N, K / 32]: the least squared error among 16 ranges, each refitted."""
    middle = _MIDDLE[kind]
    groups = torch.nn.functional.pad(weight, (0, -weight.shape[1] % GROUP)).unflatten(1, (-1, GROUP))
    largest = groups.gather(-1, groups.abs().argmax(-1, keepdim=True))
    best = torch.full_like(largest, torch.inf)
    codes, scales = torch.zeros_like(groups, dtype=torch.uint8), torch.zeros_like(largest)
    for steps in torch.linspace(*_RANGES[kind], 16).tolist():
        scale = largest / -steps
        found = torch.round(groups * torch.where(scale != 0, 1 / scale, 0)).clamp_(-middle, middle - 1)
        energy = found.square().sum(-1, keepdim=True)
        scale = torch.where(energy > 0, (found * groups).sum(-1, keepdim=True) / energy, 0).half().float()
        error = (groups - found * scale).square_().sum(-1, keepdim=True)
        better = error < best
        best = torch.where(better, error, best)
        scales = torch.where(better, scale, scales)
        codes = torch.where(better, (found + middle).to(torch.uint8), codes)
    return codes.flatten(1), scales.squeeze(-1)


def _sparse_order(rows: int, device: torch.device | None = None) -> Tensor:
    """order[i]: the row at place i, within vectors of 64 rows."""
    place = torch.arange(64, device=device)
    row = place % 16 // 4 * 16 + place // 16 * 4 + place % 4
    return (torch.arange(0, rows, 64, device=device)[:, None] + row).flatten()


def _pack(kind: Kind, sparse: bool, shape: tuple[int, int], codes: Tensor, scales: Tensor) -> Packed:
    """Codes [N, K] and scales ([N] or [N, K / 32]), both padded, to bytes."""
    rows, columns = codes.shape
    if kind == "int8":
        if sparse:
            data = codes[_sparse_order(rows)].T
        else:
            data = codes.view(rows // _TILE_ROWS, _TILE_ROWS, columns // 4, 4).transpose(1, 2)
        return Packed(kind, sparse, shape, data.contiguous().flatten(), scales)
    halves = scales.half()
    if sparse:
        pairs = codes[_sparse_order(rows)].T.reshape(columns // GROUP, GROUP, rows // 128, 2, 64)
        nibbles = (pairs[:, :, :, 0] | (pairs[:, :, :, 1] << 4)).flatten(1)
        data = torch.cat([halves.T.contiguous().view(torch.uint8), nibbles], 1)
    else:
        # [tile, column block, vector, half, 4 columns, 16 rows] -> byte 4 row + column
        tiles = codes.view(rows // 16, 16, columns // 64, 8, 2, 4).permute(0, 2, 3, 4, 1, 5)
        nibbles = (tiles[:, :, :, 0] & 15 | (tiles[:, :, :, 1] << 4)).flatten(2)
        tile_scales = halves.view(rows // 16, 16, columns // 64, 2).permute(0, 2, 3, 1).contiguous()
        parts = [tile_scales.flatten(2).view(torch.uint8), nibbles]
        if kind == "int6":
            # [tile, column block, vector, quarter, 16 rows, 4 columns]: two bits of each quarter in one byte
            upper = codes.view(rows // 16, 16, columns // 64, 4, 4, 4).permute(0, 2, 3, 4, 1, 5) >> 4
            parts.append(sum(upper[:, :, :, t] << 2 * t for t in range(4)).flatten(2))  # type: ignore[union-attr]
        data = torch.cat(parts, 2)
    return Packed(kind, sparse, shape, data.contiguous().flatten(), None)


def _unpack(packed: Packed) -> tuple[Tensor, Tensor]:
    """The inverse of `_pack`."""
    rows, columns = packed.padded
    data = packed.data
    if packed.kind == "int8":
        assert packed.scale is not None
        if packed.sparse:
            codes = torch.empty(rows, columns, dtype=torch.uint8, device=data.device)
            codes[_sparse_order(rows, data.device)] = data.view(columns, rows).T
        else:
            codes = data.view(rows // 16, columns // 4, 16, 4).transpose(1, 2).reshape(rows, columns)
        return codes, packed.scale
    if packed.sparse:
        groups = data.view(columns // GROUP, -1)
        scales = groups[:, : 2 * rows].contiguous().view(torch.float16).T
        nibbles = groups[:, 2 * rows :].reshape(columns, rows // 128, 64)
        codes = torch.empty(rows, columns, dtype=torch.uint8, device=data.device)
        codes[_sparse_order(rows, data.device)] = torch.stack([nibbles & 15, nibbles >> 4], 2).view(columns, rows).T
        return codes, scales.float()
    tiles = data.view(rows // 16, columns // 64, -1)
    scales = tiles[:, :, :64].contiguous().view(torch.float16).view(rows // 16, columns // 64, 2, 16)
    nibbles = tiles[:, :, 64:576].reshape(rows // 16, columns // 64, 8, 16, 4)
    codes = torch.stack([nibbles & 15, nibbles >> 4], 3).permute(0, 4, 1, 2, 3, 5).reshape(rows, columns)
    if packed.kind == "int6":
        upper = tiles[:, :, 576:].reshape(rows // 16, columns // 64, 4, 16, 4)
        bits = torch.stack([upper >> 2 * t & 3 for t in range(4)], 3).permute(0, 4, 1, 2, 3, 5)
        codes = codes | bits.reshape(rows, columns) << 4
    return codes, scales.permute(0, 3, 1, 2).reshape(rows, columns // GROUP).float()
