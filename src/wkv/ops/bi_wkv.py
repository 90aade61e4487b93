"""Bi-WKV, the bidirectional channelwise average of values of Vision-RWKV (arXiv 2403.02308, section 3).

Per channel, over all tokens i of a sequence:

    y_t = (sum_{i != t} exp(log_w (|t - i| - 1) + k_i) v_i + exp(u + k_t) v_t) / (the same sums of the weights alone)

Two scans give it in linear time: the sums over i < t from left to right, those over i > t from right to left, each
kept as (num, den, max) as in WKV-4. log_w may have either sign; a positive one lets far tokens weigh more.

The CUDA kernel that the released checkpoints were trained with computes something else (form "official"). It cuts the
T tokens into chunks of S = ceil(T / 32); with s the start of the chunk of t and g = log_w, token i has exp(k_i) times

    i < s: exp(g (t - i))      i = s < t: exp(g (t - i - 1))      i > t: exp(g (i - t))
    s < i < t: exp(g (t - i - 1)) + (1 - exp(-g)) exp(-g (t - i))
    i = t: exp(u), plus 1 - exp(-g) if t > s

and the denominator gains 1e-6 exp(max), max being the kernel's running maximum. For large negative log_w T (beyond
about -20) some of these weights are negative and y may leave the range of v: so it was trained, and so we compute it.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
from torch import Tensor

from wkv import native
from wkv.errors import WkvError
from wkv.ops import common, dispatch, gpu, native_bi_wkv
from wkv.ops.gpu import bi_wkv as triton_bi_wkv
from wkv.ops.wkv4_chunked import EMPTY

FORMS = {"paper": "bi_wkv", "official": "bi_wkv_official"}
CHUNKS = 32  # into how many the released kernel cuts a sequence


class Sums(NamedTuple):
    """(num, den) exp(max) before every token: x [2, T, B, C], top [T, B, C]."""

    x: Tensor
    top: Tensor


def bi_wkv(
    log_w: Tensor,
    u: Tensor,
    k: Tensor,
    v: Tensor,
    form: str = "paper",
    *,
    mask: Tensor | None = None,
) -> Tensor:
    """Run Bi-WKV over whole sequences.

    Args:
        log_w: log-decay per token of distance, [C], of either sign (Vision-RWKV: -spatial_decay / T).
        u: bonus of the token itself, [C] (Vision-RWKV: spatial_first / T).
        k, v: key and value, [B, T, C], any floating type.
        form: "paper", the equation; or "official", what the released CUDA kernel computes, with the true gradients
            of that form (the kernel's own gradients of k and v are not).
        mask: bool [B, T]; a False token does not exist: distances count real tokens only, its y is unspecified.
            For form "paper" only.

    Returns:
        y [B, T, C] in the type of v. Arithmetic runs in float32 (float64 if any argument is float64).

    Raises:
        WkvError: if shapes, types or devices do not fit together, T is 0, or the form is unknown.
    """
    if form not in FORMS:
        raise WkvError(f"bi_wkv: form {form!r} is unknown; one of {', '.join(FORMS)}")
    common.check_same_shape("bi_wkv", k=k, v=v)
    if k.ndim != 3 or k.shape[1] == 0:
        raise WkvError(f"bi_wkv: k must be [B, T, C] with at least one token, found {tuple(k.shape)}")
    for name, tensor in (("log_w", log_w), ("u", u)):
        common.check_shape("bi_wkv", name, tensor, (k.shape[2],))
        common.check_floating("bi_wkv", name, tensor, k.device)
    common.check_flags("bi_wkv", "mask", mask, k)
    if mask is not None and form == "official":
        raise WkvError('bi_wkv: mask works with form "paper" only: the official chunks depend on the number of tokens')
    y: Tensor = dispatch.select(FORMS[form], k, v, log_w, u)(log_w, u, k, v, mask)
    return y


def reference(log_w: Tensor, u: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    """The two scans, token by token, differentiated by autograd. A masked token's y is 0."""
    k_TBC, x_2TBC, log_w, u, exists = _prepare(log_w, u, k, v, mask)
    left = _scan(k_TBC, x_2TBC, log_w, exists)
    right = _scan(k_TBC, x_2TBC, log_w, exists, reverse=True)
    top_TBC = _maximum(left.top, right.top, k_TBC + u).detach()
    others = left.x * (left.top - top_TBC).exp() + right.x * (right.top - top_TBC).exp()
    num, den = (others + x_2TBC * (k_TBC - top_TBC + u).exp()).unbind()
    y = num / den
    y = y if exists is None else y.masked_fill(~exists, 0)
    return y.transpose(0, 1).to(v.dtype)


def official(log_w: Tensor, u: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    """Form "official" in linear time: the scans of `reference` and two more that start anew in every chunk."""
    k_TBC, x_2TBC, log_w, u, exists = _prepare(log_w, u, k, v, mask)
    length = k_TBC.shape[0]
    size = -(-length // CHUNKS)
    since = torch.arange(length, device=k.device) % size  # tokens since the chunk of t began
    start = torch.arange(length, device=k.device) - since
    since = since[:, None, None].to(k_TBC.dtype)
    left = _scan(k_TBC, x_2TBC, log_w, exists)
    right = _scan(k_TBC, x_2TBC, log_w, exists, reverse=True)
    near = _scan(k_TBC, x_2TBC, log_w, exists, restart=size)
    growing = _scan(k_TBC.masked_fill(since == 0, EMPTY), x_2TBC, -log_w, exists, restart=size, inclusive=True)
    # Sums, their exponents, and what the exponents gain on the way to token t.
    terms = (
        (left.x[:, start], left.top[start], log_w * (since + 1)),
        (near.x, near.top, torch.zeros_like(log_w)),
        (growing.x * -torch.expm1(-log_w), growing.top, torch.zeros_like(log_w)),
        (right.x, right.top, log_w),
        (x_2TBC, k_TBC, u),
    )
    # The kernel's running maximum: to the left it follows the keys, to the right it only grows from the chunk's start.
    exponents = [(top + gain).detach() for _, top, gain in terms]
    running = (exponents[0], exponents[1], (right.top[start] + log_w * (1 - since)).detach(), exponents[4])
    highest = _maximum(*running)
    top_TBC = _maximum(*exponents, highest)
    num, den = sum((x * (top - top_TBC + gain).exp() for x, top, gain in terms), torch.zeros_like(x_2TBC)).unbind()
    y: Tensor = num / (den + 1e-6 * (highest - top_TBC).exp())
    return y.transpose(0, 1).to(v.dtype)


def _prepare(
    log_w: Tensor, u: Tensor, k: Tensor, v: Tensor, mask: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None]:
    """k [T, B, C], (v, 1) [2, T, B, C], log_w and u in the compute type, and the mask as [T, B, 1]."""
    dtype = common.compute_dtype(log_w, u, k, v)
    k, v = k.to(dtype).transpose(0, 1), v.to(dtype).transpose(0, 1)
    exists = None if mask is None else mask.t()[:, :, None]
    if exists is not None:
        k, v = k.masked_fill(~exists, 0), v.masked_fill(~exists, 0)
    return k, torch.stack((v, torch.ones_like(v))), log_w.to(dtype), u.to(dtype), exists


def _scan(
    k_TBC: Tensor,
    x_2TBC: Tensor,
    gap: Tensor,
    exists: Tensor | None,
    *,
    reverse: bool = False,
    restart: int = 0,
    inclusive: bool = False,
) -> Sums:
    """Sums over the tokens before each one (with `inclusive` up to it), decayed by `gap` per token.

    `restart` empties them before every token whose number it divides. The maximum only normalises: it is a constant
    to autograd, and exponents take the difference of maxima before they add the decay (see wkv4_chunked).
    """
    empty = x_2TBC.new_zeros(x_2TBC[:, 0].shape), k_TBC.new_full(k_TBC[0].shape, EMPTY)
    x, top = empty
    states = []
    tokens = list(enumerate(zip(k_TBC.unbind(0), x_2TBC.unbind(1), strict=True)))
    for t, (key, own) in reversed(tokens) if reverse else tokens:
        if restart and t % restart == 0:
            x, top = empty
        new_top = torch.maximum(top + gap, key).detach()
        new_x = x * (top - new_top + gap).exp() + own * (key - new_top).exp()
        if exists is not None:
            new_x, new_top = torch.where(exists[t], new_x, x), torch.where(exists[t], new_top, top)
        states.append((new_x, new_top) if inclusive else (x, top))
        x, top = new_x, new_top
    if reverse:
        states.reverse()
    xs, tops = zip(*states, strict=True)
    return Sums(torch.stack(xs, 1), torch.stack(tops))


def _maximum(*tensors: Tensor) -> Tensor:
    return functools.reduce(torch.maximum, tensors)


dispatch.register("bi_wkv", dispatch.Backend("reference", reference))
dispatch.register("bi_wkv", dispatch.Backend("native", native_bi_wkv.run, native.unusable))
dispatch.register("bi_wkv", dispatch.Backend("triton", triton_bi_wkv.run, gpu.unusable, gpu.unfit))
dispatch.register("bi_wkv_official", dispatch.Backend("reference", official))
