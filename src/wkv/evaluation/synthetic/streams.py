"""Where the samples of a run come from: training batches, validation and test samples that share nothing."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

from torch import Tensor

from wkv.errors import WkvError

if TYPE_CHECKING:
    from wkv.evaluation.synthetic.task import Samples, Task

# Between the training seeds of two runs: more than the steps of any. A generator of torch knows 32 bits of a seed.
RUNS = 1_000_000
MAX_SEED = 2**31 // RUNS - 1


@dataclass(frozen=True)
class Part:
    """Sequences of one setting of a task.

    Args:
        task: the task with its options.
        samples: for training by epochs, how many; otherwise the trainer's settings say.
        length: another length than the task's own, for tests of extrapolation.
        label: what tables call it.
    """

    task: Task
    samples: int | None = None
    length: int | None = None
    label: str = ""


class Batch(NamedTuple):
    """Sequences that are read together: int64 [B, T] inputs and labels (negative: nothing is asked), bool mask or None.

    Shape letters: B batch, T time.
    """

    inputs: Tensor
    labels: Tensor
    mask: Tensor | None


def training_samples(part: Part, count: int, seed: int, step: int = 0) -> Samples:
    """Those of one step, or of all epochs."""
    return part.task.sample(count, seed * RUNS + step, split="train", length=part.length)


def validation_samples(part: Part, count: int, seed: int) -> Samples:
    """Different ones for every seed, none of them a test sample's twin in the generator."""
    return part.task.sample(count, seed + 1, split="test", length=part.length)


def test_samples(part: Part, count: int) -> Samples:
    """The same for every run."""
    return part.task.sample(count, 0, split="test", length=part.length)


def sample_length(part: Part) -> int:
    """Tokens in one of its sequences, the longest that can come in training where they differ."""
    return int(part.task.sample(1, 0, split="train", length=part.length).inputs.shape[1])


def num_batches(parts: Sequence[Part], batch_size: int) -> int:
    """Batches of one epoch; the last one of each part may be smaller."""
    return sum(-(-_count(part) // batch_size) for part in parts)


def fresh_batches(parts: Sequence[Part], batch_size: int, steps: int, seed: int) -> Iterator[Batch]:
    """New samples for every step, the parts in turn."""
    for step in range(steps):
        yield from slices(training_samples(parts[step % len(parts)], batch_size, seed, step), batch_size)


def repeated_batches(parts: Sequence[Part], batch_size: int, epochs: int, seed: int) -> Iterator[Batch]:
    """The same samples in the same order in every epoch, part after part, as in the papers."""
    fixed = [training_samples(part, _count(part), seed, place) for place, part in enumerate(parts)]
    for _ in range(epochs):
        for samples in fixed:
            yield from slices(samples, batch_size)


def slices(samples: Samples, size: int) -> Iterator[Batch]:
    """Samples in batches of at most `size` rows."""
    for start in range(0, len(samples.inputs), size):
        rows = slice(start, start + size)
        mask = None if samples.mask is None else samples.mask[rows]
        yield Batch(samples.inputs[rows], samples.labels[rows], mask)


def _count(part: Part) -> int:
    if part.samples is None:
        raise WkvError(f"training by epochs needs the number of samples of {part.task.name}")
    return part.samples
