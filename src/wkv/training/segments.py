"""Training on sequences of any length: segment after segment, with the state carried from one to the next.

The loss is always that of the whole sequences. What differs is how far gradients reach, and what is kept for them:

- truncated: the backward pass of a segment follows its forward pass, and the state is detached in between;
- exact: the states between segments are computed first, without a graph. Then the segments are run again, the last one
  first, and each hands the gradient of its initial state to the one before it.

Shape letters: B batch, T time.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from wkv.errors import WkvError
from wkv.layers.language_model import LanguageModel
from wkv.state import State
from wkv.training.head_loss import head_loss
from wkv.training.randomness import random_state, set_random_state
from wkv.training.states import free, leaf_state, put, state_tensors, with_tensors

Values = Tensor | np.ndarray  # [B, T], also a np.memmap
Backward = Callable[[Tensor], object]
MODES = ("truncated", "exact")
COUNTED_AT_ONCE = 1 << 20  # columns of flags


class SegmentResult(NamedTuple):
    """What a backward pass over long sequences returns.

    Attributes:
        loss: nats per target that counts, as `next_token_loss` gives it for the whole sequences; detached.
        state: after the last real token of every row; detached.
        tokens: number of targets that counted.
    """

    loss: Tensor
    state: State
    tokens: int


def segmented_backward(
    model: LanguageModel,
    inputs: Values,
    targets: Values,
    *,
    segment: int,
    mode: str = "truncated",
    through: int = 1,
    state: State | None = None,
    loss_mask: Values | None = None,
    reset: Values | None = None,
    mask: Values | None = None,
    l2wrap: float = 1e-4,
    backward: Backward | None = None,
    normalizer: float | None = None,
    positions: float | None = None,
    reference_weighting: bool = False,
) -> SegmentResult:
    """Add the gradients of the mean loss of long sequences to `.grad`, with the memory of one segment.

    Loss and state are those of `next_token_loss(model(inputs, state, mask, reset).logits, targets, loss_mask, l2wrap)`
    over the tokens that exist, and in mode "exact" so are the gradients. Inputs and targets stay where they are, such
    as in a mapped file, until their segment's turn. Autocast goes around the call. Where a segment is run twice, both
    runs draw the same random numbers.

    Args:
        model: its gradients are added to; call `zero_grad` before.
        inputs: integers [B, T], a tensor or a numpy array, on any device.
        targets: integers [B, T], each in [0, V) where it counts.
        segment: tokens per segment; the last one may be shorter.
        mode: "truncated" (no gradient crosses the border of a group of segments) or "exact".
        through: segments per group in mode "truncated"; memory grows with it.
        state: where to go on from; None is the empty past. Gradients reach its tensors, or what they were made of,
            where these require them.
        loss_mask: bool [B, T]; the targets that count. A token that does not exist never counts.
        reset: bool [B, T]; everything before a True token is forgotten.
        mask: bool [B, T]; a False token does not exist.
        l2wrap: strength of the L2Wrap gradient, see `next_token_loss`.
        backward: called with a loss in place of `loss.backward()`, such as `accelerator.backward`; it may scale.
        normalizer, positions: of a larger batch of which this is a part, see `head_loss`; the parts add up to its loss
            and its gradients.
        reference_weighting: weight the mean losses of segments by their lengths, as RWKV-PEFT's infctx does, whatever
            number of their targets counts. Only for comparisons with it.

    Returns:
        SegmentResult. Where no target counts the loss is 0, and so are the gradients.

    Raises:
        WkvError: if shapes, types or options do not fit, or if nothing can learn.
    """
    _check_options(segment, mode, through)
    sequences = Sequences(inputs, targets, loss_mask, mask, reset, model.ln_out.weight.device)
    state = model.init_state(sequences.batch) if state is None else state
    check_learns(model, state)
    tokens = sequences.count()
    run = Run(model, l2wrap, normalizer or tokens, positions or sequences.count_tokens(), reference_weighting)
    spans, backward = sequences.spans(segment), backward or Tensor.backward
    if mode == "exact":
        loss, state = _exact(run, sequences, spans, state, backward)
    else:
        loss, state = _truncated(run, sequences, spans, state, backward, through)
    return SegmentResult(loss, state, tokens)


def _check_options(segment: int, mode: str, through: int) -> None:
    check_positive(segment=segment, through=through)
    if mode not in MODES:
        raise WkvError(f"mode {mode!r} is unknown; one of {', '.join(MODES)}")
    if mode == "exact" and through != 1:
        raise WkvError(f"through={through} limits gradients and belongs to mode 'truncated', found mode 'exact'")


def context_length_at(step: int, start: int, final: int, steps: int, multiple: int = 16) -> int:
    """Context length of a step while it grows from `start` to `final` tokens, in a straight line over `steps` steps.

    Args:
        step: from 0 on.
        start, final: tokens at step 0 and from step `steps` on; start <= final.
        steps: of the warm-up; 0: there is none.
        multiple: lengths in between are rounded down to multiples of it, but never below `start`.

    Raises:
        WkvError: if a number is out of range.
    """
    check_positive(start=start, final=final, multiple=multiple)
    if start > final or step < 0 or steps < 0:
        found = f"step {step}, start {start}, final {final}, steps {steps}"
        raise WkvError(f"the context grows from start to final over steps >= 0, found {found}")
    if step >= steps:
        return final
    length = start + (final - start) * step // steps
    return max(start, length - length % multiple)


def _truncated(
    run: Run, sequences: Sequences, spans: Sequence[slice], state: State, backward: Backward, through: int
) -> tuple[Tensor, State]:
    """Loss and final state; every group of `through` segments has a graph of its own."""
    total = []
    for i in range(0, len(spans), through):
        losses = []
        for span in spans[i : i + through]:
            loss, state = run(sequences.piece(span), state)
            losses.append(loss)
        loss = torch.stack(losses).sum()
        if loss.requires_grad:  # of a frozen model only the initial state learns, in the first group
            backward(loss)
        total.append(loss.detach())
        state = free(state)
    return torch.stack(total).sum(), state


class _Border(NamedTuple):
    """What a segment starts from."""

    state: State
    random: list[Tensor]


def _exact(
    run: Run, sequences: Sequences, spans: Sequence[slice], state: State, backward: Backward
) -> tuple[Tensor, State]:
    """Loss and final state; every segment but the last is run twice."""
    borders = _borders(run, sequences, spans, state)
    total: list[Tensor] = []
    handed: list[Tensor | None] = []
    for span in reversed(spans):
        border = borders.pop()
        set_random_state(border.random, sequences.device)
        start = leaf_state(border.state) if borders else state
        loss, end = run(sequences.piece(span), start)
        if not total:
            final = _Border(free(end), random_state(sequences.device))
        backward(hand_over(loss, end, handed))
        handed = [x.grad for x in state_tensors(start)] if borders else []
        total.append(loss.detach())
        del end  # its token-shift states are parts of activations
    set_random_state(final.random, sequences.device)
    return torch.stack(total).sum(), final.state


def _borders(run: Run, sequences: Sequences, spans: Sequence[slice], state: State) -> list[_Border]:
    """The start of every segment."""
    borders = [_Border(state.detach(), random_state(sequences.device))]
    shelves: list[Tensor] = []  # one tensor for all borders: many small ones would lie between the activations
    with torch.no_grad():
        for i, span in enumerate(spans[:-1]):
            _, state = run.features(sequences.piece(span), borders[-1].state)
            shelves = shelves or [x.new_empty(len(spans) - 1, *x.shape) for x in state_tensors(state)]
            state = with_tensors(state, map(put, shelves, state_tensors(state), [i] * len(shelves)))
            borders.append(_Border(state, random_state(sequences.device, borders[-1].random)))
    torch.clear_autocast_cache()  # it may hold weights that were converted without a graph
    return borders


class Piece(NamedTuple):
    """Some columns of the sequences, on the model's device."""

    tokens: Tensor
    targets: Tensor
    counts: Tensor | None
    mask: Tensor | None
    reset: Tensor | None


