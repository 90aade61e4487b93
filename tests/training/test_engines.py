"""Two processes under DeepSpeed and under Ray (gloo, on the CPU) train as one does: see engines.py.

Both are optional: pip install deepspeed transformers "ray[train]"
"""

from __future__ import annotations

import importlib.util
import json
import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

import wkv
from wkv.training.checkpoint import latest_checkpoint, load_training
from wkv.training.log import read_log

from .engines import CONFIG, RUNS
from .processes import FIRST, STEPS
from .test_kill import leaves
from .test_processes import BAR, close

SCRIPT = Path(__file__).with_name("engines.py")
# Under bf16 DeepSpeed's whole model is in bfloat16, that of one process is in float32 under autocast.
BF16_BAR = 1e-2

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs os.fork")


def needs(install: str, *packages: str) -> None:
    missing = [name for name in packages if importlib.util.find_spec(name) is None]
    if missing:
        pytest.skip(f"{missing[0]} is not installed: pip install {install}")


def run(*command: str, timeout: float) -> str:
    """What a command prints. After `timeout` seconds it is killed, with all that it has started."""
    here = {"PYTHONPATH": os.pathsep.join([str(SCRIPT.parents[2]), os.environ.get("PYTHONPATH", "")])}
    one = {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu"}
    local = {"GLOO_SOCKET_IFNAME": "lo0" if sys.platform == "darwin" else "lo"}
    process = subprocess.Popen(
        [sys.executable, *command], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True,
        env={**os.environ, **here, **one, **local},
    )  # fmt: skip
    try:
        output, _ = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        family = psutil.Process(process.pid).children(recursive=True)  # Ray's workers are in groups of their own
        os.killpg(process.pid, signal.SIGKILL)
        for child in family:
            if child.is_running():
                child.kill()
        raise
    assert process.returncode == 0, output
    return output


@pytest.fixture(scope="module")
def deepspeed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All runs under DeepSpeed; "launched" is "random" by the command of the docs."""
    needs("deepspeed transformers", "deepspeed", "transformers")
    out = tmp_path_factory.mktemp("deepspeed")
    run("-W", "error", str(SCRIPT), "deepspeed", str(out), timeout=400)
    start = ["-m", "accelerate.commands.launch", "--config_file", str(CONFIG), "--num_processes", "2"]
    plan = ["train", "--recipe", str(out / "whole/random/recipe.yaml"), "--out", str(out / "engine/launched")]
    assert "2 processes" in run(*start, str(SCRIPT), "wkv", *plan, timeout=200)
    return out


@pytest.fixture(scope="module")
def ray(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All runs under Ray."""
    needs('"ray[train]"', "ray")
    out = tmp_path_factory.mktemp("ray")
    with tempfile.TemporaryDirectory(prefix="ray", dir="/tmp") as temporary:  # Ray's sockets need short paths
        run("-W", "error", str(SCRIPT), "ray", str(out), temporary, timeout=400)
    return out


def log(folder: Path) -> list[dict[str, float]]:
    return [{**row, "seconds": 0} for row in read_log(folder / "log.csv")]


def check_models(found: Path, expected: Path, dtype: torch.dtype = torch.float32) -> None:
    models = [dict(wkv.load_model(path).state_dict()) for path in (found, expected)]
    assert {x.dtype for x in models[0].values()} == {dtype}
    torch.testing.assert_close(*models, rtol=0, atol=BAR)


def states(folder: Path, name: str) -> dict[str, Any]:
    return leaves(load_training(latest_checkpoint(folder) or folder)[name])


@pytest.mark.parametrize("name", [name for name in (*RUNS, "launched", "continued") if name != "bf16"])
def test_deepspeed_run_is_that_of_one_process(deepspeed: Path, name: str) -> None:
    source = RUNS.get(name, ({"launched": "random"}.get(name, name), 2))[0]
    found, expected = deepspeed / "engine" / name, deepspeed / "whole" / source
    assert [row["step"] for row in log(found) if "loss" in row] == list(range(1, STEPS + 1))
    assert log(found) == [pytest.approx(row, rel=BAR) for row in log(expected)]
    assert states(found, "optimizer") == {"": None}  # DeepSpeed has it
    for step in range(1, STEPS + 1):
        path = f"checkpoints/step-{step:08}/model.safetensors"
        check_models(found / path, expected / path)
    carried, wanted = states(found, "carried"), states(expected, "carried")
    assert [key for key, value in wanted.items() if not close(carried[key], value)] == []
    scores = [json.loads((folder / "result.json").read_text())["bits_per_byte"] for folder in (found, expected)]
    assert scores[0] == pytest.approx(scores[1], rel=BAR)


def test_deepspeed_in_bfloat16(deepspeed: Path) -> None:
    found, expected = deepspeed / "engine/bf16", deepspeed / "whole/bf16"
    for key in ("loss", "bits_per_byte"):
        losses = ([row[key] for row in log(folder) if key in row] for folder in (found, expected))
        assert next(losses) == pytest.approx(next(losses), rel=BF16_BAR)
    assert {x.dtype for x in wkv.load_model(found / "model.safetensors").parameters()} == {torch.bfloat16}


def test_interrupted_deepspeed_run_has_the_model_of_its_last_step(deepspeed: Path) -> None:
    run = deepspeed / "engine/interrupted"
    assert [row["step"] for row in log(run)] == list(range(1, FIRST + 1))
    check_models(run / "model.safetensors", deepspeed / f"whole/random/checkpoints/step-{FIRST:08}/model.safetensors")


@pytest.mark.parametrize(("case", "size"), [("with and with", 2), ("with and without", 1), ("without and with", 2)])
def test_deepspeed_run_cannot_be_resumed(deepspeed: Path, case: str, size: int) -> None:
    """A run with or without DeepSpeed is resumed with or without it."""
    for rank in range(size):
        message = (deepspeed / f"{case} {rank}.txt").read_text()
        assert "a run under DeepSpeed cannot be resumed, nor a run be resumed under it" in message
        assert "train.start_from" in message
    assert (deepspeed / "whole/random/result.json").is_file()  # a refused run stays as it was


@pytest.mark.parametrize("name", ["new", "interrupted"])
def test_ray_run_is_that_of_one_process(ray: Path, name: str) -> None:
    found, expected = ray / name, ray / "whole"
    assert [row["step"] for row in log(found) if "loss" in row] == list(range(1, STEPS + 1))
    assert log(found) == [pytest.approx(row, rel=BAR) for row in log(expected)]
    check_models(found / "model.safetensors", expected / "model.safetensors")
    moments, wanted = states(found, "optimizer"), states(expected, "optimizer")
    assert [key for key, value in wanted.items() if not close(moments[key], value)] == []


def test_ray_connects_the_processes(ray: Path) -> None:
    assert [(ray / f"interrupted {rank}.txt").read_text() for rank in range(2)] == ["2 gloo"] * 2
