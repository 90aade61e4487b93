"""Train under DeepSpeed or under Ray, and in one process beside it: python engines.py NAME ...

deepspeed FOLDER: every run of `RUNS`, and what DeepSpeed refuses; in forked processes, see processes.py.
wkv ARGUMENTS: the command line with DeepSpeed, for `accelerate launch`.
ray FOLDER TEMPORARY: examples/ray_cluster.py; Ray's own files go to TEMPORARY.
"""

from __future__ import annotations

import io
import os
import runpy
import signal
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import psutil
from accelerate.commands import launch
from accelerate.utils.launch import prepare_deepspeed_cmd_env
from rich.console import Console

from tests.training import processes
from tests.training.helpers import recipe_values, write_corpus
from tests.training.processes import FIRST, SECOND, STEPS, in_processes, interrupt
from wkv.errors import WkvError
from wkv.training import load_recipe, loop, parse_recipe, resume_recipe, train
from wkv.training.recipe import recipe_folder

CONFIG = recipe_folder() / "accelerate" / "deepspeed.yaml"
EXAMPLE = Path(__file__).parents[2] / "examples" / "ray_cluster.py"

# DeepSpeed refuses some keys of the recipes in processes.py. Checkpoints keep the model of every step.
CHANGES = {"accumulate": 1, "ema": None, "keep_best": False, "checkpoint_every": 1, "keep_last": STEPS}
# Name of the run -> the run in one process that it is compared with, and ZeRO's stage.
RUNS = {
    "random": ("random", 2),
    "cache": ("cache", 2),
    "packed": ("packed", 2),
    "stream": ("stream", 2),
    "stage 1": ("stream", 1),
    "bf16": ("bf16", 2),
}


def quiet() -> Console:
    return Console(file=io.StringIO())


def recipe(name: str, folder: Path) -> Any:
    """The recipe of a run under DeepSpeed."""
    if name == "bf16":
        return processes.recipe("stream", folder, **CHANGES, precision="bf16")
    return processes.recipe(name, folder, **CHANGES)


def continuing(folder: Path, model: Path) -> Any:
    """A recipe that starts from a model."""
    values = recipe_values(folder / "corpus", **{**CHANGES, "steps": STEPS, "start_from": str(model)})
    del values["model"]
    return parse_recipe(values)


def load_deepspeed() -> None:
    """Import DeepSpeed, with all that it imports later."""
    # It calls torch by older names, and so do parts of torch that it imports.
    warnings.filterwarnings("ignore", message=r"`torch\.(distributed|jit)\..* is deprecated")
    import deepspeed
    import torch._inductor.compile_fx  # noqa: F401 (with the first optimizer)
    from transformers.integrations import HfDeepSpeedConfig  # noqa: F401 (with accelerate's configuration)

    # On the CPU DeepSpeed would compile a reduction in shared memory, which only inference calls: training goes through
    # gloo. No option of DeepSpeed leaves it out; this is its list of what can be compiled here.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False


def launched(stage: int) -> dict[str, str]:
    """The variables that `accelerate launch` would set under deepspeed.yaml."""
    found: dict[str, str] = {}
    options = ["--config_file", str(CONFIG), "--num_processes", "2", "--zero_stage", str(stage), "script.py"]
    with mock.patch.object(launch, "deepspeed_launcher", lambda plan: found.update(prepare_deepspeed_cmd_env(plan)[1])):
        launch.launch_command(launch.launch_command_parser().parse_args(options))
    return found


def new_run(run: Path, plan: Any, stage: int | None, steps: int | None = None) -> Callable[[int], object]:
    """A run under DeepSpeed, or without it if there is no `stage`; after `steps` steps the last process is interrupted.

    The others hear of it.
    """

    def work(rank: int) -> None:
        os.environ.update({} if stage is None else launched(stage))
        if steps is not None and rank == 1:
            interrupt(steps, plan.train.accumulate)
        assert train(plan, run, console=quiet()).finished == (steps is None)

    return work


def refused(run: Path, path: Path, stage: int | None) -> Callable[[int], object]:
    """Write down what every process says when it is to go on with a run."""

    def work(rank: int) -> None:
        os.environ.update({} if stage is None else launched(stage))
        try:
            train(resume_recipe(run), run, resume=True, console=quiet())
        except WkvError as error:
            path.with_name(f"{path.name} {rank}.txt").write_text(str(error))

    return work


