"""What a synthetic task is: named options, and samples that are drawn anew for every seed.

Shape letters: B rows, T time.
"""

from __future__ import annotations

import dataclasses
import hashlib
import importlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor

from wkv.errors import WkvError
from wkv.layers.config import at_least, check_field

IGNORED = -100  # a label where nothing is asked, as in torch's cross entropy
SPLITS = ("train", "test")

_PACKAGE = "wkv.evaluation.synthetic."
# Where each task lives. The module is imported when its task is first asked for.
_MODULES = {
    **dict.fromkeys(("mqar", "mqar_updates", "mqar_compositional"), "mqar"),
    **dict.fromkeys(("in_context_recall", "noisy_recall"), "mad_recall"),
    "fuzzy_recall": "mad_fuzzy",
    **dict.fromkeys(("selective_copying", "compression", "memorization"), "mad"),
    **dict.fromkeys(("parity", "even_pairs", "cycle_navigation", "majority", "running_parity"), "languages"),
    **dict.fromkeys(("modular_arithmetic", "modular_arithmetic_brackets"), "arithmetic"),
    **dict.fromkeys((f"group_{name}" for name in ("s3", "s4", "s5", "a5", "z60", "a4xz5")), "groups"),
    **dict.fromkeys(("copying", "digit_reversal"), "copying"),
    **dict.fromkeys(("passkey", "first_token_recall"), "passkey"),
}


