"""Training: loss, optimizer groups, learning-rate schedules, recipes and the loop."""

from wkv.training.losses import next_token_loss
from wkv.training.optimizer import create_optimizer, parameter_groups, set_learning_rate
from wkv.training.recipe import Recipe, list_recipes, load_recipe, parse_recipe
from wkv.training.run import Result, read_result, resume_recipe, train
from wkv.training.schedule import Budget, Schedule

__all__ = [
    "Budget",
    "Recipe",
    "Result",
    "Schedule",
    "create_optimizer",
    "list_recipes",
    "load_recipe",
    "next_token_loss",
    "parameter_groups",
    "parse_recipe",
    "read_result",
    "resume_recipe",
    "set_learning_rate",
    "train",
]
