"""Training: loss, optimizer groups, learning-rate schedules, recipes and the loop."""

from wkv.training.ema import Ema
from wkv.training.estimate import Estimate, estimate
from wkv.training.head_loss import head_loss
from wkv.training.losses import next_token_loss
from wkv.training.optimizer import create_optimizer, parameter_groups, set_learning_rate
from wkv.training.recipe import Recipe, list_recipes, load_recipe, parse_recipe
from wkv.training.run import Result, read_result, resume_recipe, train
from wkv.training.schedule import Budget, Schedule
from wkv.training.segments import segmented_backward

__all__ = [
    "Budget",
    "Ema",
    "Estimate",
    "Recipe",
    "Result",
    "Schedule",
    "create_optimizer",
    "estimate",
    "head_loss",
    "list_recipes",
    "load_recipe",
    "next_token_loss",
    "parameter_groups",
    "parse_recipe",
    "read_result",
    "resume_recipe",
    "segmented_backward",
    "set_learning_rate",
    "train",
]
