"""`train`: from a recipe to a finished run folder."""

from __future__ import annotations

import dataclasses
import json
import shlex
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from wkv.data import Document, RandomWindows, load_documents, split_held_out, tokenize
from wkv.errors import RecipeError, WkvError
from wkv.evaluation import bits_per_byte
from wkv.layers.language_model import LanguageModel
from wkv.training.checkpoint import MODEL, latest_checkpoint, write_file
from wkv.training.display import Display
from wkv.training.loop import Trainer
from wkv.training.recipe import BUDGETS, DataRecipe, Recipe, load_recipe

# What may change when a run is resumed: how long it goes on, how often it reports and saves, and on how many threads.
RESUMABLE = tuple(f"train.{key}" for key in (*BUDGETS, "eval_every", "eval_bytes", "checkpoint_every", "threads"))


@dataclass
class Result:
    """Outcome of `train`.

    Args:
        out: the run folder.
        model: path of the newest checkpoint's model.
        finished: False if the run was interrupted; `train(..., resume=True)` goes on.
        steps, tokens, seconds: how far it got; `seconds` are those spent in training steps.
        bits_per_byte: on the complete held-out text of `held_out_bytes`, None if the run was interrupted.
        parameters: size of the model.
        precision: "fp32" or "bf16", of the matrix products in training; the score is measured in float32.
    """

    out: str
    model: str
    finished: bool
    steps: int
    tokens: int
    seconds: float
    bits_per_byte: float | None
    held_out_bytes: int
    parameters: int
    precision: str


def train(recipe: Recipe, out: str | Path | None = None, resume: bool = False, console: Any = None) -> Result:
    """Train a model as `recipe` says.

    Ctrl-C finishes the step under way, saves, and returns; the run can be resumed. On the CPU a resumed run with a
    budget of steps or tokens goes on bit for bit like one that was never interrupted.

    Args:
        recipe: from `load_recipe`; for a run to be resumed, from `resume_recipe`.
        out: the run folder, `recipe.out` by default.
        resume: go on from the newest checkpoint in `out`.
        console: a rich Console; standard output by default.

    Raises:
        WkvError: if the folder holds another run, the data cannot be used, or training diverges.
    """
    folder = _check_folder(recipe, out, resume)
    console = console or _console()
    train_documents, held_out = split_held_out(
        load_documents(recipe.data.source), recipe.data.held_out_every, recipe.data.held_out_fraction
    )
    with _threads(recipe.train.threads):
        trainer = _prepare(recipe, folder, train_documents, held_out, console)
        with Display(console) as display:
            finished = trainer.run(display)
        score = None
        if finished:
            with console.status("measuring bits per byte on the held-out text"):
                score = bits_per_byte(trainer.plain_model, [document.text for document in held_out])
    result = _result(trainer, score, sum(document.num_bytes for document in held_out))
    if finished:
        write_file(folder / "result.json", lambda path: _write_json(path, dataclasses.asdict(result)))
    return result


