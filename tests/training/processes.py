"""Train in one, two and four processes: python processes.py FOLDER

Each run of `RUNS` goes into a folder of its own, and so does what `refusals` finds. Processes are forked from one that
has everything loaded, and end after two minutes at the latest.
"""

from __future__ import annotations

import copy
import dataclasses
import io
import json
import os
import signal
import sys
from argparse import Namespace
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import accelerate  # noqa: F401 (children start with everything loaded)
import matplotlib.backends.backend_agg
import matplotlib.figure  # noqa: F401
import omegaconf  # noqa: F401
import torch
import torch._dynamo
import torch.distributed as dist
import torch.distributed.fsdp
import torch.distributed.tensor
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils.launch import prepare_multi_gpu_env
from rich.console import Console

import wkv
import wkv.checkpoints
from tests import small
from tests.training.helpers import recipe_values, write_corpus
from wkv.data import Batch
from wkv.data.sampling import RowSampler
from wkv.training import loop, parse_recipe, resume_recipe, train
from wkv.training.distributed import Team, create_team
from wkv.training.objective import GradientStep, Objective
from wkv.training.recipe import recipe_folder
from wkv.training.sections import TrainRecipe
from wkv.training.sharding import shard, whole

STEPS, FIRST, SECOND = 9, 3, 6  # steps of a run; interruptions come after these
SHARED = {"sequence_parallel": 2}

# Name -> data, train.
RECIPES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "random": ({}, {"accumulate": 2, "keep_best": True}),
    "cache": ({"order": "padded", "tokenizer": "bpe", "vocab_size": 280}, {"context_length": 30}),
    "packed": ({"order": "packed"}, {"context_start": 8, "context_warmup_steps": 6}),
    "stream": ({"order": "stream"}, {"accumulate": 2, "ema": 0.8}),
    "segments": ({"order": "stream"}, {"segment": 10, "segment_mode": "exact"}),
}
# Name of the run -> its recipe, what changes in it, and the processes of each part of it: "2 fsdp2" are two under
# fsdp2.yaml.
RUNS: dict[str, tuple[str, dict[str, Any], list[str]]] = {
    "random": ("random", {}, ["2 ddp"]),
    "cache": ("cache", {}, ["2 ddp"]),
    "stream": ("stream", {}, ["2 ddp", "1", "2 ddp"]),
    "segments": ("segments", {}, ["1", "2 ddp", "1"]),
    "sharded-stream": ("stream", {}, ["2 fsdp2", "1", "2 fsdp2"]),
    "sharded-segments": ("segments", {}, ["2 fsdp2"]),
    "line-packed": ("packed", SHARED, ["2 ddp"]),
    "line-stream": ("stream", SHARED, ["2 ddp", "1", "2 ddp"]),
    "line-padded": ("cache", SHARED, ["4 ddp"]),
}


def recipe(name: str, folder: Path, **changes: Any) -> Any:
    """The recipe of a run; the texts are of different lengths."""
    data, options = RECIPES[name]
    options = {"steps": STEPS, "eval_every": 6, "checkpoint_every": 50, **options, **changes}
    values = recipe_values(folder / "corpus", **options)
    values["data"] |= data
    if name == "cache":
        values["data"]["cache"] = str(folder / "tokens" / ("shared" if changes else "own"))
    return parse_recipe(values)


def launched(config: str, size: int) -> dict[str, str]:
    """The variables that `accelerate launch` would set."""
    path = recipe_folder() / "accelerate" / f"{config}.yaml"
    arguments = launch_command_parser().parse_args(
        ["--config_file", str(path), "--num_processes", str(size), "script.py"]
    )
    checked: Namespace = _validate_launch_command(arguments)[0]
    return dict(prepare_multi_gpu_env(checked))


def in_processes(kind: str, folder: Path, work: Callable[[int], object]) -> None:
    """Let processes do `work`, each with its number."""
    size, _, config = kind.partition(" ")
    children = []
    for rank in range(int(size)):
        child = os.fork()
        if child == 0:
            status = 1
            try:
                signal.alarm(120)
                torch.set_num_threads(1)
                if config:
                    join(rank, int(size), config, folder)
                work(rank)
                status = 0
            except BaseException:
                import traceback

                traceback.print_exc()
            os._exit(status)
        children.append(child)
    found = [os.waitpid(child, 0)[1] for child in children]
    (folder / "store").unlink(missing_ok=True)
    assert not any(found), (kind, folder, found)


def join(rank: int, size: int, config: str, folder: Path) -> None:
    """Meet the other processes."""
    os.environ.update(launched(config, size))
    numbers = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": size, "LOCAL_WORLD_SIZE": size}
    os.environ.update({name: str(value) for name, value in numbers.items()})
    os.environ["GLOO_SOCKET_IFNAME"] = "lo0" if sys.platform == "darwin" else "lo"
    store = f"file://{folder}/store"
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=size, timeout=timedelta(seconds=60))


