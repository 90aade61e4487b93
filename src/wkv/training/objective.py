"""The gradients of one optimizer step: one or several batches, whole or in segments, with or without a carried state.

The loss of a step is the mean over all targets that count in all of its batches, as if they were one.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from wkv.data import Batch
from wkv.layers.language_model import LanguageModel
from wkv.state import State
from wkv.training.distributed import Team
from wkv.training.head_loss import head_loss
from wkv.training.sections import TrainRecipe
from wkv.training.segments import segmented_backward
from wkv.training.sequence_parallel import sequence_parallel_backward, sum_gradients
from wkv.training.states import free


class Objective(nn.Module):
    """A model with its loss, so that whatever wraps the one (accelerate, DDP) sees every forward pass.

    Args:
        model: what is trained.
        l2wrap, chunk: see `head_loss`.
    """

    def __init__(self, model: LanguageModel, l2wrap: float = 1e-4, chunk: int | None = None) -> None:
        super().__init__()
        self.model, self.l2wrap, self.chunk = model, l2wrap, chunk

    def forward(
        self, batch: Batch, state: State | None, normalizer: float | Tensor, positions: float
    ) -> tuple[Tensor, State]:
        """The share of a batch in the loss of a step, and the state after it.

        Args:
            state: where to go on from; None is the empty past.
            normalizer, positions: of the whole step, see `head_loss`.
        """
        hidden, state = self.model.forward_features(batch.inputs, state, batch.mask, batch.reset)
        loss = head_loss(
            hidden, self.model.head, batch.targets, batch.loss_mask, self.l2wrap,
            chunk=self.chunk, normalizer=normalizer, positions=positions, exists=batch.mask,
        )  # fmt: skip
        return loss, state


class StepLoss(NamedTuple):
    """What `GradientStep` returns.

    Attributes:
        loss: this process's part of the loss, which is the sum over all; nats per token, detached.
        state: after the last batch, detached; of the rows of this process.
        targets, tokens: that counted and that were read, by all processes.
    """

    loss: Tensor
    state: State | None
    targets: int
    tokens: int = 0


class GradientStep:
    """Adds the gradients of a step to `.grad`.

    Args:
        recipe: how to run it.
        objective: prepared by accelerate, or not.
        plain: the same before that; segments run on its model.
        accelerator: an `accelerate.Accelerator`.
        team: the processes that take part; by default those that `accelerator` knows.
    """

    def __init__(
        self, recipe: TrainRecipe, objective: nn.Module, plain: Objective, accelerator: Any, team: Team | None = None
    ) -> None:
        self.recipe, self.objective, self.plain, self.accelerator = recipe, objective, plain, accelerator
        self.team = team or Team(accelerator, recipe.sequence_parallel)
        self.sums = sums_gradients(recipe, self.team)
        # Where gradients are averaged, a process divides by its part of the targets, else by all of them.
        self.parts = 1 if self.sums else self.team.size

    def __call__(self, batches: Sequence[Batch], state: State | None = None) -> StepLoss:
        """Loss of the step; without a single target that counts it is 0, and so are the gradients.

        Args:
            batches: on the model's device; the second goes on where the first ended if there is a `state`.
            state: before the first batch; None: every batch starts from an empty past.
        """
        counts = sum(map(count_targets, batches)), sum(map(count_tokens, batches))
        (all_targets, all_tokens), _ = self.team.agree(counts)
        targets, positions = (all_targets, all_tokens) if self.parts == 1 else (
            all_targets / self.parts, all_tokens / self.parts
        )  # fmt: skip
        carries = state is not None
        losses = []
        for i, batch in enumerate(batches):
            with self._synchronised(i == len(batches) - 1):
                loss, after = self._backward(batch, state, targets, positions)
            losses.append(loss)
            state = free(after) if carries else None
        loss = losses[0] if len(losses) == 1 else torch.stack(losses).sum()
        if self.sums and targets:
            sum_gradients(self.plain)
        return StepLoss(loss if self.parts == 1 else loss / self.parts, state, round(all_targets), round(all_tokens))

    def _synchronised(self, last: bool) -> AbstractContextManager[Any]:
        """Gradients of several processes meet in the last backward pass of a step; FSDP2 has no room for them before"""
        apart = not last and not self.sums and not self.team.sharded
        return self.accelerator.no_sync(self.objective) if apart else nullcontext()

    def _backward(self, batch: Batch, state: State | None, targets: float, positions: float) -> tuple[Tensor, State]:
        """The share of a batch in the loss, and the state after it."""
        if self.team.line > 1:
            return self._columns(batch, state, targets, positions)
        if not targets:
            return self._read(batch, state)
        if self.recipe.segment is not None:
            return self._segments(batch, state, self.recipe.segment, targets, positions)
        # FSDP2 has divided the model, and the objective around it is nothing that accelerate knows.
        with self.accelerator.autocast() if self.team.sharded else nullcontext():
            loss, state = self.objective(batch, state, targets, positions)
        self.accelerator.backward(loss)
        return loss.detach(), state

    def _read(self, batch: Batch, state: State | None) -> tuple[Tensor, State]:
        """A batch of a step from which there is nothing to learn: only the state goes on."""
        with torch.no_grad(), self.accelerator.autocast():
            hidden, state = self.plain.model.forward_features(batch.inputs, state, batch.mask, batch.reset)
        return hidden.new_zeros(()), state

    def _segments(
        self, batch: Batch, state: State | None, segment: int, targets: float, positions: float
    ) -> tuple[Tensor, State]:
        """The same, segment by segment."""
        with self.accelerator.autocast():
            result = segmented_backward(
                self.plain.model, batch.inputs, batch.targets, segment=segment, mode=self.recipe.segment_mode,
                through=self.recipe.through, state=state, loss_mask=batch.loss_mask, reset=batch.reset,
                mask=batch.mask, l2wrap=self.recipe.l2wrap, backward=self._outside, normalizer=targets,
                positions=positions,
            )  # fmt: skip
        return result.loss, result.state

    def _columns(self, batch: Batch, state: State | None, targets: float, positions: float) -> tuple[Tensor, State]:
        """The same for this process's columns of rows that several share."""
        rows = batch.inputs.shape[0]
        with self.accelerator.autocast():
            result = sequence_parallel_backward(
                self.plain.model, batch.inputs, batch.targets, row_groups=min(rows, 2 * self.team.line), state=state,
                loss_mask=batch.loss_mask, reset=batch.reset, mask=batch.mask, l2wrap=self.recipe.l2wrap,
                backward=self._outside, group=self.team.group, normalizer=targets, positions=positions,
            )  # fmt: skip
        return result.loss / self.team.line, result.state

    def _outside(self, loss: Tensor) -> None:
        """A backward pass without the autocast around it: as everywhere, that is for the forward pass only."""
        with torch.autocast(loss.device.type, enabled=False):
            self.accelerator.backward(loss)


