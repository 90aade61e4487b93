"""The turns: in every round each contender decodes, then each reads the prompt, with 1 thread, then with 2, ...

Contenders of similar size follow each other, and every round starts with another one, so that a change of the machine's
speed hits all alike. Only ratios within a round count.
"""

from __future__ import annotations

import math
import random
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from operator import mul
from typing import Any

from wkv.speed.contenders import LLAMA, Contender
from wkv.speed.files import Weights, gguf_bytes
from wkv.speed.process import Worker, WorkerError

Round = dict[str, dict[str, Any]]


@dataclass(frozen=True)
class Settings:
    """How to measure.

    Args:
        threads: numbers of threads.
        rounds: how often everybody has a turn.
        seconds: the least time of decoding in a turn.
        tokens: the least number of tokens decoded in a turn.
        prompt: tokens read at once in prefill.
        prefill_seconds: a prompt is read as often as fits into this time, at least once.
        pause: seconds between turns, in which the threads of the last contender go to sleep.
        bandwidth_bytes: size of the memory read; None: 512 MiB, more for large caches.
        passes: over that memory, in each round and for each number of threads.
        native: a native library other than the installed one.
        seed: of the weights and tokens.
    """

    threads: tuple[int, ...] = (1, 2)
    rounds: int = 5
    seconds: float = 1.2
    tokens: int = 20
    prompt: int = 512
    prefill_seconds: float = 0.6
    pause: float = 0.2
    bandwidth_bytes: int | None = None
    passes: int = 5
    native: str | None = None
    seed: int = 0

    @property
    def turns(self) -> int:
        """Turns of one contender in a whole run: decoding and prefill."""
        return 2 * self.rounds * len(self.threads)


QUICK = {"rounds": 2, "seconds": 0.1, "prompt": 64, "prefill_seconds": 0.05, "pause": 0.05}


@dataclass
class Measured:
    """What came out.

    Args:
        facts: contender -> what it is, how much of its weights a token reads, how its logits after the prompt compare
            with those of the first contender.
        failed: contender -> why it is missing.
        rounds: what every round measured, by number of threads: "bandwidth", "decode" and "prefill".
        complete: whether all rounds were measured.
    """

    facts: dict[str, dict[str, Any]] = field(default_factory=dict)
    failed: dict[str, str] = field(default_factory=dict)
    rounds: list[Round] = field(default_factory=list)
    complete: bool = False


@dataclass(frozen=True)
class Watch:
    """Who is told how it goes.

    Args:
        said: called with what is done now.
        turned: called after every turn.
        rounded: called after every round.
    """

    said: Callable[[str], None] = lambda text: None
    turned: Callable[[], None] = lambda: None
    rounded: Callable[[], None] = lambda: None


def measure(
    contenders: Sequence[Contender], weights: Weights, settings: Settings, measured: Measured, watch: Watch
) -> None:
    """Measure one model.

    Args:
        measured: filled as it goes: when Ctrl-C ends this (KeyboardInterrupt), it holds what was measured so far.
    """
    with ExitStack() as stack:
        workers = _start(contenders, weights, settings, measured, watch, stack)
        weights.forget()
        memory = stack.enter_context(Worker())
        tokens = _tokens(weights, settings)
        for number in range(settings.rounds):
            if not workers:
                return
            measured.rounds.append({})
            for threads in settings.threads:
                _round(number, threads, workers, memory, tokens, settings, measured, watch)
            watch.rounded()
        measured.complete = True


def _tokens(weights: Weights, settings: Settings) -> list[int]:
    """Random tokens; every contender reads the same."""
    draw = random.Random(settings.seed)
    return [draw.randrange(1, weights.vocab_size) for _ in range(settings.prompt)]


def _start(
    contenders: Sequence[Contender], weights: Weights, settings: Settings, measured: Measured, watch: Watch,
    stack: ExitStack,
) -> dict[str, Worker]:  # fmt: skip
    """Write the files, then a worker for each contender with its model loaded and warm."""
    workers: dict[str, Worker] = {}
    for contender in contenders:
        watch.said(f"writing weights for {contender.name}")
        try:
            prepare(contender, weights, max(settings.threads))
        except WorkerError as error:
            measured.failed[contender.name] = str(error)
    weights.forget()
    tokens = _tokens(weights, settings)
    first: list[float] = []
    for contender in contenders:
        if contender.name in measured.failed:
            continue
        watch.said(f"loading {contender.name}")
        worker = stack.enter_context(Worker())
        try:
            path = weights.path(contender)
            facts = worker.ask(
                "load", program=contender.program, path=str(path), weights=contender.weights,
                batch=settings.prompt, native=settings.native,
            )  # fmt: skip
            logits = worker.ask("logits", tokens=tokens, threads=max(settings.threads), count=1024)["logits"]
        except WorkerError as error:
            measured.failed[contender.name] = str(error)
            continue
        first = first or logits
        facts["cosine_of_logits"] = cosine(first, logits)
        if contender.program == LLAMA:
            facts["bytes_stored"] = facts["bytes_read"] = gguf_bytes(path)
        measured.facts[contender.name] = {"bits": contender.bits, "file_bytes": path.stat().st_size, **facts}
        workers[contender.name] = worker
    return workers


def cosine(a: list[float], b: list[float]) -> float:
    """Between two lists of logits."""
    return sum(map(mul, a, b)) / math.sqrt(sum(map(mul, a, a)) * sum(map(mul, b, b)))


def prepare(contender: Contender, weights: Weights, threads: int) -> None:
    """Write a contender's file if it is not there; llama.cpp quantises its own.

    Raises:
        WorkerError: if llama.cpp could not.
    """
    path = weights.path(contender)
    if path.is_file():
        return
    with Worker() as worker:
        worker.ask(
            "quantize", source=str(weights.gguf_source()), target=str(path), weights=contender.weights, threads=threads
        )


def _round(
    number: int, threads: int, workers: dict[str, Worker], memory: Worker, tokens: list[int], settings: Settings,
    measured: Measured, watch: Watch,
) -> None:  # fmt: skip
    """One round with one number of threads."""
    row: dict[str, Any] = {"bandwidth": None, "decode": {}, "prefill": {}, "order": _rotated(list(workers), number)}
    measured.rounds[-1][str(threads)] = row
    row["bandwidth"] = memory.ask(
        "bandwidth", threads=threads, passes=settings.passes, size=settings.bandwidth_bytes, native=settings.native
    )
    turns: tuple[tuple[str, dict[str, Any]], ...] = (
        ("decode", {"seconds": settings.seconds, "count": settings.tokens}),
        ("prefill", {"seconds": settings.prefill_seconds}),
    )
    for verb, arguments in turns:
        for name in row["order"]:
            if name not in workers:
                continue
            watch.said(f"round {number + 1}: {name}, {verb}, {threads} thread{'s' * (threads > 1)}")
            time.sleep(settings.pause)
            try:
                row[verb][name] = workers[name].ask(verb, tokens=tokens, threads=threads, **arguments)
            except WorkerError as error:
                measured.failed[name] = str(error)
                del workers[name]
            watch.turned()


def _rotated(names: list[str], number: int) -> list[str]:
    """Everybody, another one first in every round."""
    shift = number * max(1, len(names) // 3) % len(names)
    return names[shift:] + names[:shift]
