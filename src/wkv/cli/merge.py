"""`wkv merge`: put an adapter into the weights of its model."""

from __future__ import annotations

from pathlib import Path

import typer

from wkv.cli.generate import DTYPE
from wkv.errors import WkvError


def merge(
    model: str = typer.Argument(..., help="The checkpoint that the adapter was trained on, or `starter`."),
    adapter: Path = typer.Argument(..., help="An adapter of this library: adapter.safetensors of a run."),  # noqa: B008
    out: Path = typer.Argument(..., help="The merged model: .safetensors, .pth or .gguf."),  # noqa: B008
    dtype: str | None = DTYPE,
    replace: bool = typer.Option(False, "--replace", help="Write over a file that is there."),
) -> None:
    """Merge an adapter into its model, compare the logits of both, and only then write the new checkpoint."""
    import wkv
    from wkv import tuning

    if out.exists() and not replace:
        raise WkvError(f"{out} is there already; choose another name, or pass --replace")
    formats = {".safetensors": "wkv", ".pth": "official", ".pt": "official", ".gguf": "gguf"}
    if out.suffix not in formats:
        raise WkvError(f"{out}: a model file ends in {', '.join(formats)}")
    loaded = wkv.load_model(model, dtype=dtype)
    mounted = tuning.load(adapter, loaded)
    mounted.merge()
    error = mounted.verify()
    wkv.save_model(loaded, out, formats[out.suffix])
    typer.echo(f"{out}: {mounted.method} merged; logits differ by {error:.1e} of the largest at most", err=True)