def sums_gradients(recipe: TrainRecipe, team: Team) -> bool:
    """Whether gradients of several processes are added up after the last batch: the passes bypass what would do it."""
    return not team.alone and not team.sharded and (recipe.segment is not None or team.line > 1)


def unused_parameters(objective: Objective) -> list[str]:
    """Names of trainable parameters that the loss does not depend on, such as the value mix of RWKV-7's first layer."""
    device = objective.model.ln_out.weight.device
    tokens = torch.zeros(1, 2, dtype=torch.int64, device=device)
    loss, _ = objective(Batch(tokens, tokens), None, 1.0, 1.0)
    named = [(name, parameter) for name, parameter in objective.named_parameters() if parameter.requires_grad]
    found = torch.autograd.grad(loss, [parameter for _, parameter in named], allow_unused=True)
    return [name for (name, _), gradient in zip(named, found, strict=True) if gradient is None]


def count_targets(batch: Batch) -> int:
    """How many targets count; that of a token that does not exist never does."""
    flags = [flag for flag in (batch.mask, batch.loss_mask) if flag is not None]
    return int(torch.stack(flags).all(0).sum()) if flags else batch.targets.numel()


def count_tokens(batch: Batch) -> int:
    """How many inputs are there, without padding."""
    return batch.inputs.numel() if batch.mask is None else int(batch.mask.sum())


def with_shorter_context(batch: Batch, length: int) -> Batch:
    """The same tokens, but rows are divided into pieces of `length` that are read each from an empty state."""
    if length >= batch.inputs.shape[1]:
        return batch
    begins = (torch.arange(batch.inputs.shape[1], device=batch.inputs.device) % length == 0).expand_as(batch.inputs)
    reset = begins.clone() if batch.reset is None else begins | batch.reset
    return Batch(batch.inputs, batch.targets, batch.loss_mask, reset, batch.mask)
