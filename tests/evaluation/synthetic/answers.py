"""What the tests of several tasks need."""

from __future__ import annotations

from collections.abc import Iterator

from wkv.evaluation.synthetic import Samples

IGNORED = -100


def rows(samples: Samples) -> Iterator[tuple[list[int], list[int]]]:
    """Inputs and labels of each row."""
    return zip(samples.inputs.tolist(), samples.labels.tolist(), strict=True)


def asked(labels: list[int]) -> list[int]:
    """Places where something is asked."""
    return [place for place, label in enumerate(labels) if label != IGNORED]


def accuracy_of_constants(samples: Samples, vocab_size: int) -> float:
    """Of the best single answer."""
    flat = samples.labels[samples.labels >= 0]
    return int(flat.bincount(minlength=vocab_size).max()) / len(flat)
