"""Where a measured number comes from: command, commit, versions, hardware, as every result file names them."""

from __future__ import annotations

import importlib.metadata
import platform
import shlex
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from wkv.speed.report import hardware

MEASURED = ("src", "native")  # folders whose changes make it another commit


def evidence(script: str | Path, arguments: Sequence[str] = (), packages: Sequence[str] = ("torch",)) -> dict[str, Any]:
    """What belongs beside the numbers of a script of the repository.

    Args:
        script: its `__file__`.
        arguments: its command line; of paths, which are those of one machine, the last part is shown.
        packages: distributions whose versions count, besides wkv and Python; those not installed are left out.

    Returns:
        `command`, `commit`, `versions`, `hardware` (with the threads that torch uses), which are the same for a run
        that is resumed, and `load_average`.
    """
    import torch

    machine = hardware()
    load = machine.pop("load_average")
    path = Path(script).resolve()
    top = _git(path.parent, "rev-parse", "--show-toplevel")
    name = path.relative_to(top).as_posix() if top is not None else path.name
    shown = [Path(argument).name if "/" in argument else argument for argument in arguments]
    return {
        "command": shlex.join(["python", name, *shown]),
        "commit": commit(path),
        "versions": {**_versions(("wkv", *packages)), "python": platform.python_version()},
        "hardware": {**machine, "threads": torch.get_num_threads()},
        "load_average": load,
    }


def commit(script: str | Path) -> str | None:
    """The commit of the repository that a script lies in, "+" behind it where the library differs from it; or None."""
    folder = Path(script).resolve().parent
    top, found = (_git(folder, "rev-parse", what) for what in ("--show-toplevel", "HEAD"))
    if top is None or found is None:
        return None
    return found + ("+" if _git(Path(top), "status", "--porcelain", "-uno", "--", *MEASURED) else "")


def _versions(packages: Sequence[str]) -> dict[str, str]:
    found = {}
    for name in packages:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def _git(folder: Path, *words: str) -> str | None:
    try:
        run = subprocess.run(["git", *words], capture_output=True, text=True, cwd=folder, check=False)
    except OSError:
        return None
    return run.stdout.strip() if run.returncode == 0 else None