@dataclass(frozen=True)
class Samples:
    """Sequences with questions.

    Args:
        inputs: int64 [B, T], tokens below the task's `vocab_size`.
        labels: int64 [B, T]: the token to be predicted at this very position (not shifted), -100 where nothing is
            asked.
        mask: bool [B, T], False where a token does not exist, or None. The tasks here fill up short rows on the right,
            after the last question, where no causal model is disturbed, and need no mask.
        meta: what else is known of each row: gaps, lengths and so on, tensors [B, ...].
    """

    inputs: Tensor
    labels: Tensor
    mask: Tensor | None = None
    meta: Mapping[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Task(ABC):
    """A task. Its dataclass fields are its options; they are checked at construction."""

    name: ClassVar[str]
    compat: ClassVar[tuple[str, ...]] = ()  # originals whose draws `sample` can repeat

    def __post_init__(self) -> None:
        for option in dataclasses.fields(self):
            try:
                check_field(option, getattr(self, option.name))
            except WkvError as error:
                raise self.fail(str(error)) from None
        self.check()

    def check(self) -> None:  # noqa: B027 - most tasks have nothing to add
        """Raise `WkvError` for options that do not fit together."""

    @property
    @abstractmethod
    def vocab_size(self) -> int:
        """Number of tokens, answers included."""

    @property
    @abstractmethod
    def chance(self) -> float:
        """Expected accuracy on test samples of the best guess that knows place and length, but no token."""

    @property
    def options(self) -> dict[str, Any]:
        """All options, defaults filled in."""
        return dataclasses.asdict(self)

    def sample(
        self, n: int, seed: int, split: str = "train", length: int | None = None, compat: str | None = None
    ) -> Samples:
        """Draw `n` rows; the same arguments give the same rows.

        Args:
            n: rows.
            seed: any integer; with `compat` in [0, 2^32).
            split: "train" or "test". They never share a stream of random numbers. Tasks of MAD also differ in what
                they ask: everything in training, only what can be known in the test.
            length: another length than the task's, for tests of extrapolation.
            compat: repeat the draws of an original generator bit for bit, see `Task.compat`. There the seed alone
                decides about the inputs, as in the originals.

        Raises:
            WkvError: for arguments out of range and a length at which the task does not exist.
        """
        self._check_request(n, seed, split, compat)
        task = self if length is None else self.with_length(length)
        if compat is not None:
            return task.draw_as(compat, n, seed, split)
        return task.draw(n, stream(seed, split), split)

    def with_length(self: T, length: int) -> T:
        """The same task at another length."""
        return type(self)(**{**self.options, "length": length})

    @abstractmethod
    def draw(self, n: int, generator: torch.Generator, split: str) -> Samples:
        """Draw `n` rows."""

    def draw_as(self, compat: str, n: int, seed: int, split: str) -> Samples:
        """Draw `n` rows as an original does."""
        raise self.fail(f"there are no draws of {compat}")

    def fail(self, words: str) -> WkvError:
        """An error that names the task."""
        return WkvError(f"{self.name}: {words}")

    def _check_request(self, n: int, seed: int, split: str, compat: str | None) -> None:
        for name, value, expected in (("n", n, at_least(1)(n)), ("seed", seed, _integer(seed))):
            if expected is not None:
                raise self.fail(f"{name} must be {expected}, found {value!r}")
        if split not in SPLITS:
            raise self.fail(f"split must be 'train' or 'test', found {split!r}")
        if compat is None:
            return
        if compat not in self.compat:
            raise self.fail(f"compat must be one of {', '.join(self.compat) or 'nothing'}, found {compat!r}")
        if not 0 <= seed < 2**32:
            raise self.fail(f"seed must be in [0, 2^32) with compat={compat!r}, found {seed}")


T = TypeVar("T", bound=Task)


@dataclass(frozen=True, kw_only=True)
class VaryingTask(Task):
    """A task whose rows have different lengths.

    Args:
        min_length, max_length: tokens of a row, question included; each length is equally likely.
    """

    min_length: int = 3
    max_length: int = 40
    shortest: ClassVar[int] = 1  # at which the task exists

    def check(self) -> None:
        if not self.shortest <= self.min_length <= self.max_length:
            found = f"found min_length {self.min_length} and max_length {self.max_length}"
            raise self.fail(f"lengths must satisfy {self.shortest} <= min_length <= max_length, {found}")

    def with_length(self: V, length: int) -> V:
        return dataclasses.replace(self, min_length=length, max_length=length)

    @property
    def lengths(self) -> range:
        """All lengths that rows can have."""
        return range(self.min_length, self.max_length + 1)

    def draw_lengths(self, n: int, generator: torch.Generator) -> Tensor:
        """int64 [B]."""
        return torch.randint(self.min_length, self.max_length + 1, (n,), generator=generator)


V = TypeVar("V", bound=VaryingTask)
C = TypeVar("C", bound=type[Task])
_classes: dict[str, type[Task]] = {}


def register(name: str) -> Callable[[C], C]:
    """Class decorator: make a task known under `name`."""

    def add(task_class: C) -> C:
        task_class.name = name
        _classes[name] = task_class
        return task_class

    return add


def list_tasks() -> list[str]:
    """Names of all tasks."""
    return sorted(_MODULES)


def create_task(name: str, **options: Any) -> Task:
    """A task.

    Args:
        name: one of `list_tasks()`.
        options: fields of the task's class; see there.

    Raises:
        WkvError: for an unknown name or option, and options out of range.
    """
    if name not in _MODULES:
        raise WkvError(f"task {name!r} is unknown; one of {', '.join(list_tasks())}")
    importlib.import_module(_PACKAGE + _MODULES[name])
    found = _classes[name]
    known = sorted(option.name for option in dataclasses.fields(found))
    for key in options:
        if key not in known:
            raise WkvError(f"{name} has no option {key!r}; one of {', '.join(known)}")
    return found(**options)


def stream(seed: int, split: str) -> torch.Generator:
    """A generator of its own for every seed and split.

    torch's CPU generator starts from 32 bits only: 31 are a hash of the seed, the last one is the split.
    """
    digest = hashlib.blake2b(str(seed).encode(), digest_size=4).digest()
    number = (int.from_bytes(digest, "little") & ~1) | SPLITS.index(split)
    return torch.Generator().manual_seed(number)


def empty_labels(like_BT: Tensor) -> Tensor:
    """Labels that ask for nothing yet."""
    return torch.full_like(like_BT, IGNORED)


def _integer(value: object) -> str | None:
    return None if isinstance(value, int) and not isinstance(value, bool) else "an integer"