class Sequences:
    """Inputs, targets and flags [B, T] that stay where they are until a piece of them is asked for.

    Args:
        inputs, targets, loss_mask, mask, reset: see `segmented_backward`.
        device: where pieces go.

    Raises:
        WkvError: if shapes or types do not fit.
    """

    def __init__(
        self,
        inputs: Values,
        targets: Values,
        loss_mask: Values | None,
        mask: Values | None,
        reset: Values | None,
        device: torch.device,
    ) -> None:
        if not isinstance(inputs, Values) or inputs.ndim != 2 or 0 in inputs.shape:
            found = list(inputs.shape) if isinstance(inputs, Values) else type(inputs).__name__
            raise WkvError(f"inputs must be non-empty integers [B, T], found {found}")
        for name, values in (("inputs", inputs), ("targets", targets)):
            _check_values(name, values, inputs.shape, "iu")
        for name, flags in (("loss_mask", loss_mask), ("mask", mask), ("reset", reset)):
            if flags is not None:
                _check_values(name, flags, inputs.shape, "b")
        self.batch, self.length = int(inputs.shape[0]), int(inputs.shape[1])
        self.inputs, self.targets, self.reset = inputs, targets, reset
        self.loss_mask, self.mask, self.device = loss_mask, mask, device

    def rows(self, rows: slice) -> Sequences:
        """Some of the sequences."""
        loss_mask, mask, reset = (None if x is None else x[rows] for x in (self.loss_mask, self.mask, self.reset))
        return Sequences(self.inputs[rows], self.targets[rows], loss_mask, mask, reset, self.device)

    def spans(self, length: int) -> list[slice]:
        """Columns 0 to T in pieces of `length`."""
        return [slice(i, min(i + length, self.length)) for i in range(0, self.length, length)]

    def piece(self, span: slice) -> Piece:
        """The columns `span`."""
        tokens, targets = (_cut(x, span, self.device, torch.int64) for x in (self.inputs, self.targets))
        mask, reset = (None if x is None else _cut(x, span, self.device, torch.bool) for x in (self.mask, self.reset))
        return Piece(tokens, targets, self._counts(span, self.device), mask, reset)

    def count(self) -> int:
        """Number of targets that count."""
        cpu = torch.device("cpu")
        parts = [(span, self._counts(span, cpu)) for span in self.spans(COUNTED_AT_ONCE)]
        return sum(self.batch * (s.stop - s.start) if part is None else int(part.sum()) for s, part in parts)

    def count_tokens(self) -> int:
        """Number of tokens that exist."""
        if self.mask is None:
            return self.batch * self.length
        return sum(int(_cut(self.mask, s, torch.device("cpu"), torch.bool).sum()) for s in self.spans(COUNTED_AT_ONCE))

    def _counts(self, span: slice, device: torch.device) -> Tensor | None:
        flags = [_cut(x, span, device, torch.bool) for x in (self.loss_mask, self.mask) if x is not None]
        return None if not flags else torch.stack(flags).all(0)


