"""Train in processes that die at chosen moments: python killed.py RECIPE.yaml FOLDER SEED

`FOLDER/whole` is a run that is left alone; `FOLDER/parts` one that is killed 20 times and goes on each time. Prints a
line of JSON for every process: where it was to die, whether it did, and the newest checkpoint it left.
"""

from __future__ import annotations

import io
import json
import os
import random
import signal
import sys
import threading
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

import accelerate  # noqa: F401 (children start with everything loaded)
import matplotlib.backends.backend_agg
import matplotlib.figure  # noqa: F401
import omegaconf  # noqa: F401
import torch
import torch._dynamo
from rich.console import Console

import wkv.checkpoints  # noqa: F401
from wkv.training import checkpoint, load_recipe, loop, run, train

# Moments within a run; some of them come about many times, and one of those is chosen.
PLACES = (
    "model half written", "average half written", "training state half written", "all written, not renamed", "renamed",
    "model not linked", "old checkpoint half deleted", "row half written", "gradients ready", "parameters changed",
    "evaluation", "model file linked", "recipe half written",
)  # fmt: skip


def die(*_: Any, **__: Any) -> NoReturn:
    os.kill(os.getpid(), signal.SIGKILL)
    raise AssertionError("unreachable")


def die_in(seconds: float, *_: Any) -> None:
    """Wherever the main thread is then."""
    threading.Timer(seconds, die).start()


def countdown(function: Callable[..., Any], calls: int, last: Callable[..., Any]) -> Callable[..., Any]:
    """`function`, but its call number `calls` is one of `last`."""
    left = iter(range(calls - 1, -1, -1))
    return lambda *args, **options: (last if next(left, -1) == 0 else function)(*args, **options)


def half(path: Path) -> NoReturn:
    """Cut a file in two and die."""
    os.truncate(path, path.stat().st_size // 2)
    die()


def after(function: Callable[..., Any], then: Callable[..., Any] = die) -> Callable[..., Any]:
    def both(*args: Any, **options: Any) -> Any:
        result = function(*args, **options)
        then(*args, **options)
        return result

    return both


def lay_trap(place: str, rng: random.Random) -> None:
    """Let this process die at `place`, the first to third (or tenth) time it comes there."""
    few, many = rng.randint(1, 3), rng.randint(1, 10)
    trainer = loop.Trainer

    def halve(_: Any, path: Path) -> NoReturn:
        half(path)

    home, name, calls, last = {
        "model half written": (trainer, "_save_model", few, after(trainer._save_model, halve)),
        "average half written": (trainer, "_save_average", few, after(trainer._save_average, halve)),
        "training state half written": (torch, "save", few, after(torch.save, halve)),
        "all written, not renamed": (checkpoint, "_settle", 4 * few - 1, die),
        "renamed": (checkpoint, "publish", few, die),
        "model not linked": (checkpoint, "_link", few, die),
        "model file linked": (checkpoint, "_link", few, after(checkpoint._link)),
        "old checkpoint half deleted": (checkpoint, "_delete", few, half_deleted),
        "row half written": (loop.RunLog, "flush", few, half_row),
        "gradients ready": (loop.GradientStep, "__call__", many, after(loop.GradientStep.__call__)),
        "parameters changed": (torch.optim.AdamW, "step", many, after(torch.optim.AdamW.step)),
        "evaluation": (loop, "bits_per_byte", few, die),
        "recipe half written": (run, "_write_yaml", 1, after(run._write_yaml, lambda path, _: half(path))),
    }[place]  # fmt: skip
    setattr(home, name, countdown(getattr(home, name), calls, last))


def half_row(log: loop.RunLog) -> NoReturn:
    log._file.write("12,34")
    log._file.flush()
    die()


def half_deleted(folder: Path, **_: Any) -> NoReturn:
    for path in sorted(folder.iterdir())[:1]:
        path.unlink()
    die()


def in_a_child(work: Callable[[], object]) -> int:
    child = os.fork()
    if child == 0:
        try:
            torch.set_num_threads(1)
            work()
        except BaseException:
            import traceback

            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    return child


def attempt(recipe: Any, folder: Path, place: str | None, seed: int) -> str:
    """One process: a new run or the next part of one. Returns how it ended."""
    rng = random.Random(seed)

    def work() -> None:
        if place == "at once":
            die_in(rng.uniform(0, 0.3))
        elif place == "any moment":
            start = partial(die_in, rng.uniform(0, 0.1))
            loop.Trainer.step = countdown(loop.Trainer.step, rng.randint(1, 6), after(loop.Trainer.step, start))
        elif place is not None:
            lay_trap(place, rng)
        resume = (folder / "recipe.yaml").is_file()
        train(recipe, folder, resume, Console(file=io.StringIO()))

    status = os.waitpid(in_a_child(work), 0)[1]
    return "killed" if os.WIFSIGNALED(status) else f"exit {os.waitstatus_to_exitcode(status)}"


def main(recipe_path: str, out: str, seed: str) -> None:
    recipe, folder, rng = load_recipe(recipe_path), Path(out), random.Random(int(seed))
    assert attempt(recipe, folder / "whole", None, 0) == "exit 0"
    places = [*PLACES, *["any moment"] * 5, *["at once"] * 2]
    rng.shuffle(places)
    for place in [*places, None]:
        end = attempt(recipe, folder / "parts", place, rng.randrange(2**32))
        newest = checkpoint.latest_checkpoint(folder / "parts")
        print(json.dumps({"place": place, "end": end, "newest": newest and newest.name}), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