def with_deepspeed(out: str) -> None:
    load_deepspeed()
    folder, two = Path(out), "2 deepspeed"
    whole, engine = folder / "whole", folder / "engine"
    write_corpus(folder / "corpus")
    for name in dict(RUNS.values()):
        in_processes("1", folder, new_run(whole / name, recipe(name, folder), None))
    for name, (source, stage) in RUNS.items():
        in_processes(two, folder, new_run(engine / name, recipe(source, folder), stage))
    for kind, parent in (("1", whole), (two, engine)):
        plan = continuing(folder, parent / "random" / "model.safetensors")
        in_processes(kind, folder, new_run(parent / "continued", plan, 2 if parent == engine else None))
    in_processes(two, folder, new_run(engine / "interrupted", recipe("random", folder), 2, FIRST))
    in_processes(two, folder, refused(engine / "interrupted", folder / "with and with", 2))
    in_processes("1", folder, refused(engine / "interrupted", folder / "with and without", None))
    in_processes(two, folder, refused(whole / "random", folder / "without and with", 2))


def ray_keys(corpus: Path) -> list[str]:
    """KEY=VALUE for a small run of `SECOND` steps."""
    values = recipe_values(corpus, steps=SECOND, precision="fp32", eval_every=SECOND, checkpoint_every=50)
    values["data"] = {"tokenizer": "bpe", "vocab_size": 280}
    return [f"{section}.{key}={value}" for section, keys in values.items() for key, value in keys.items()]


def with_ray(out: str, temporary: str) -> None:
    """A run in one process, one under Ray, and one that is interrupted in one process and goes on under Ray.

    All three end at step `SECOND`, and are then continued in one process.
    """
    folder = Path(out)
    corpus, runs = write_corpus(folder / "corpus"), [folder / name for name in ("whole", "new", "interrupted")]
    keys = ray_keys(corpus)

    def alone(run: Path, steps: int | None = None) -> Callable[[int], object]:
        def work(rank: int) -> None:
            if steps is not None:
                interrupt(steps, 1)
            resume = (run / "recipe.yaml").is_file()
            longer = [f"train.steps={STEPS}"]
            plan = resume_recipe(run, longer) if resume else load_recipe("demo", [f"data.source={corpus}", *keys])
            assert train(plan, run, resume, quiet()).finished == (steps is None)

        return work

    in_processes("1", folder, alone(runs[0]))
    in_processes("1", folder, alone(runs[2], FIRST))
    run_example([str(corpus), str(runs[1]), "2", *keys], runs[2], temporary)
    for run in runs:
        in_processes("1", folder, alone(run))


def run_example(arguments: list[str], interrupted: Path, temporary: str) -> None:
    """examples/ray_cluster.py with a cluster that is this machine, seen from itself alone.

    Its processes take long to start. So they first do what the script is called for, and then what they would do if it
    were called with the folder of the interrupted run.
    """
    os.environ |= {
        "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",  # loopback addresses, which are the default on those systems
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",  # one process less
        "HOME": temporary,  # Ray writes there
    }
    warnings.filterwarnings("ignore", category=DeprecationWarning, module=r"ray\.")
    import ray
    import ray.train.torch

    trainer = ray.train.torch.TorchTrainer

    def trainer_of_both(work: Callable[[dict[str, Any]], None], **options: Any) -> Any:
        def both(plan: dict[str, Any]) -> None:  # Ray sends it to the processes, which know no other tests
            import torch.distributed as dist

            from wkv.training import loop

            loop.draw_loss_curve = lambda *_: None
            for run in (plan["folder"], str(interrupted)):
                work({**plan, "folder": run})
                found = f"{dist.get_world_size()} {dist.get_backend()}"
                (interrupted.parent / f"{interrupted.name} {dist.get_rank()}.txt").write_text(found)

        return trainer(both, **options)

    ray.init("local", num_cpus=2, include_dashboard=False, object_store_memory=2**27, _temp_dir=temporary)
    try:
        patch = mock.patch.object(ray.train.torch, "TorchTrainer", trainer_of_both)
        with patch, mock.patch.object(sys, "argv", [EXAMPLE.name, *arguments]):
            runpy.run_path(str(EXAMPLE), run_name="__main__")
    finally:
        started = psutil.Process().children(recursive=True)
        ray.shutdown()
    _, left = psutil.wait_procs(started, timeout=30)
    assert not left, left


def main(engine: str, *arguments: str) -> None:
    signal.alarm(600)  # if the tests are killed, this ends too, and Ray's processes with it
    if engine == "wkv":
        from wkv import cli

        load_deepspeed()
        sys.argv = ["wkv", *arguments]
        return cli.main()
    processes.recipe("random", Path())  # the first one takes long
    loop.draw_loss_curve = lambda *_: None  # takes longer than a run
    return with_deepspeed(*arguments) if engine == "deepspeed" else with_ray(*arguments)


if __name__ == "__main__":
    main(*sys.argv[1:])
