"""Taylor attention on GPUs in Triton (kernels/taylor.py, kernels/taylor_states.py), differentiated by hand.

Segments of `SEGMENT` tokens are worked on side by side; only what adds up their states goes through them in order.
Inputs of any floating type but float64 are read as they are; matrix products take operands of the type that
`gpu.operands` names for the widest of q, k and v, while sums, states and denominators are float32. For the backward
pass the states before all segments are kept, y, and the inverse denominators; all else is computed again.

Shape letters: B batch, T time, H heads, F size of a query or key, E features, N values; padded P, EP and NP.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from wkv.ops import gpu

# By operands: tokens of a block, values that a program sums, and values that one product of `gradients` takes. 64 rows
# are the least product that a group of four warps shares on an H100 or H200; the others fit into registers.
BLOCKS = {"bf16": (64, 128, 128), "tf32": (64, 64, 64), "tf32x3": (32, 64, 32)}
# Tokens of a segment. A state is as large as the inputs of 130 tokens (F = 16, N = 64, bfloat16), and a longer segment
# means more pairs of tokens.
SEGMENT = 256
FEATURES = 32  # of a tile
FEW = 16  # up to so many tokens the recurrence is run as it stands, if nothing is to be differentiated
RUNNING = 512  # numbers of a state that one program adds up
REGISTERS = 8192  # numbers of a state that one program of the recurrence keeps
MOST = 32, 256  # F and N

FeatureState = tuple[Tensor, Tensor]


def run(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    state: FeatureState | None,
    scale: float,
    eps: float,
    mask: Tensor | None,
    reset: Tensor | None,
) -> tuple[Tensor, FeatureState]:
    """The Triton form of `wkv.ops.taylor_attention`; see there for the arguments. A masked token's y is 0."""
    kv, z = state or (None, None)
    keep = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in (q, k, v, kv, z))
    y, kv, z, *_ = forward_op(q, k, v, kv, z, scale, eps, mask, reset, keep)
    return y, (kv, z)


def unfit(arguments: Sequence[Tensor | None]) -> str | None:
    """Why the kernels cannot take q, k, v (and kv, z); None where they can."""
    q, _, v = arguments[:3]
    assert q is not None
    assert v is not None
    for name, found, most in zip(("queries", "values"), (q.shape[3], v.shape[3]), MOST, strict=True):
        if found > most:
            return f"takes {name} of up to {most} numbers, found {found}"
    return gpu.unfit(arguments)