def interrupt(steps: int, accumulate: int) -> None:
    """Let Ctrl-C come to this process in step number `steps`."""
    before, drawn = RowSampler.next_batch, []

    def next_batch(self: RowSampler) -> Any:
        drawn.append(None)
        if len(drawn) == steps * accumulate:
            signal.raise_signal(signal.SIGINT)
        return before(self)

    RowSampler.next_batch = next_batch  # type: ignore[method-assign]


def part(name: str, run: Path, changes: dict[str, Any], steps: int | None = None) -> Callable[[int], object]:
    """A new run or the next part of one, which ends after `steps` steps: the last process is interrupted."""

    def work(rank: int) -> None:
        size = dist.get_world_size() if dist.is_initialized() else 1
        own, resume = changes if size > 1 else {}, (run / "recipe.yaml").is_file()
        plan = recipe(name, run.parents[1], **own)
        if resume:
            plan = resume_recipe(run, [f"train.sequence_parallel={plan.train.sequence_parallel}"])
        if steps is not None and rank == size - 1:
            interrupt(steps, plan.train.accumulate)
        output = io.StringIO()
        result = train(plan, run, resume, Console(file=output, width=200))
        assert result.finished == (steps is None), result
        assert bool(output.getvalue()) == (rank == 0), output.getvalue()

    return work


def run_all(folder: Path) -> None:
    recipe("random", folder)  # the first one takes long
    loop.draw_loss_curve = lambda *_: None  # takes longer than a run
    for name in RECIPES:
        in_processes("1", folder, part(name, folder / "whole" / name, {}))
    for run, (name, changes, kinds) in RUNS.items():
        ends = [None] if len(kinds) == 1 else [FIRST, SECOND - FIRST, None]
        for kind, steps in zip(kinds, ends, strict=True):
            in_processes(kind, folder, part(name, folder / "parts" / run, changes, steps))


def noisy_model(name: str) -> Any:
    """A model whose parameters all have gradients."""
    torch.manual_seed(0)
    model = wkv.create_model(name, vocab_size=64, num_layers=2, hidden_size=32, **small.options(name, 16))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape))
    return model


def divided_models(folder: Path) -> Callable[[int], object]:
    """Gradients of every model, divided in two, against those of the whole one; one of two rows for each process."""
    rows = torch.randint(64, (2, 25), generator=torch.Generator().manual_seed(1))
    cases = {name: TrainRecipe(steps=1, batch_size=2) for name in wkv.list_models()}
    through = TrainRecipe(steps=1, batch_size=2, segment=10, through=2, gradient_checkpointing=True)
    cases |= {"rwkv7 through": through, "rwkv7 bf16 through": dataclasses.replace(through, precision="bf16")}
    cases["rwkv7 bf16"] = TrainRecipe(steps=1, batch_size=2, segment=10, precision="bf16")

    def gradients(model: Any, plan: TrainRecipe, team: Team, some: torch.Tensor) -> list[torch.Tensor | None]:
        objective = Objective(model)
        GradientStep(plan, objective, objective, team.accelerator, team)([Batch.from_windows(some)])
        return [None if p.grad is None else whole(p.grad) for p in model.parameters()]

    def work(rank: int) -> None:
        errors = {}
        for case, plan in cases.items():
            team, model = create_team(plan, folder), noisy_model(case.split()[0])
            model.gradient_checkpointing = plan.gradient_checkpointing
            divided = copy.deepcopy(model)
            shard(divided, team.sharding)
            found = gradients(divided, plan, team, rows[rank : rank + 1])
            team.size, team.rank, team.sharding = 1, 0, None
            pairs = list(zip(found, gradients(model, plan, team, rows), strict=True))
            assert all((p is None) == (q is None) for p, q in pairs), case
            errors[case] = max(float((p - q).norm() / q.norm()) for p, q in pairs if p is not None and q is not None)
        (folder / f"models{rank}.json").write_text(json.dumps(errors))

    return work


def refusals(folder: Path) -> None:
    """What every process says of a run that cannot be."""
    plans = {
        "rows": ("2 ddp", {"batch_size": 3}),
        "line": ("2 ddp", {"sequence_parallel": 3}),
        "sharded line": ("2 fsdp2", {"sequence_parallel": 2}),
        "one": ("1", {"sequence_parallel": 2}),
        "no text": ("2 ddp", {}),
    }
    for name, (kind, options) in plans.items():

        def work(rank: int, name: str = name, options: dict[str, Any] = options) -> None:
            source = folder / ("corpus" if name != "no text" or rank else "nowhere")
            values = recipe_values(source, context_length=24, **options)
            try:
                train(parse_recipe(values), folder / "refused", console=Console(file=io.StringIO()))
            except ValueError as error:
                path = folder / "refusals" / f"{name} {rank}.txt"
                path.parent.mkdir(exist_ok=True)
                path.write_text(str(error))

        in_processes(kind, folder, work)


def main(out: str) -> None:
    folder = Path(out)
    write_corpus(folder / "corpus")
    for number, path in enumerate(sorted((folder / "corpus").iterdir())):
        path.write_text(path.read_text()[: 40 + 37 * number])
    run_all(folder)
    in_processes("2 fsdp2", folder, divided_models(folder))
    refusals(folder)


if __name__ == "__main__":
    main(*sys.argv[1:])
