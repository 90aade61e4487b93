"""A small model learns to follow the states of a larger one: the observer of "State-based Test-Time Scaling"
(arXiv 2504.05097), our reconstruction from its abstract; there is no released code.

The teacher is frozen, and so are the weights of the student; trained is its initial state. While both read the same
tokens, the student's state S^ of every head should be what projections make of the teacher's state S of a head of a
layer at the same relative depth: S^ ~ P_v S P_k^T. The projections are learnt with it, and thrown away afterwards.

As in a Luenberger observer the student may also be corrected while it reads, S^ <- S^ + gain (P_v S P_k^T - S^), with a
learnt gain per head. That needs the teacher at hand; without it, or with gains of 0, the student runs free.

Shape letters: B batch, T time, H heads of the student, V and K rows and columns of its states, v and k those of the
teacher's.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from wkv.data import Batch
from wkv.errors import WkvError
from wkv.inference.engine import evaluating
from wkv.layers.language_model import LanguageModel, Output
from wkv.state import LayerState, State
from wkv.training.losses import next_token_loss
from wkv.tuning.adapter import Adapter, active_adapter
from wkv.tuning.options import check_rank


class ObserverWeights(NamedTuple):
    """How much each loss counts.

    Args:
        state: distance of the student's states from the projected ones, relative to the student's own.
        logits: KL divergence of the student's predictions from the teacher's; needs one vocabulary.
        task: cross-entropy of the next token.
    """

    state: float = 1.0
    logits: float = 1.0
    task: float = 1.0


class ObserverLosses(NamedTuple):
    """The losses of a batch, in the order of `ObserverWeights`; nats per token, but for the first, which is a ratio."""

    state: Any
    logits: Any
    task: Any


class Observed(NamedTuple):
    """What `Observer.read` returns.

    Attributes:
        student, teacher: logits of all tokens, and states after the last.
        distance: of the student's states from the projected ones, before corrections; see `ObserverWeights`.
    """

    student: Output
    teacher: Output
    distance: Tensor


class Observer(nn.Module):
    """Projections from the teacher's states to the student's, gains, and the losses with them.

    Neither model is a part of this module: its parameters are the projections and the gains.

    Args:
        student, teacher: language models whose layers keep matrices per head (RWKV-5 to 7, in any combination), or
            RWKV-4, whose state num / den counts as one column.
        stride: states are compared, and corrected, after every so many tokens.
        correct: correct the student's states while it reads. Gains are 0 at first.

    Attributes:
        values, keys: P_v [H, V, v] and P_k [H, K, k] of every layer, at first cut-off identities.
        gains: [H] of every layer.

    Raises:
        WkvError: if a model has no such state.
    """

    def __init__(self, student: LanguageModel, teacher: LanguageModel, stride: int = 16, correct: bool = False) -> None:
        super().__init__()
        self._models = student, teacher  # a tuple, so that they are no submodules
        self.stride, self.correct = check_rank(stride, "stride"), correct
        own, others = (_memories(model.init_state(1)) for model in self._models)
        self.layers = [layer * len(others) // len(own) for layer in range(len(own))]
        self.values, self.keys, self.gains = nn.ParameterList(), nn.ParameterList(), nn.ParameterList()
        for memory, layer in zip(own, self.layers, strict=True):
            _, heads, rows, columns = memory.shape
            for made, size, given in ((self.values, rows, -2), (self.keys, columns, -1)):
                eye = torch.eye(size, others[layer].shape[given], dtype=memory.dtype, device=memory.device)
                made.append(nn.Parameter(eye.repeat(heads, 1, 1)))
            self.gains.append(nn.Parameter(memory.new_zeros(heads)))

    @property
    def student(self) -> LanguageModel:
        """The model whose initial state is trained."""
        return self._models[0]

    @property
    def teacher(self) -> LanguageModel:
        """The model that is followed."""
        return self._models[1]

    def estimates(self, teacher: State) -> list[Tensor]:
        """What the student's states should be, by the teacher's: P_v S P_k^T [B, H, V, K] for every layer."""
        memories = _memories(teacher)
        found = []
        for layer, P_v, P_k in zip(self.layers, self.values, self.keys, strict=True):
            S = memories[layer].to(P_v)
            heads = torch.arange(len(P_v), device=S.device) * S.shape[1] // len(P_v)
            found.append(P_v @ S[:, heads] @ P_k.mT)
        return found

    def read(self, tokens: Tensor, mask: Tensor | None = None, reset: Tensor | None = None) -> Observed:
        """Let both models read, `stride` tokens at a time.

        Args:
            tokens, mask, reset: see `LanguageModel.forward`; on the device of the student.
        """
        device = self.teacher.ln_out.weight.device
        own: State | None = None
        other: State | None = None
        outputs: list[tuple[Tensor, Tensor]] = []
        distances = []
        for inputs in _segments(self.stride, tokens, mask, reset):
            with torch.no_grad(), evaluating(self.teacher):
                followed, other = self.teacher(*_given(inputs, other, device))
            logits, own = self.student(*_given(inputs, own, tokens.device))
            estimates = self.estimates(other)
            distances.append(_distance(_memories(own), estimates))
            outputs.append((logits, followed.to(logits.device)))
            if self.correct:
                own = State(own.model, list(map(_corrected, own.layers, estimates, self.gains)))
        assert own is not None
        assert other is not None
        student, teacher = (torch.cat(logits, 1) for logits in zip(*outputs, strict=True))
        return Observed(Output(student, own), Output(teacher, other), torch.stack(distances).mean())

    def forward(self, batch: Batch, weights: ObserverWeights) -> tuple[Tensor, ObserverLosses]:
        """The weighted loss of a batch, and its parts; a part of weight 0 is 0.

        Raises:
            WkvError: if the KL divergence is asked for between different vocabularies.
        """
        found = self.read(batch.inputs, batch.mask, batch.reset)
        own, other = found.student.logits, found.teacher.logits
        zero = found.distance.new_zeros(())
        counted = _counted(batch)
        losses = ObserverLosses(
            state=found.distance if weights.state else zero,
            logits=divergence(own, other, counted) if weights.logits else zero,
            task=next_token_loss(own, batch.targets, counted, l2wrap=0.0) if weights.task else zero,
        )
        parts = zip(weights, losses, strict=True)
        return torch.stack([weight * loss.double() for weight, loss in parts]).sum(), losses


def observe(
    student: LanguageModel,
    teacher: LanguageModel,
    batches: Sequence[Batch | Tensor],
    *,
    weights: ObserverWeights = ObserverWeights(),  # noqa: B008 (immutable)
    steps: int = 100,
    learning_rate: float = 1e-2,
    clip: float = 1.0,
    stride: int = 16,
    correct: bool = False,
    observer: Observer | None = None,
) -> list[ObserverLosses]:
    """Train the student's state adapter to follow the teacher (Adam, constant rate). Save the adapter afterwards.

    Args:
        student: with an active state adapter, such as `wkv.tuning.create("state", student)`.
        teacher: another language model; not changed.
        batches: taken in turn, over and over; tensors are int64 windows [B, T + 1].
        weights: of the losses.
        steps, learning_rate: of Adam, with betas 0.9 and 0.99.
        clip: largest norm of all gradients.
        stride, correct: see `Observer`.
        observer: goes on with its projections and gains, and keeps them; None: a new one with `stride` and `correct`.

    Returns:
        the losses of every step, before it.

    Raises:
        WkvError: if the student has no active state adapter, or there are no batches.
    """
    adapter = _trained(student)
    if not batches:
        raise WkvError("observe needs at least one batch")
    observer = observer or Observer(student, teacher, stride, correct)
    if observer.student is not student or observer.teacher is not teacher:
        raise WkvError("the observer is one of other models; make it from this student and this teacher")
    parameters = [*adapter.named_parameters().values(), *observer.parameters()]
    optimizer = torch.optim.Adam(parameters, learning_rate, betas=(0.9, 0.99))
    history = []
    for step in range(steps):
        batch = _as_batch(batches[step % len(batches)]).to(student.ln_out.weight.device)
        loss, parts = observer(batch, weights)
        found = torch.autograd.grad(loss, parameters, allow_unused=True)
        for parameter, gradient in zip(parameters, found, strict=True):
            parameter.grad = gradient
        nn.utils.clip_grad_norm_(parameters, clip)
        optimizer.step()
        optimizer.zero_grad()
        history.append(ObserverLosses(*(float(part.detach()) for part in parts)))
    return history


def divergence(student: Tensor, teacher: Tensor, counted: Tensor | None = None) -> Tensor:
    """Mean KL divergence of the student's predictions from the teacher's, in nats per token.

    Args:
        student, teacher: logits [B, T, V] of one vocabulary.
        counted: bool [B, T]; None: all positions count.

    Raises:
        WkvError: for logits of different vocabularies.
    """
    if student.shape[-1] != teacher.shape[-1]:
        found = f"{student.shape[-1]} and {teacher.shape[-1]} tokens"
        raise WkvError(f"logits are compared within one vocabulary, student and teacher have {found}")
    own, other = (x.float().log_softmax(-1) for x in (student, teacher))
    each_BT = F.kl_div(own, other, reduction="none", log_target=True).sum(-1)
    return each_BT.mean() if counted is None else each_BT[counted].mean()


def _trained(student: LanguageModel) -> Adapter:
    adapter = active_adapter(student, "state")
    if adapter is None or adapter.is_merged:
        raise WkvError('the student has no active state adapter; mount one with wkv.tuning.create("state", student)')
    return adapter


def _as_batch(batch: Batch | Tensor) -> Batch:
    return batch if isinstance(batch, Batch) else Batch.from_windows(batch)


def _counted(batch: Batch) -> Tensor | None:
    """Positions that exist and whose targets count."""
    if batch.mask is None or batch.loss_mask is None:
        return batch.mask if batch.loss_mask is None else batch.loss_mask
    return batch.mask & batch.loss_mask


def _segments(stride: int, *inputs: Tensor | None) -> Iterator[list[Tensor | None]]:
    assert inputs[0] is not None
    for start in range(0, inputs[0].shape[1], stride):
        yield [None if x is None else x[:, start : start + stride] for x in inputs]


def _given(inputs: list[Tensor | None], state: State | None, device: torch.device) -> tuple[Any, ...]:
    """Arguments of a forward pass."""
    tokens, mask, reset = (None if x is None else x.to(device) for x in inputs)
    return tokens, state, mask, reset


def _memories(state: State) -> list[Tensor]:
    """What each layer remembers, as matrices [B, H, V, K]."""
    return [_memory(state.model, layer) for layer in state.layers]


def _memory(model: str, layer: LayerState) -> Tensor:
    if "wkv" in layer:
        return layer["wkv"]
    if "num" in layer:
        num, den = layer["num"], layer["den"]
        return (num / torch.where(den > 0, den, 1.0))[:, None, :, None]  # den is 0 before the first token
    raise WkvError(f"states of {model} cannot be observed: found {', '.join(layer)}, expected wkv, or num and den")


def _corrected(layer: LayerState, estimate: Tensor, gain: Tensor) -> LayerState:
    """The layer's state, moved towards the estimate [B, H, V, K] by the gain [H]."""
    if "wkv" in layer:
        S = layer["wkv"]
        return {**layer, "wkv": S + (gain[:, None, None] * (estimate - S)).to(S.dtype)}
    num = layer["num"]
    towards = estimate[:, 0, :, 0] * layer["den"] - num
    return {**layer, "num": num + (gain * towards).to(num.dtype)}


def _distance(own: list[Tensor], estimates: list[Tensor]) -> Tensor:
    """|S^ - P_v S P_k^T|^2 / |S^|^2 per head, mean over heads, sequences and layers."""
    ratios = []
    for S, estimate in zip(own, estimates, strict=True):
        size_BH = S.detach().square().sum((-2, -1)).clamp_min(1e-12)
        ratios.append(((S - estimate).square().sum((-2, -1)) / size_BH).mean())
    return torch.stack(ratios).mean()
