"""Writing files so that they appear only when they are complete."""

from __future__ import annotations

import contextlib
import os
import secrets
import stat
from collections.abc import Iterator, Sequence
from pathlib import Path


@contextlib.contextmanager
def replacing(paths: Sequence[Path]) -> Iterator[list[Path]]:
    """Temporary names beside `paths`; at the end of the block they take their place together, or vanish.

    The temporary names keep the suffix, by which some writers choose a format.
    """
    temporaries = [path.with_name(f".{secrets.token_hex(4)}.{path.name}") for path in paths]
    try:
        for temporary in temporaries:
            temporary.touch()
        mode = stat.S_IMODE(temporaries[0].stat().st_mode)
        yield temporaries
        for temporary, path in zip(temporaries, paths, strict=True):
            os.chmod(temporary, mode)  # safetensors makes files that only their owner can read
            os.replace(temporary, path)
    finally:
        for temporary in temporaries:
            temporary.unlink(missing_ok=True)
