"""`train`: from a recipe to a finished run folder."""

from __future__ import annotations

import dataclasses
import json
import math
import shlex
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from wkv.data import TokenStore, WholeDocuments
from wkv.errors import RecipeError, WkvError
from wkv.evaluation import bits_per_byte
from wkv.layers.language_model import LanguageModel
from wkv.tokenizers import Tokenizer
from wkv.training.checkpoint import artifact, clear_rubbish, is_rubbish, latest_checkpoint, write_file
from wkv.training.corpus_cache import cached_corpus
from wkv.training.display import Display, reading
from wkv.training.distributed import Team, create_team, launched_rank
from wkv.training.loop import Trainer
from wkv.training.recipe import BUDGETS, Recipe, load_recipe
from wkv.training.sections import TrainRecipe
from wkv.training.source import ChooseTokenizer, Corpus, create_sampler, load_corpus
from wkv.training.start import choose_tokenizer, complete_model, given_model, mount_adapter
from wkv.training.trackers import check_trackers, start_trackers, stop_trackers

# What may change when a run is resumed: how long it goes on, what it reports, saves and puts up with, and on what.
RESUMABLE = tuple(
    f"train.{key}"
    for key in (
        *BUDGETS, "eval_every", "eval_bytes", "stop_after", "checkpoint_every", "keep_last", "keep_best", "guard",
        "spike", "trackers", "threads", "sequence_parallel",
    )
)  # fmt: skip


