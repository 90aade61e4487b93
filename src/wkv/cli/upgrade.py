"""`wkv upgrade`: from a checkpoint to a descendant of its architecture."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import typer

from wkv.cli.generate import DTYPE
from wkv.errors import WkvError


def upgrade(
    model: str = typer.Argument(..., help="The checkpoint, or `starter`."),
    name: str = typer.Argument(..., help="What it becomes: temporal, rrwkv, meta_state, hybrid."),
    out: Path = typer.Argument(..., help="The new checkpoint, .safetensors."),  # noqa: B008
    options: list[str] = typer.Argument(None, metavar="[KEY=VALUE]...", help="Of the new parts."),  # noqa: B008
    dtype: str | None = DTYPE,
    replace: bool = typer.Option(False, "--replace", help="Write over a file that is there."),
) -> None:
    """Give a trained model the new parts of a descendant: it says the same at first, and can then be trained on.

    wkv upgrade rwkv4.pth temporal new.safetensors perspectives=4
    """
    import wkv
    from wkv.upgrade import upgrade_model

    if out.exists() and not replace:
        raise WkvError(f"{out} is there already; choose another name, or pass --replace")
    base = wkv.load_model(model, dtype=dtype)
    upgraded = upgrade_model(base, name, **_options(options or []))
    wkv.save_model(upgraded, out)
    more = upgraded.num_parameters - base.num_parameters
    share = f"{more:,} parameters more ({100 * more / base.num_parameters:.3g} %)"
    typer.echo(f"{out}: {base.name} has become {name}, with {share}", err=True)


def _options(words: list[str]) -> dict[str, Any]:
    """KEY=VALUE, values as in YAML."""
    import yaml

    found = {}
    for word in words:
        key, equals, value = word.partition("=")
        if not equals or not key.isidentifier():
            raise WkvError(f"expected KEY=VALUE, found {word!r}")
        found[key] = yaml.safe_load(value)
    return found
