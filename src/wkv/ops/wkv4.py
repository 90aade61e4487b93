"""WKV-4, the channelwise weighted average of values of RWKV-4 (arXiv 2305.13048, section 3).

Per channel, with num and den the state:

    y_t   = (num_{t-1} + exp(u + k_t) v_t) / (den_{t-1} + exp(u + k_t))
    num_t = exp(log_w) num_{t-1} + exp(k_t) v_t
    den_t = exp(log_w) den_{t-1} + exp(k_t)

Keys are large, so the state is kept as (num, den, max): the numerator is num * exp(max), the denominator
den * exp(max), and no exponential ever has a positive argument. `max` only normalises: gradients hold the
returned `max` constant, which leaves those of y and of num * exp(max), den * exp(max) exact.
"""

from __future__ import annotations

import torch
from torch import Tensor

from wkv import native
from wkv.errors import WkvError
from wkv.ops import common, dispatch, gpu, native_wkv4, wkv4_chunked
from wkv.ops.gpu import wkv4 as triton_wkv4
from wkv.ops.wkv4_chunked import EMPTY

State4 = tuple[Tensor, Tensor, Tensor]


def wkv4(
    log_w: Tensor,
    u: Tensor,
    k: Tensor,
    v: Tensor,
    state: State4 | None = None,
    *,
    mask: Tensor | None = None,
    reset: Tensor | None = None,
) -> tuple[Tensor, State4]:
    """Run WKV-4 over a whole sequence.

    Args:
        log_w: log-decay <= 0, [C].
        u: bonus of the current token, [C].
        k, v: key and value, [B, T, C], any floating type.
        state: (num, den, max), each [B, C]; None means (0, 0, -1e30).
        mask: bool [B, T]; a False token does not exist (its y is unspecified).
        reset: bool [B, T]; the state is zeroed before a True token.

    Returns:
        y [B, T, C] in the type of v, and the final (num, den, max), each [B, C] in float32
        (float64 if any argument is float64). Arithmetic runs in the state's type.

    Raises:
        WkvError: if shapes, types or devices do not fit together, or T is 0.
    """
    common.check_same_shape("wkv4", k=k, v=v)
    if k.ndim != 3 or k.shape[1] == 0:
        raise WkvError(f"wkv4: k must be [B, T, C] with at least one token, found {tuple(k.shape)}")
    batch, _, channels = k.shape
    for name, tensor in (("log_w", log_w), ("u", u)):
        common.check_shape("wkv4", name, tensor, (channels,))
        common.check_floating("wkv4", name, tensor, k.device)
    if state is not None:
        _check_state(state, batch, channels, k.device)
    common.check_flags("wkv4", "mask", mask, k)
    common.check_flags("wkv4", "reset", reset, k)
    run = dispatch.select("wkv4", k, v, log_w, u, *(state or ()))
    return run(log_w, u, k, v, state, mask, common.effective_reset(mask, reset))


def _check_state(state: State4, batch: int, channels: int, device: torch.device) -> None:
    if not isinstance(state, (tuple, list)) or len(state) != 3:
        raise WkvError(f"wkv4: state must be the three tensors (num, den, max), found {type(state).__name__}")
    for name, tensor in zip(("num", "den", "max"), state, strict=True):
        common.check_shape("wkv4", f"state {name}", tensor, (batch, channels))
        common.check_floating("wkv4", f"state {name}", tensor, device)


def reference(
    log_w: Tensor,
    u: Tensor,
    k: Tensor,
    v: Tensor,
    state: State4 | None,
    mask: Tensor | None,
    reset: Tensor | None,
) -> tuple[Tensor, State4]:
    """The equation, token by token, differentiated by autograd."""
    dtype = common.compute_dtype(log_w, u, k, v, *(state or ()))
    y_dtype = v.dtype
    log_w, u, k, v = (x.to(dtype) for x in (log_w, u, k, v))
    if mask is not None:
        k, v = k.masked_fill(~mask[:, :, None], 0), v.masked_fill(~mask[:, :, None], 0)
    batch, length, channels = k.shape
    empty = (k.new_zeros(batch, channels), k.new_zeros(batch, channels), k.new_full((batch, channels), EMPTY))
    num, den, top = empty
    if state is not None:
        num, den, top = (x.to(dtype) for x in state)
        scale = (top - top.detach()).exp()  # is 1, and carries the gradient of the initial max
        num, den, top = num * scale, den * scale, top.detach()
    outputs = []
    for t in range(length):
        if reset is not None:
            num, den, top = _where(reset[:, t, None], empty, (num, den, top))
        y_num, y_den, _ = _add(num, den, top, 0.0, k[:, t], u, v[:, t])
        outputs.append(y_num / y_den)
        new = _add(num, den, top, log_w, k[:, t], 0.0, v[:, t])
        num, den, top = new if mask is None else _where(mask[:, t, None], new, (num, den, top))
    y = torch.stack(outputs, 1)
    y = y if mask is None else y.masked_fill(~mask[:, :, None], 0)
    return y.to(y_dtype), (num, den, top)


def _add(
    num: Tensor, den: Tensor, top: Tensor, gap: Tensor | float, key: Tensor, bonus: Tensor | float, value: Tensor
) -> State4:
    """(num, den) * exp(top + gap) + exp(key + bonus) * (value, 1), normalised by the new maximum.

    Exponents take the difference of large numbers first: top + gap alone would be rounded at every token.
    """
    new_top = torch.maximum(top + gap, key + bonus).detach()
    old, new = (top - new_top + gap).exp(), (key - new_top + bonus).exp()
    return old * num + new * value, old * den + new, new_top


def _where(condition: Tensor, yes: State4, no: State4) -> State4:
    return (
        torch.where(condition, yes[0], no[0]),
        torch.where(condition, yes[1], no[1]),
        torch.where(condition, yes[2], no[2]),
    )


dispatch.register("wkv4", dispatch.Backend("reference", reference))
dispatch.register("wkv4", dispatch.Backend("chunked", wkv4_chunked.chunked))
dispatch.register("wkv4", dispatch.Backend("native", native_wkv4.run, native.unusable))
dispatch.register("wkv4", dispatch.Backend("triton", triton_wkv4.run, gpu.unusable, gpu.unfit))
