"""Train on the machines of a Ray cluster: python ray_cluster.py TEXT FOLDER [PROCESSES] [KEY=VALUE]...

`ray start` makes a cluster (without one, this machine is the cluster). TEXT and FOLDER must be there for all machines,
on a shared file system. Called again with the folder of an interrupted run, the script goes on with it, on any number
of processes that divides train.batch_size; KEY=VALUE may then lengthen it, such as train.steps=5000.
"""

import sys
from pathlib import Path
from typing import Any

import torch
from ray.train import ScalingConfig
from ray.train.torch import TorchTrainer

from wkv.training import load_recipe, resume_recipe, train


def work(plan: dict[str, Any]) -> None:
    """What every process does: Ray has connected them, and wkv shares out the rows of each batch."""
    resume = (Path(plan["folder"]) / "recipe.yaml").is_file()
    changes = [f"data.source={plan['text']}", *plan["changes"]]
    recipe = resume_recipe(plan["folder"], plan["changes"]) if resume else load_recipe("demo", changes)
    train(recipe, plan["folder"], resume=resume)


if __name__ == "__main__":
    text, folder, *rest = sys.argv[1:]
    processes = int(rest.pop(0)) if rest and rest[0].isdigit() else 2
    paths = {"text": str(Path(text).resolve()), "folder": str(Path(folder).resolve())}
    scaling = ScalingConfig(num_workers=processes, use_gpu=torch.cuda.is_available())
    TorchTrainer(work, train_loop_config={**paths, "changes": rest}, scaling_config=scaling).fit()
    print(f"the model is {folder}/model.safetensors")
