"""Synthetic tasks that show what a mixer can remember, recall and compute: generators with exact answers."""

from wkv.evaluation.synthetic.needle import NeedlePrompt, needle_grid, needle_prompt
from wkv.evaluation.synthetic.task import Samples, Task, VaryingTask, create_task, list_tasks
from wkv.evaluation.synthetic.zoology import segment_seeds

__all__ = [
    "NeedlePrompt",
    "Samples",
    "Task",
    "VaryingTask",
    "create_task",
    "list_tasks",
    "needle_grid",
    "needle_prompt",
    "segment_seeds",
]
