"""Taylor linear attention of BASED (arXiv 2402.18668): softmax's exponential to second order.

Per head, with s_tj = scale q_t . k_j:

    y_t = sum_{j <= t} (1 + s_tj + s_tj^2 / 2) v_j / (sum_{j <= t} (1 + s_tj + s_tj^2 / 2) + eps)

The weight is at least 1/2, and it is the product phi(q_t) . phi(k_j) of finitely many features, with c = scale:

    phi(x) = [1, sqrt(c) x_i, c x_i x_i / sqrt(2), c x_i x_j for i < j]

so this is `linear_attention` of phi(q) and phi(k), with a state of fixed size. Each product of two entries is kept
once: E = 1 + F + F (F + 1) / 2 features, in the order of the rows of an upper triangle. The official BASED code keeps
all F^2 products, each divided by sqrt(2): same weights, another state. `to_official` and `from_official` translate.

Shape letters: B batch, T time, H heads, F size of a query or key, E features, N value size.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from wkv.errors import WkvError
from wkv.ops import common, dispatch, gpu, native_taylor, taylor_chunked
from wkv.ops.gpu import taylor as gpu_taylor
from wkv.ops.linear_attention import FeatureState, check_arguments, check_state
from wkv.ops.linear_attention import reference as linear_reference


def taylor_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    state: FeatureState | None = None,
    *,
    scale: float | None = None,
    eps: float = 1e-12,
    mask: Tensor | None = None,
    reset: Tensor | None = None,
) -> tuple[Tensor, FeatureState]:
    """Run Taylor linear attention over a whole sequence.

    Args:
        q, k: queries and keys before the feature map, [B, T, H, F], any floating type.
        v: values, [B, T, H, N].
        state: (kv [B, H, N, E], z [B, H, E]) with E = 1 + F + F (F + 1) / 2; None means zeros.
        scale: of the product of a query and a key, > 0; None means F ** -0.5.
        eps: added to the denominator, >= 0.
        mask: bool [B, T]; a False token does not exist (its y is unspecified, its inputs get zero gradients).
        reset: bool [B, T]; the state is emptied before a True token.

    Returns:
        y [B, T, H, N] in the type of v, and the final (kv, z) in float32 (float64 if any argument is float64).
        Arithmetic runs in the state's type; GPU kernels round the operands of matrix products to the precision of v
        (docs/numerics.md).

    Raises:
        WkvError: if shapes, types or devices do not fit together, or T is 0.
    """
    check_arguments("taylor_attention", q, k, v, eps, mask, reset)
    check_state("taylor_attention", state, v, feature_count(q.shape[3]))
    scale = _scale_of("taylor_attention", scale, q.shape[3])
    run = dispatch.select("taylor_attention", q, k, v, *(state or ()))
    found: tuple[Tensor, FeatureState] = run(q, k, v, state, scale, eps, mask, common.effective_reset(mask, reset))
    return found


def feature_count(size: int) -> int:
    """How many features a query or key of `size` entries has: 1 + F + F (F + 1) / 2."""
    return 1 + size + size * (size + 1) // 2


def taylor_features(x: Tensor, scale: float | None = None) -> Tensor:
    """phi(x): [..., F] to [..., 1 + F + F (F + 1) / 2], in the type of x; scale None means F ** -0.5.

    Raises:
        WkvError: if `scale` is not positive.
    """
    x = x * math.sqrt(_scale_of("taylor_features", scale, x.shape[-1]))
    rows, columns, weight = _pairs(x, x.shape[-1], math.sqrt(0.5), 1)
    return torch.cat((torch.ones_like(x[..., :1]), x, x[..., rows] * x[..., columns] * weight), -1)


def to_official(state: FeatureState) -> FeatureState:
    """Our (kv, z) as BASED caches it: kv_state [B, H, 1, N, 1 + F + F^2] and k_state [B, H, 1, 1, 1 + F + F^2].

    The layout of sequences of features, [..., E], follows the same rule: see `expand`.
    """
    kv, z = state
    return expand(kv).unsqueeze(2), expand(z)[:, :, None, None]


def from_official(kv_state: Tensor, k_state: Tensor) -> FeatureState:
    """What BASED caches, kv_state [B, H, 1, N, 1 + F + F^2] and k_state [B, H, 1, 1, 1 + F + F^2], as our (kv, z).

    Raises:
        WkvError: if the tensors do not have these shapes.
    """
    if kv_state.ndim != 5 or k_state.ndim != 5 or kv_state.shape[2] != 1 or k_state.shape[2:4] != (1, 1):
        found = f"{tuple(kv_state.shape)} and {tuple(k_state.shape)}"
        raise WkvError(f"an official state is [B, H, 1, N, E] and [B, H, 1, 1, E], found {found}")
    return compact(kv_state.squeeze(2)), compact(k_state[:, :, 0, 0])


def expand(x: Tensor) -> Tensor:
    """From our features to the official ones along the last dimension, 1 + F + F (F + 1) / 2 to 1 + F + F^2.

    Raises:
        WkvError: if no F gives this number of features.
    """
    count = x.shape[-1]
    size = (math.isqrt(8 * count + 1) - 3) // 2
    if size < 1 or feature_count(size) != count:
        raise WkvError(f"{count} features are not 1 + F + F (F + 1) / 2 for any F")
    rows, columns, weight = _pairs(x, size, 1, math.sqrt(0.5))
    pairs = x[..., 1 + size :] * weight
    square = x.new_zeros(*x.shape[:-1], size, size)
    square[..., rows, columns] = pairs
    square[..., columns, rows] = pairs
    return torch.cat((x[..., : 1 + size], square.flatten(-2)), -1)


def compact(x: Tensor) -> Tensor:
    """From the official features to ours along the last dimension: the inverse of `expand`.

    Raises:
        WkvError: if no F gives this number of features.
    """
    count = x.shape[-1]
    size = (math.isqrt(4 * count - 3) - 1) // 2
    if size < 1 or 1 + size + size * size != count:
        raise WkvError(f"{count} features are not 1 + F + F^2 for any F")
    square = x[..., 1 + size :].unflatten(-1, (size, size))
    rows, columns, weight = _pairs(x, size, 0.5, math.sqrt(0.5))
    pairs = (square + square.mT)[..., rows, columns] * weight
    return torch.cat((x[..., : 1 + size], pairs), -1)


def _pairs(like: Tensor, size: int, diagonal: float, other: float) -> tuple[Tensor, Tensor, Tensor]:
    """Rows and columns of the products x_i x_j that are kept, and a weight for each, in the type of `like`."""
    rows, columns = torch.triu_indices(size, size, device=like.device)
    return rows, columns, like.new_full(rows.shape, other).masked_fill(rows == columns, diagonal)


def reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    state: FeatureState | None,
    scale: float,
    eps: float,
    mask: Tensor | None,
    reset: Tensor | None,
) -> tuple[Tensor, FeatureState]:
    """The equation: features, then linear attention token by token. A masked token's y is 0."""
    dtype = common.compute_dtype(q, k, v, *(state or ()))
    q, k = (x.to(dtype) for x in (q, k))
    if mask is not None:  # before the map: what a missing token holds may not reach a gradient
        q, k = (x.masked_fill(~mask[:, :, None, None], 0) for x in (q, k))
    return linear_reference(taylor_features(q, scale), taylor_features(k, scale), v, state, eps, mask, reset)


def _scale_of(operator: str, scale: float | None, size: int) -> float:
    if scale is None:
        return size**-0.5
    if not (scale > 0 and math.isfinite(scale)):
        raise WkvError(f"{operator}: scale must be positive, found {scale}")
    return float(scale)


dispatch.register("taylor_attention", dispatch.Backend("reference", reference))
dispatch.register("taylor_attention", dispatch.Backend("chunked", taylor_chunked.taylor))
dispatch.register("taylor_attention", dispatch.Backend("native", native_taylor.taylor, native_taylor.unusable))
dispatch.register("taylor_attention", dispatch.Backend("triton", gpu_taylor.run, gpu.unusable, gpu_taylor.unfit))