@contextmanager
def _threads(count: int | None) -> Iterator[None]:
    """Compute on `count` threads inside the block; None changes nothing."""
    before = torch.get_num_threads()
    torch.set_num_threads(count or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _prepare(
    recipe: Recipe, folder: Path, documents: Sequence[Document], held_out: Sequence[Document], console: Any
) -> Trainer:
    """Everything up to the first step; the folder is not touched before all of it has worked."""
    with console.status("reading the training text"):
        tokenizer = prepare_tokenizer(recipe.data, documents, folder)
        tokens = tokenize(documents, tokenizer)
    plan = recipe.train
    sampler = RandomWindows(tokens, plan.context_length, plan.batch_size, plan.seed)
    checkpoint = latest_checkpoint(folder)
    model = _build_model(recipe, tokenizer, checkpoint)
    trainer = Trainer(plan, model, sampler, folder, [document.text for document in held_out], checkpoint)
    _claim_folder(folder, recipe, tokenizer)
    _announce(console, trainer, tokens.numel(), documents, held_out)
    return trainer


def _result(trainer: Trainer, score: float | None, held_out_bytes: int) -> Result:
    position = trainer.position
    return Result(
        out=str(trainer.run_folder),
        model=str(trainer.run_folder / MODEL),
        finished=score is not None,
        steps=position.step,
        tokens=position.step * trainer.budget.tokens_per_step,
        seconds=position.seconds,
        bits_per_byte=score,
        held_out_bytes=held_out_bytes,
        parameters=trainer.plain_model.num_parameters,
        precision=trainer.precision,
    )


def resume_recipe(out: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """The recipe of the run in folder `out`. `overrides` may change the budget and the intervals.

    Raises:
        RecipeError: if there is no run, or for a key that a run cannot change on its way.
    """
    path = Path(out) / "recipe.yaml"
    if not path.is_file():
        raise RecipeError(f"{out} holds no run to resume (there is no {path.name} in it)")
    stored = load_recipe(path)
    for override in overrides:
        key = override.partition("=")[0]
        if key not in RESUMABLE and load_recipe(path, [override]) != stored:
            raise RecipeError(f"{key} cannot change when a run is resumed; these can: {', '.join(RESUMABLE)}")
    return load_recipe(path, overrides)


def read_result(out: str | Path) -> Result | None:
    """The result of the finished run in folder `out`, None if there is none."""
    path = Path(out) / "result.json"
    if not path.is_file():
        return None
    try:  # the folder may have moved
        return Result(**{**json.loads(path.read_text()), "out": str(out), "model": str(Path(out) / MODEL)})
    except (ValueError, TypeError) as error:
        raise WkvError(f"{path}: not the result of a run ({error}); delete it and resume the run") from error


def prepare_tokenizer(recipe: DataRecipe, documents: Sequence[Document], folder: Path) -> Any:
    """The tokenizer a recipe asks for; "bpe" is that of the run in `folder`, or trained on `documents`."""
    from wkv import tokenizers

    if recipe.tokenizer != "bpe":
        return tokenizers.load(recipe.tokenizer)
    kept = folder / "tokenizer.json"
    if kept.is_file():
        return tokenizers.load(kept)
    assert recipe.vocab_size is not None
    return tokenizers.BPETokenizer.train((document.text for document in documents), recipe.vocab_size)


def _check_folder(recipe: Recipe, out: str | Path | None, resume: bool) -> Path:
    """The run folder; refuse one that is in use. Nothing is written yet."""
    if out is None and recipe.out is None:
        raise RecipeError("out: the recipe names no run folder; give one")
    folder = Path(out or recipe.out or "")
    if folder.exists() and not folder.is_dir():
        raise WkvError(f"{folder} is a file; choose another run folder")
    if resume and not (folder / "recipe.yaml").is_file():
        raise WkvError(f"{folder} holds no run to resume (there is no recipe.yaml in it)")
    if not resume and folder.is_dir() and any(folder.iterdir()):
        command = f"wkv train --out {shlex.quote(str(folder))} --resume"
        raise WkvError(f"{folder} is not empty. Go on with the run in it: {command}. Or choose another --out")
    return folder


def _claim_folder(folder: Path, recipe: Recipe, tokenizer: Any) -> None:
    """Store what makes it the folder of this run: a trained vocabulary, then the recipe. It has no result yet."""
    (folder / "result.json").unlink(missing_ok=True)
    if recipe.data.tokenizer == "bpe" and not (folder / "tokenizer.json").is_file():
        write_file(folder / "tokenizer.json", tokenizer.save)
    write_file(folder / "recipe.yaml", lambda path: _write_yaml(path, {**recipe.to_dict(), "out": str(folder)}))


def _build_model(recipe: Recipe, tokenizer: Any, checkpoint: Path | None) -> LanguageModel:
    """A new model with a seed, or that of the checkpoint."""
    from wkv import create_model, load_model

    if checkpoint is not None:
        return load_model(checkpoint / MODEL)
    sizes = dict(recipe.model.sizes)
    if recipe.model.preset is None:
        sizes.setdefault("vocab_size", tokenizer.vocab_size)
    torch.manual_seed(recipe.train.seed)
    model = create_model(recipe.model.name, recipe.model.preset, **sizes)
    if model.config.vocab_size < tokenizer.vocab_size:
        found = f"{model.config.vocab_size}, the tokenizer has {tokenizer.vocab_size} entries"
        raise RecipeError(f"model.vocab_size is {found}; leave model.vocab_size out")
    model.tokenizer = tokenizer
    return model


def _announce(
    console: Any, trainer: Trainer, num_tokens: int, documents: Sequence[Document], held_out: Sequence[Document]
) -> None:
    model, step = trainer.plain_model, trainer.position.step
    size = sum(document.num_bytes for document in documents)
    spared = sum(document.num_bytes for document in held_out)
    shape = f"{model.config.num_layers} layers x {model.config.hidden_size}, {model.num_parameters:,} parameters"
    lines = (
        f"model       {model.name}, {shape}, {trainer.precision} on {trainer.accelerator.device.type}",
        f"text        {size:,} bytes in {num_tokens:,} tokens; held out: {spared:,} bytes",
    )
    for line in (*lines, f"going on after step {step:,}") if step else lines:
        console.print(line, highlight=False)


def _console() -> Any:
    from rich.console import Console

    return Console()


def _write_json(path: Path, values: dict[str, Any]) -> None:
    path.write_text(json.dumps(values, indent=2) + "\n")


def _write_yaml(path: Path, values: dict[str, Any]) -> None:
    from omegaconf import OmegaConf

    OmegaConf.save(OmegaConf.create(values), path)
