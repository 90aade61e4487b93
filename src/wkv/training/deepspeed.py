"""DeepSpeed under accelerate: its engine holds the optimizer, and makes the step inside the backward pass.

That leaves no room for what the loop does between the two, nor for its checkpoints: such keys are refused.
"""

from __future__ import annotations

from typing import Any

from wkv.errors import RecipeError, WkvError
from wkv.training.sections import TrainRecipe


def uses_deepspeed(accelerator: Any) -> bool:
    """Whether the processes were started under a DeepSpeed configuration."""
    from accelerate.utils import DistributedType

    return bool(accelerator.distributed_type == DistributedType.DEEPSPEED)


def check_deepspeed(recipe: TrainRecipe, config: dict[str, Any]) -> None:
    """Refuse what does not go with DeepSpeed.

    Args:
        recipe: of the run.
        config: DeepSpeed's.

    Raises:
        RecipeError: naming the key.
        WkvError: for ZeRO-3, which divides parameters.
    """
    stage = config.get("zero_optimization", {}).get("stage", 0)
    if stage not in (1, 2):
        raise WkvError(f"zero_stage {stage} of DeepSpeed is not supported, 1 and 2 are; use ddp.yaml or fsdp2.yaml")
    unfit = {
        "accumulate": recipe.accumulate > 1,
        "segment": recipe.segment is not None,
        "sequence_parallel": recipe.sequence_parallel > 1,
        "ema": recipe.ema is not None,
        "guard": recipe.guard > 0,
    }
    for key, found in unfit.items():
        if found:
            raise RecipeError(f"train.{key} does not go with DeepSpeed; leave it out, or use ddp.yaml or fsdp2.yaml")


def configure(accelerator: Any, recipe: TrainRecipe, rows: int) -> None:
    """Tell DeepSpeed what the recipe says; `rows` are those of one process in a batch."""
    accelerator.state.deepspeed_plugin.deepspeed_config.update(
        train_micro_batch_size_per_gpu=rows, gradient_accumulation_steps=1, gradient_clipping=recipe.clip
    )
