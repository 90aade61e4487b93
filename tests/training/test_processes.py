"""Several processes (gloo, on the CPU) train as one does, and go on with each other's runs: see processes.py."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.commands.config.config_args import load_config_from_file

import wkv
from wkv.errors import RecipeError, WkvError
from wkv.training.checkpoint import latest_checkpoint, load_training
from wkv.training.deepspeed import check_deepspeed
from wkv.training.log import read_log
from wkv.training.recipe import recipe_folder
from wkv.training.sections import TrainRecipe

from .processes import RUNS, STEPS
from .test_kill import leaves

SCRIPT = Path(__file__).with_name("processes.py")
BAR = 1e-5

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs os.fork")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All runs, each as a whole in one process and in parts in several."""
    out = tmp_path_factory.mktemp("processes")
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(SCRIPT.parents[2])}
    command = [sys.executable, "-W", "error", str(SCRIPT), str(out)]
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment, start_new_session=True
    )
    try:
        output, _ = process.communicate(timeout=500)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        raise
    assert process.returncode == 0, output
    return out


def close(found: Any, expected: Any) -> bool:
    if isinstance(expected, torch.Tensor):
        return found.dtype == expected.dtype and torch.allclose(found.double(), expected.double(), BAR, BAR)
    return bool(found == pytest.approx(expected, rel=BAR)) if isinstance(expected, float) else found == expected


@pytest.mark.parametrize("name", RUNS)
def test_a_run_is_that_of_one_process(folder: Path, name: str) -> None:
    parts, whole = folder / "parts" / name, folder / "whole" / RUNS[name][0]
    found, expected = ([{**row, "seconds": 0} for row in read_log(run / "log.csv")] for run in (parts, whole))
    assert [row["step"] for row in found if "loss" in row] == list(range(1, STEPS + 1))
    assert found == [pytest.approx(row, rel=BAR) for row in expected]
    assert {path.name for path in parts.iterdir()} == {path.name for path in whole.iterdir()}
    for path in whole.glob("*.safetensors"):
        ours, wanted = (dict(wkv.load_model(run / path.name).state_dict()) for run in (parts, whole))
        torch.testing.assert_close(ours, wanted, rtol=0, atol=BAR)
    states = [leaves(load_training(latest_checkpoint(run) or run)) for run in (parts, whole)]
    assert states[0].keys() == states[1].keys()
    assert [key for key, value in states[1].items() if not close(states[0][key], value)] == []


def test_results_are_those_of_one_process(folder: Path) -> None:
    for name, (recipe, _, _) in RUNS.items():
        paths = (folder / kind / run / "result.json" for kind, run in (("parts", name), ("whole", recipe)))
        found, expected = ({**json.loads(path.read_text()), "seconds": 0} for path in paths)
        wrong = [key for key, value in expected.items() if not close(found[key], value)]
        assert wrong == ["out", "model"], name


def test_divided_models_have_the_same_gradients(folder: Path) -> None:
    for rank in range(2):
        errors = json.loads((folder / f"models{rank}.json").read_text())
        assert set(wkv.list_models()) < errors.keys()
        assert [case for case, error in errors.items() if error > (1e-2 if "bf16" in case else BAR)] == []


@pytest.mark.parametrize(
    ("case", "messages"),
    [
        ("rows", ["train.batch_size (3) is the number of rows over all processes and must be divisible by 2"] * 2),
        ("line", ["train.sequence_parallel: 3 processes share a row, found 2 in all"] * 2),
        ("sharded line", ["train.sequence_parallel needs whole models"] * 2),
        ("one", ["train.sequence_parallel: 2 processes share a row, found 1 in all"]),
        ("no text", ["nowhere: no such file", "process 0 of 2 failed: "]),
    ],
)
def test_runs_that_cannot_be_end_on_every_process(folder: Path, case: str, messages: list[str]) -> None:
    for rank, message in enumerate(messages):
        assert message in (folder / "refusals" / f"{case} {rank}.txt").read_text()
    assert not (folder / "refused").exists()


def test_configurations_are_what_accelerate_reads() -> None:
    for name, kind in {"ddp": "MULTI_GPU", "fsdp2": "FSDP", "deepspeed": "DEEPSPEED"}.items():
        config = load_config_from_file(str(recipe_folder() / "accelerate" / f"{name}.yaml"))
        assert str(config.distributed_type).endswith(kind)


@pytest.mark.parametrize(
    "key", [{"accumulate": 2}, {"segment": 8}, {"ema": 0.9}, {"guard": 1}, {"sequence_parallel": 2}]
)
def test_deepspeed_refuses_what_it_cannot(key: dict[str, Any]) -> None:
    config = {"zero_optimization": {"stage": 2}}
    check_deepspeed(TrainRecipe(steps=1), config)
    with pytest.raises(RecipeError, match=rf"train\.{next(iter(key))} does not go with DeepSpeed"):
        check_deepspeed(TrainRecipe(steps=1, **key), config)
    with pytest.raises(WkvError, match="zero_stage 3"):
        check_deepspeed(TrainRecipe(steps=1), {"zero_optimization": {"stage": 3}})