@dataclass
class Result:
    """Outcome of `train`.

    Args:
        out: the run folder.
        model: path of the newest checkpoint's model, or of its adapter where one is trained.
        finished: False if the run was interrupted; `train(..., resume=True)` goes on.
        steps, tokens, seconds: how far it got; `seconds` are those spent in training steps.
        bits_per_byte: on the complete held-out text of `held_out_bytes`, None if the run was interrupted or nothing
            is held out.
        parameters: size of the model, or of the adapter.
        precision: "fp32" or "bf16", of the matrix products in training; the score is measured in float32.
        stopped_early: whether evaluations no longer improved (`train.stop_after`).
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
    stopped_early: bool = False


def train(recipe: Recipe, out: str | Path | None = None, resume: bool = False, console: Any = None) -> Result:
    """Train a model as `recipe` says.

    Ctrl-C finishes the step under way, saves, and returns; the run can be resumed. On the CPU a resumed run with a
    budget of steps or tokens goes on bit for bit like one that was never interrupted. Where `accelerate launch` or
    torchrun has started several processes, all of them call this and train together.

    Args:
        recipe: from `load_recipe`; for a run to be resumed, from `resume_recipe`.
        out: the run folder, `recipe.out` by default.
        resume: go on from the newest checkpoint in `out`.
        console: a rich Console; standard output by default.

    Raises:
        WkvError: if the folder holds another run, the data cannot be used, or training diverges.
    """
    folder = _check_folder(recipe, out, resume)
    console = console or rich_console()
    with cpu_threads(recipe.train.threads):
        trainer, corpus = prepare(recipe, folder, console)
        team, console = trainer.team, console if trainer.team.main else rich_console(quiet=True)
        team.main_alone(lambda: _claim_folder(folder, recipe, corpus.tokenizer))
        _announce(console, trainer, corpus)
        start_trackers(trainer.accelerator, folder, recipe.to_dict())
        with Display(console) as display:
            finished = trainer.run(display)
        stop_trackers(trainer.accelerator)
        score = None
        if finished and corpus.held_out:
            with console.status("measuring bits per byte on the held-out text"), trainer.averaged():
                score = team.score(partial(bits_per_byte, trainer.plain_model), corpus.held_out)
    result = _result(trainer, finished, score, corpus.held_out_bytes)
    if finished:
        team.main_alone(lambda: _write_result(result, folder / "result.json"))
    team.leave()
    return result


@contextmanager
def cpu_threads(count: int | None) -> Iterator[None]:
    """Compute on `count` threads inside the block; None changes nothing."""
    before = torch.get_num_threads()
    torch.set_num_threads(count or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


ReadCorpus = Callable[[Recipe, ChooseTokenizer, Any], Corpus]


def prepare(recipe: Recipe, folder: Path, console: Any, read: ReadCorpus | None = None) -> tuple[Trainer, Corpus]:
    """Everything up to the first step; the run folder is not touched.

    Args:
        recipe, folder, console: see `train`.
        read: gets the corpus; `read_corpus` by default.
    """
    plan = recipe.train
    check_trackers(plan.trackers)
    team = create_team(plan, folder)
    checkpoint = team.main_alone(lambda: latest_checkpoint(folder))
    given = team.everyone(lambda: given_model(recipe, checkpoint))
    choose = partial(choose_tokenizer, recipe, folder, given)
    corpus = read_together(team, lambda chosen: (read or read_corpus)(recipe, chosen or choose, console))
    plan = with_steps(recipe, corpus.store)

    def complete() -> tuple[Any, LanguageModel]:
        sampler = create_sampler(corpus.store, recipe.data, plan, *team.share)
        model = complete_model(recipe, given, corpus.tokenizer)
        if recipe.tuning.active:
            mount_adapter(recipe, model, checkpoint, corpus.store)
        return sampler, model

    sampler, model = team.everyone(complete)
    return Trainer(plan, model, sampler, folder, corpus.held_out, checkpoint, team), corpus


def with_steps(recipe: Recipe, store: TokenStore) -> TrainRecipe:
    """How to train, with a number of steps in place of `train.epochs`, a fifth of them warm-up at most."""
    plan = recipe.train
    if plan.epochs is None:
        return plan
    if recipe.data.order == "padded":  # every row has one document
        steps = math.ceil(plan.epochs * len(store) / (plan.batch_size * plan.accumulate))
    elif recipe.data.order == "whole":
        sampler = WholeDocuments(store, plan.context_length, plan.batch_size, plan.seed)
        steps = math.ceil(plan.epochs * sampler.num_rows / (plan.batch_size * plan.accumulate))
    else:
        steps = math.ceil(plan.epochs * store.num_tokens / plan.tokens_per_step)
    return dataclasses.replace(plan, steps=steps, epochs=None, warmup_steps=min(plan.warmup_steps, steps // 5))


def read_together(team: Team, read: Callable[[ChooseTokenizer | None], Corpus]) -> Corpus:
    """The corpus of all processes. The main process is the first: it may make a cache or train a vocabulary.

    Args:
        team: the processes.
        read: gets the corpus; given a choice of the tokenizer, uses that.

    Raises:
        DataError: if a process reads other tokens than the main one.
    """
    if team.alone:
        return read(None)
    first: list[Corpus] = []

    def lead() -> Tokenizer:
        first.append(read(None))
        return first[0].tokenizer

    tokenizer = team.main_alone(lead)
    corpus = team.everyone(lambda: first[0] if first else read(lambda documents: tokenizer))
    team.check_same((corpus.store.fingerprint, corpus.held_out_bytes), "training or held-out text")
    return corpus


def read_corpus(recipe: Recipe, choose: ChooseTokenizer, console: Any) -> Corpus:
    """The tokens and held-out texts of a run; `choose` gives the tokenizer."""
    if recipe.data.cache is None:
        with console.status("reading the training text"):
            return load_corpus(recipe.data, choose, recipe.train.context_length)
    with reading(console) as progress:
        return cached_corpus(recipe.data, choose, progress, recipe.train.context_length)


def _result(trainer: Trainer, finished: bool, score: float | None, held_out_bytes: int) -> Result:
    position = trainer.position
    return Result(
        out=str(trainer.run_folder),
        model=str(trainer.run_folder / trainer.artifact),
        finished=finished,
        steps=position.step,
        tokens=position.tokens,
        seconds=position.seconds,
        bits_per_byte=score,
        held_out_bytes=held_out_bytes,
        parameters=trainer.num_parameters,
        precision=trainer.precision,
        stopped_early=trainer.stopped_early and trainer.fraction < 1,
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
        return Result(
            **{**json.loads(path.read_text()), "out": str(out), "model": str(Path(out) / artifact(Path(out)))}
        )
    except (ValueError, TypeError) as error:
        raise WkvError(f"{path}: not the result of a run ({error}); delete it and resume the run") from error


def _check_folder(recipe: Recipe, out: str | Path | None, resume: bool) -> Path:
    """The run folder; refuse one that is in use. Nothing is written yet."""
    if out is None and recipe.out is None:
        raise RecipeError("out: the recipe names no run folder; give one")
    folder = Path(out or recipe.out or "")
    if folder.exists() and not folder.is_dir():
        raise WkvError(f"{folder} is a file; choose another run folder")
    if resume and not (folder / "recipe.yaml").is_file():
        raise WkvError(f"{folder} holds no run to resume (there is no recipe.yaml in it)")
    if not resume and folder.is_dir() and not all(map(is_rubbish, folder.iterdir())):
        command = f"wkv train --out {shlex.quote(str(folder))} --resume"
        raise WkvError(f"{folder} is not empty. Go on with the run in it: {command}. Or choose another --out")
    return folder


def _claim_folder(folder: Path, recipe: Recipe, tokenizer: Any) -> None:
    """Store what makes it the folder of this run: the recipe, and a trained vocabulary. It has no result yet."""
    (folder / "result.json").unlink(missing_ok=True)
    clear_rubbish(folder)
    write_file(folder / "recipe.yaml", lambda path: _write_yaml(path, {**recipe.to_dict(), "out": str(folder)}))
    if recipe.data.tokenizer == "bpe" and not (folder / "tokenizer.json").is_file():
        write_file(folder / "tokenizer.json", tokenizer.save)


def _announce(console: Any, trainer: Trainer, corpus: Corpus) -> None:
    model, store, step, adapter = trainer.plain_model, corpus.store, trainer.position.step, trainer.adapter
    own = model.num_parameters - (0 if adapter is None else adapter.num_parameters)
    shape = f"{model.config.num_layers} layers x {model.config.hidden_size}, {own:,} parameters"
    size = f"{len(store):,} documents" if corpus.num_bytes is None else f"{corpus.num_bytes:,} bytes"
    held_out = f"{corpus.held_out_bytes:,} bytes" if corpus.held_out else "nothing"
    lines = [
        f"model       {model.name}, {shape}, {trainer.precision} on {_place(trainer)}",
        f"text        {size} in {store.num_tokens:,} tokens; held out: {held_out}",
    ]
    if corpus.note:
        lines.append(f"            {corpus.note}")
    if (cut := getattr(trainer.sampler, "num_cut", 0)) > 0:
        lines.append(f"            {cut:,} documents are longer than a row and lose their end")
    if adapter is not None:
        share = f"{adapter.num_parameters:,} parameters ({adapter.num_parameters / own:.2%})"
        lines.insert(1, f"adapter     {adapter.method}, {share}, learning rate {trainer.recipe.learning_rate:g}")
    if step:
        lines.append(f"going on after step {step:,}")
    for line in lines:
        console.print(line, highlight=False)


def _place(trainer: Trainer) -> str:
    device, size = trainer.accelerator.device.type, trainer.team.size
    return device if size == 1 else f"{device}, {size} processes"


def rich_console(quiet: bool | None = None) -> Any:
    """Standard output, or nothing if `quiet`; by default that is so on all processes but the main one."""
    from rich.console import Console

    return Console(quiet=launched_rank() > 0 if quiet is None else quiet)


def _write_result(result: Result, path: Path) -> None:
    content = json.dumps(dataclasses.asdict(result), indent=2) + "\n"
    write_file(path, lambda temporary: _write_text(temporary, content))


def _write_text(path: Path, content: str) -> None:
    path.write_text(content)


def _write_yaml(path: Path, values: dict[str, Any]) -> None:
    from omegaconf import OmegaConf

    OmegaConf.save(OmegaConf.create(values), path)
