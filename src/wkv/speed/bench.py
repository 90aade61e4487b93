"""The whole benchmark: some models one after the other, and the files that come of it."""

from __future__ import annotations

import contextlib
import json
import platform
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

import wkv
from wkv.errors import WkvError
from wkv.files import replacing
from wkv.speed.contenders import Contender
from wkv.speed.files import DESCRIPTION, SHAPES, Weights
from wkv.speed.report import hardware, markdown, summary
from wkv.speed.rounds import Measured, Settings, Watch, measure


def run(
    models: Mapping[str, Weights],
    contenders: Sequence[Contender],
    settings: Settings,
    watch: Watch,
    write: Callable[[dict[str, Any]], None],
    facts: Mapping[str, Any],
) -> dict[str, Any]:
    """Measure models.

    Args:
        models: name -> files.
        contenders: who takes part.
        settings: how to measure.
        watch: who is told how it goes.
        write: called with the result so far after every round, and at the end.
        facts: put at the head of the result: command, commit, ...

    Returns:
        The result. After Ctrl-C it holds the turns measured so far, with "complete": false.
    """
    result: dict[str, Any] = {
        "what": "RWKV-7 on the CPU: decoding and prefill, ours and peers in alternating turns",
        "complete": False, **facts, "versions": versions(), "hardware": hardware(), "settings": described(settings),
        "shapes": {},
    }  # fmt: skip

    def update(name: str, measured: Measured) -> None:
        """Bring the result up to date."""
        shape = SHAPES.get(name)
        about = {"model": asdict(shape), "weights": DESCRIPTION} if shape else {"model": name}
        result["shapes"][name] = {**about, **summary(measured, settings.prompt)}

    books = {name: Measured() for name in models}

    def after_round() -> None:
        for name in books:
            update(name, books[name])
        write(result)

    with contextlib.suppress(KeyboardInterrupt):
        for name, weights in models.items():
            measure(contenders, weights, settings, books[name], Watch(watch.said, watch.turned, after_round))
        result["complete"] = all(measured.complete for measured in books.values())
    after_round()
    return result


def described(settings: Settings) -> dict[str, Any]:
    """Settings as plain data; of another native library only that there was one."""
    return {**asdict(settings), "native": "installed" if settings.native is None else "another build"}


def versions() -> dict[str, str]:
    """Ours; those of the peers stand with the contenders."""
    return {"wkv": wkv.__version__, "torch": torch.__version__, "python": platform.python_version()}


def write_files(result: dict[str, Any], out: Path) -> None:
    """Write the result as JSON and its tables as Markdown beside it.

    Raises:
        WkvError: if a file cannot be written.
    """
    try:
        with replacing([out, out.with_suffix(".md")]) as [data, table]:
            data.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
            table.write_text(markdown(result), encoding="utf-8")
    except OSError as error:
        raise WkvError(f"{out}: could not be written ({error.strerror})") from error