@torch.library.custom_op("wkv::taylor_triton", mutates_args=())
def forward_op(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    kv: Tensor | None,
    z: Tensor | None,
    scale: float,
    eps: float,
    mask: Tensor | None,
    reset: Tensor | None,
    keep: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """y [B, T, H, N], the final kv and z, the kv and z before all segments, and 1 / (den + eps).

    Those before the segments are [n, B H, N, EP] in the operands' type and [n, B H, EP]. Without `keep` the last three
    are empty.
    """
    outputs = _forward_fake(q, k, v, kv, z, scale, eps, mask, reset, keep)
    y, final_kv, final_z, *kept = outputs
    q, k, v = (x.contiguous() for x in (q, k, v))
    kv, z = (None if x is None else x.contiguous() for x in (kv, z))
    if not keep:
        if q.shape[1] <= FEW:
            _steps(q, k, v, kv, z, scale, eps, mask, reset, y, final_kv, final_z)
            return outputs
        kept = list(_forward_fake(q, k, v, kv, z, scale, eps, mask, reset, True)[3:])
    call, (states, units, inverse) = _Call(q, k, v, scale, mask, reset), kept
    call.states(k, v, None, (kv, z), (states, units), (final_kv, final_z), back=False)
    call.mix(q, k, v, (states, units), y, inverse, eps, later=False)
    return outputs


@forward_op.register_fake
def _forward_fake(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    kv: Tensor | None,
    z: Tensor | None,
    scale: float,
    eps: float,
    mask: Tensor | None,
    reset: Tensor | None,
    keep: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    batch, time, heads, size = v.shape
    final_kv, final_z = _new_state(q, v)
    segments, padded = (time + SEGMENT - 1) // SEGMENT if keep else 0, _padded_features(q.shape[3])[1]
    dtype = torch.bfloat16 if _operands(q, k, v) == "bf16" else torch.float32
    states = final_kv.new_empty(segments, batch * heads, size, padded, dtype=dtype)
    units = final_kv.new_empty(segments, batch * heads, padded)
    inverse = final_kv.new_empty(batch if keep else 0, time, heads)
    return v.new_empty(v.shape), final_kv, final_z, states, units, inverse


@torch.library.custom_op("wkv::taylor_triton_backward", mutates_args=())
def backward_op(
    dy: Tensor | None,
    d_kv: Tensor | None,
    d_z: Tensor | None,
    y: Tensor,
    states: Tensor,
    units: Tensor,
    inverse: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float,
    mask: Tensor | None,
    reset: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q, k, v in their types, and of the initial kv and z in float32.

    `y`, `states`, `units` and `inverse` are what `forward_op` returned.
    """
    outputs = _backward_fake(dy, d_kv, d_z, y, states, units, inverse, q, k, v, scale, mask, reset)
    dq, dk, dv, d_kv_0, d_z_0 = outputs
    q, k, v, y = (x.contiguous() for x in (q, k, v, y))
    d_kv, d_z = (None if x is None else x.contiguous() for x in (d_kv, d_z))
    dy = torch.zeros_like(v) if dy is None else dy.contiguous()
    call = _Call(q, k, v, scale, mask, reset)
    d, unit = torch.empty_like(v, dtype=states.dtype), torch.empty_like(inverse)
    ends = torch.empty_like(states), torch.empty_like(units)
    call.divide(dy, y, inverse, d, unit)
    call.states(q, d, unit, (d_kv, d_z), ends, (d_kv_0, d_z_0), back=True)
    call.mix(k, q, d, ends, dv, None, 0.0, later=True)
    call.gradients(q, k, (d, unit), (v, None), (states, units), dq, later=False)
    call.gradients(k, q, (v, None), (d, unit), ends, dk, later=True)
    return outputs


@backward_op.register_fake
def _backward_fake(
    dy: Tensor | None,
    d_kv: Tensor | None,
    d_z: Tensor | None,
    y: Tensor,
    states: Tensor,
    units: Tensor,
    inverse: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float,
    mask: Tensor | None,
    reset: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    dq, dk, dv = (x.new_empty(x.shape) for x in (q, k, v))
    return dq, dk, dv, *_new_state(q, v)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    q, k, v, kv, z, ctx.scale, _, mask, reset, _ = inputs
    y, _, _, states, units, inverse = output
    ctx.save_for_backward(y, states, units, inverse, q, k, v, mask, reset)
    ctx.state_types = [None if x is None else x.dtype for x in (kv, z)]
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, dy: Tensor | None, d_kv: Tensor | None, d_z: Tensor | None, *_: None) -> tuple[Any, ...]:
    *saved, mask, reset = ctx.saved_tensors
    dq, dk, dv, *d_state = backward_op(dy, d_kv, d_z, *saved, ctx.scale, mask, reset)
    d_state = [None if dtype is None else x.to(dtype) for x, dtype in zip(d_state, ctx.state_types, strict=True)]
    return dq, dk, dv, *d_state, None, None, None, None, None


forward_op.register_autograd(_backward, setup_context=_setup_context)


class _Call:
    """The kernels with all that their launches share; their arguments as in kernels/taylor*.py."""

    def __init__(
        self, q: Tensor, k: Tensor, v: Tensor, scale: float, mask: Tensor | None, reset: Tensor | None
    ) -> None:
        batch, self.time, self.heads, self.values = v.shape
        self.scale, self.cells = scale, batch * self.heads
        self.mask, _ = gpu.flags(mask, None)
        self.parts = None if reset is None else reset.cumsum(1, dtype=torch.int32)
        tile, self.features = _padded_features(q.shape[3])
        padded, operands = _padded(self.values), _operands(q, k, v)
        block, sums, products = BLOCKS[operands]
        self.segments, self.blocks = -(-self.time // SEGMENT), -(-self.time // block)
        self.summed, self.multiplied = {"NB": min(sums, padded)}, {"NB": min(products, padded)}
        # ptxas takes 236 registers of 255 without need; with these three programs run beside each other, not two.
        few = operands == "bf16" and padded <= 64 and torch.version.hip is None
        self.multiplied |= {"maxnreg": 168} if few else {}
        self.parts_of_values = padded // self.summed["NB"]
        self.constants: dict[str, Any] = {
            "F": q.shape[3],
            "P": _padded(q.shape[3]),
            "N": self.values,
            "NP": padded,
            "EP": self.features,
            "EB": tile,
            "L": block,
            "SEG": SEGMENT,
            "OPERANDS": operands,
            "num_warps": 4,
        }

    def states(
        self,
        x: Tensor,
        values: Tensor,
        unit: Tensor | None,
        start: tuple[Tensor | None, Tensor | None],
        states: FeatureState,
        final: FeatureState,
        back: bool,
    ) -> None:
        """The states before all segments, and the final one; or with `back` the gradients of those behind them."""
        from wkv.ops.gpu.kernels import taylor_states as kernels

        rows = self.values + 1
        sums = x.new_empty(self.segments, self.cells, rows, self.features, dtype=torch.float32)
        programs = self.cells * self.segments * (self.features // self.constants["EB"]) * self.parts_of_values
        numbers = self.time, self.heads, self.segments, self.cells
        tensors = x, values, unit, self.mask, self.parts, sums
        constants = {**self.constants, **self.summed}
        gpu.launch(kernels.segment_sums, (programs,), *tensors, self.scale, *numbers, **constants, END=not back)
        programs = self.cells * -(-rows * self.features // RUNNING)
        sizes = {"N": self.values, "E": final[1].shape[2], "EP": self.features, "SEG": SEGMENT}
        given = sums, *start, self.parts, *states, *final
        gpu.launch(kernels.running, (programs,), *given, *numbers, **sizes, BACK=back, BLOCK=RUNNING)

    def mix(
        self,
        x: Tensor,
        others: Tensor,
        values: Tensor,
        states: FeatureState,
        out: Tensor,
        inverse: Tensor | None,
        eps: float,
        later: bool,
    ) -> None:
        """Values mixed by the weights of pairs of tokens, and what the states add."""
        from wkv.ops.gpu.kernels import taylor as kernels

        tensors = x, others, values, self.mask, self.parts, *states, out, inverse
        numbers = self.scale, eps, self.time, self.heads, self.cells
        grid, constants = (self.cells * self.blocks * self.parts_of_values,), {**self.constants, **self.summed}
        gpu.launch(kernels.mix, grid, *tensors, *numbers, **constants, LATER=later)

    def gradients(
        self,
        x: Tensor,
        others: Tensor,
        values: tuple[Tensor, Tensor | None],
        other_values: tuple[Tensor, Tensor | None],
        states: FeatureState,
        out: Tensor,
        later: bool,
    ) -> None:
        """The gradient of q or of k."""
        from wkv.ops.gpu.kernels import taylor as kernels

        tensors = x, others, *values, *other_values, self.mask, self.parts, *states, out
        numbers = self.scale, self.time, self.heads, self.cells
        grid, constants = (self.cells * self.blocks,), {**self.constants, **self.multiplied}
        gpu.launch(kernels.gradients, grid, *tensors, *numbers, **constants, LATER=later)

    def divide(self, dy: Tensor, y: Tensor, inverse: Tensor, d: Tensor, unit: Tensor) -> None:
        """The gradients of numerators and denominators."""
        from wkv.ops.gpu.kernels import taylor_states as kernels

        count, rows = unit.numel(), 16
        sizes = {"N": self.values, "NP": self.constants["NP"], "ROWS": rows}
        tensors = dy, y, inverse, self.mask, d, unit
        gpu.launch(kernels.divide, (-(-count // rows),), *tensors, count, self.heads, **sizes)


def _steps(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    kv: Tensor | None,
    z: Tensor | None,
    scale: float,
    eps: float,
    mask: Tensor | None,
    reset: Tensor | None,
    y: Tensor,
    final_kv: Tensor,
    final_z: Tensor,
) -> None:
    from wkv.ops.gpu.kernels import taylor_states as kernels

    batch, time, heads, size = v.shape
    features = final_z.shape[2]
    padded = _padded(features)
    rows = min(REGISTERS // padded, _padded(size))
    sizes = {"F": q.shape[3], "N": size, "NB": rows, "E": features, "EP": padded}
    tensors = q, k, v, kv, z, *gpu.flags(mask, reset), y, final_kv, final_z
    gpu.launch(kernels.steps, (batch * heads * -(-size // rows),), *tensors, scale, eps, time, heads, **sizes)


def _new_state(q: Tensor, v: Tensor) -> FeatureState:
    """kv [B, H, N, E] and z [B, H, E]"""
    batch, _, heads, size = v.shape
    features = _feature_count(q.shape[3])
    kv = v.new_empty(batch, heads, size, features, dtype=torch.float32)
    return kv, kv.new_empty(batch, heads, features)


def _feature_count(size: int) -> int:
    return 1 + size + size * (size + 1) // 2


def _padded_features(size: int) -> tuple[int, int]:
    """Features of a tile, and of all tiles."""
    count = _feature_count(size)
    tile = min(FEATURES, _padded(count))
    return tile, (count + tile - 1) // tile * tile


def _padded(size: int) -> int:
    """The next power of two, from 16 on: what a matrix product takes."""
    return max(16, 1 << (size - 1).bit_length())


def _operands(*tensors: Tensor) -> str:
    """Those of the widest type: a product of float32 and bfloat16 keeps the digits of float32."""
    types = {x.dtype for x in tensors}
    if len(types) == 1:
        return gpu.operands(types.pop())
    return gpu.operands(torch.float32 if torch.float32 in types else torch.float16)
