"""How well a model does on samples of a synthetic task.

Shape letters: B batch, T time, C channels, N asked positions.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from wkv.errors import WkvError
from wkv.evaluation.synthetic.streams import Batch, slices
from wkv.layers.language_model import LanguageModel

if TYPE_CHECKING:
    from wkv.evaluation.synthetic.task import Samples

METRIC = "mean over sequences of the share of asked positions that are answered right"


@dataclass(frozen=True)
class Scores:
    """What an evaluation found.

    Args:
        accuracy: see `METRIC`.
        sequence_accuracy: share of the sequences without any error.
        last_accuracy: share of the sequences whose last asked position is right.
        loss: nats per asked position.
    """

    accuracy: float
    sequence_accuracy: float
    last_accuracy: float
    loss: float

    @staticmethod
    def mean(scores: Sequence[Scores]) -> Scores:
        """The mean of each number."""
        columns = zip(*(asdict(found).values() for found in scores), strict=True)
        return Scores(*(sum(column) / len(scores) for column in columns))


def answers(model: LanguageModel, batch: Batch) -> tuple[Tensor, Tensor]:
    """Hidden values [N, C] and labels [N] of the N positions of a batch where something is asked."""
    device = next(model.parameters()).device
    mask = None if batch.mask is None else batch.mask.to(device)
    hidden_BTC, _ = model.forward_features(batch.inputs.to(device), mask=mask)
    labels_BT = batch.labels.to(device)
    asked_BT = labels_BT >= 0
    return hidden_BTC[asked_BT], labels_BT[asked_BT]


@torch.no_grad()
def evaluate(model: LanguageModel, samples: Samples, batch_size: int = 64) -> Scores:
    """Scores of a model, which is in evaluation mode for the time of the call.

    The answer is the most likely token of the whole vocabulary. Sequences without a question do not count.

    Raises:
        WkvError: if nothing is asked at all.
    """
    asked_BT = samples.labels >= 0
    if not asked_BT.any():
        raise WkvError("the samples ask for nothing: every label is negative")
    training = model.training
    model.eval()
    try:
        found = [_answer(model, batch) for batch in slices(samples, batch_size)]
    finally:
        model.train(training)
    right_N, loss_N = (torch.cat(column) for column in zip(*found, strict=True))
    columns = (*_by_sequence(asked_BT, right_N), loss_N)
    return Scores(*(float(column.double().mean()) for column in columns))


def _answer(model: LanguageModel, batch: Batch) -> tuple[Tensor, Tensor]:
    """Which of the N answers are right, and their losses."""
    hidden, labels = answers(model, batch)
    logits = model.forward_head(hidden).float()
    return (logits.argmax(-1) == labels).cpu(), F.cross_entropy(logits, labels, reduction="none").cpu()


def _by_sequence(asked_BT: Tensor, right_N: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Of every sequence with a question: share of right answers, whether all are right, whether the last one is."""
    right_BT = torch.zeros_like(asked_BT)
    right_BT[asked_BT] = right_N
    has_any = asked_BT.any(1)
    asked_BT, right_BT = asked_BT[has_any], right_BT[has_any]
    share_B = right_BT.sum(1) / asked_BT.sum(1)
    last_B1 = asked_BT.shape[1] - 1 - asked_BT.flip(1).int().argmax(1, keepdim=True)
    return share_B, (right_BT == asked_BT).all(1), right_BT.gather(1, last_B1)[:, 0]