@dataclass(frozen=True)
class Run:
    """The forward pass of a piece, its loss divided by the numbers of the whole batch.

    Args:
        model, l2wrap: see `segmented_backward`.
        tokens: targets that count, in all pieces.
        positions: tokens that exist, in all pieces.
        by_length: `reference_weighting`.
    """

    model: LanguageModel
    l2wrap: float
    tokens: float
    positions: float
    by_length: bool = False

    def __call__(self, piece: Piece, state: State) -> tuple[Tensor, State]:
        """The share of a piece in the loss, and the state after it."""
        hidden, state = self.features(piece, state)
        l2wrap, normalizer = self.l2wrap if self.tokens else 0.0, self._normalizer(piece)
        loss = head_loss(
            hidden, self.model.head, piece.targets, piece.counts, l2wrap,
            normalizer=normalizer, positions=max(self.positions, 1), exists=piece.mask,
        )  # fmt: skip
        return loss, state

    def features(self, piece: Piece, state: State) -> tuple[Tensor, State]:
        """Hidden values before the head, and the state after a piece."""
        return self.model.forward_features(piece.tokens, state, piece.mask, piece.reset)

    def _normalizer(self, piece: Piece) -> float | Tensor:
        if not self.by_length or piece.counts is None:
            return max(self.tokens, 1)
        # A segment's share is its part of T times its mean loss.
        return piece.counts.sum().clamp(min=1) * (self.positions / piece.counts.numel())


class _HandOver(torch.autograd.Function):
    """The loss as it is; its backward pass starts at the final state, too."""

    @staticmethod
    def forward(ctx: Any, loss: Tensor, gradients: Sequence[Tensor | None], *final: Tensor) -> Tensor:
        ctx.gradients = gradients
        return loss.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        # They come from a backward pass that was scaled like this one.
        return grad, None, *ctx.gradients


def hand_over(loss: Tensor, final: State, gradients: Sequence[Tensor | None]) -> Tensor:
    """`loss` with a backward pass that also gives `final` the gradients that come from what followed.

    Args:
        loss: of a segment; its backward pass may be scaled as that was from which the gradients come.
        final: the state after the segment.
        gradients: of `state_tensors(final)`; empty if nothing followed.
    """
    result: Tensor = _HandOver.apply(loss, gradients, *state_tensors(final)) if gradients else loss
    return result


def check_learns(model: LanguageModel, state: State) -> None:
    """Raise `WkvError` unless a backward pass has something to do."""
    learns = any(x.requires_grad for x in (*model.parameters(), *state_tensors(state)))
    if not learns or not torch.is_grad_enabled():
        why = "gradients are switched off" if learns else "neither the model nor the initial state requires gradients"
        raise WkvError(f"nothing to train: {why}")


def check_positive(**numbers: int) -> None:
    """Raise `WkvError` unless all are positive integers."""
    for name, number in numbers.items():
        if isinstance(number, bool) or not isinstance(number, int) or number < 1:
            raise WkvError(f"{name} must be a positive integer, found {number!r}")


def _check_values(name: str, values: Values, shape: Sequence[int], kinds: str) -> None:
    wanted = f"{'bool' if kinds == 'b' else 'integers'} {list(shape)}"
    if not isinstance(values, Values):
        raise WkvError(f"{name} must be {wanted}, a tensor or an array, found {type(values).__name__}")
    if _kind(values) not in kinds or tuple(values.shape) != tuple(shape):
        raise WkvError(f"{name} must be {wanted}, found {values.dtype} {list(values.shape)}")


def _kind(values: Values) -> str:
    """The kind of numbers by numpy's letters."""
    if isinstance(values, np.ndarray):
        return values.dtype.kind
    return "b" if values.dtype == torch.bool else "f" if values.is_floating_point() or values.is_complex() else "i"


def _cut(values: Values, span: slice, device: torch.device, dtype: torch.dtype) -> Tensor:
    part = values[:, span]
    if isinstance(part, np.ndarray):  # types that torch lacks, read-only memory
        part = torch.from_numpy(part.astype(bool if dtype == torch.bool else np.int64))
    return part.to(device, dtype)
