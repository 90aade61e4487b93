"""Ready-made settings of the synthetic benchmarks, as data: preset -> task -> section.

A section may have
    task            options of the task
    model           sizes for contenders that name none; those that a model does not have are left out
    frame           fields of `contenders.Frame`
    train           fields of `trainer.Settings`, without the learning rate
    learning_rates  to choose from by validation accuracy
    widths          hidden sizes at which every contender runs
    lengths         test lengths; without them the task's own
    mix             training parts: {"samples": number, "task": options}; without it the task alone
    tests           test parts: options; without them the task alone, at `lengths`
    cases           sections that vary this one, each with a `label`
The section "" holds what all tasks of a preset share. Options of the command line come on top.

Sources: `quick` and `default` are ours. `zoology` is the protocol of Zoology, figure 2 (arXiv 2312.04927), `based`
that of BASED, figures 2 and 3 (arXiv 2402.18668), both as configured in HazyResearch/zoology, without the embedding's
dropout; `rwkv7` has the sizes of the RWKV-7 paper's table (arXiv 2503.14456) with the training of `zoology`.
"""

from __future__ import annotations

from typing import Any

Section = dict[str, Any]

LANGUAGES = (
    "parity",
    "even_pairs",
    "cycle_navigation",
    "majority",
    "modular_arithmetic",
    "modular_arithmetic_brackets",
)
GROUPS = ("group_s3", "group_s4", "group_s5", "group_a5", "group_z60", "group_a4xz5")
ALONE: Section = {"channel_mix": False, "tied_head": True}

QUICK_LANGUAGE: Section = {
    "task": {"min_length": 3, "max_length": 12},
    "train": {"steps": 1000, "stop_at": None},
    "lengths": [12, 24, 48, 96],
}
QUICK_GROUP: Section = {
    "task": {"min_length": 3, "max_length": 10},
    "model": {"num_layers": 1},
    "train": {"steps": 1000, "batch_size": 48, "stop_at": None},
    "lengths": [10, 20, 40],
}
DEFAULT_LANGUAGE: Section = {
    "task": {"min_length": 3, "max_length": 40},
    "train": {"stop_at": None},
    "lengths": [40, 64, 128, 256],
}
DEFAULT_GROUP: Section = {
    **DEFAULT_LANGUAGE,
    "task": {"min_length": 3, "max_length": 32},
    "lengths": [32, 64, 128, 256],
}

QUICK: dict[str, Section] = {
    "": {
        "model": {"hidden_size": 32, "num_layers": 2, "head_size": 16},
        "train": {"steps": 600, "batch_size": 64},
        "learning_rates": [5e-3],
    },
    "mqar": {
        "task": {"vocab_size": 128, "length": 32, "pairs": 4, "noise": False},
        "model": {"conv_form": "zoology", "rotary": False, "feature_size": 8},
        "frame": ALONE,
        "train": {"steps": 1000},
    },
    "mqar_updates": {
        "task": {"vocab_size": 128, "length": 32, "pairs": 4, "updates": 2},
        "frame": ALONE,
        "train": {"steps": 1000},
    },
    "mqar_compositional": {
        "task": {"vocab_size": 126, "length": 32, "pairs": 4},
        "frame": ALONE,
        "train": {"steps": 1000},
    },
    "running_parity": {
        "task": {"min_length": 3, "max_length": 12},
        "model": {"num_layers": 1},
        "train": {"steps": 600, "batch_size": 48, "stop_at": None},
        "lengths": [12, 24, 48, 96],
    },
    **{task: QUICK_LANGUAGE for task in LANGUAGES},
    **{task: QUICK_GROUP for task in GROUPS},
    "passkey": {"lengths": [64, 128, 256, 512], "train": {"stop_at": None}},
    **{task: {"task": {"length": 64}} for task in ("in_context_recall", "fuzzy_recall", "noisy_recall")},
    "selective_copying": {"task": {"length": 64, "tokens": 8}},
}

DEFAULT: dict[str, Section] = {
    "": {
        "model": {"hidden_size": 64, "num_layers": 2, "head_size": 32},
        "train": {"steps": 2000, "batch_size": 64, "eval_every": 200},
        "learning_rates": [1e-3, 3e-3, 1e-2],
    },
    "mqar": {
        "task": {"vocab_size": 256, "length": 64, "pairs": 8, "noise": False},
        "model": {"conv_form": "zoology", "rotary": False},
        "frame": ALONE,
        "widths": [32, 64],
    },
    "mqar_updates": {"task": {"vocab_size": 256, "length": 64, "pairs": 8, "updates": 4}, "frame": ALONE},
    "mqar_compositional": {"task": {"vocab_size": 252, "length": 64, "pairs": 4}, "frame": ALONE},
    **{task: DEFAULT_LANGUAGE for task in ("running_parity", *LANGUAGES)},
    **{task: DEFAULT_GROUP for task in GROUPS},
    "passkey": {"lengths": [64, 128, 256, 512, 1024], "train": {"stop_at": None}},
}

# Length, pairs, batch size: the first four are those of Zoology.
SIZES = ((64, 4, 512), (128, 8, 512), (256, 16, 256), (512, 64, 128), (1024, 128, 64), (2048, 256, 32))
CASES: list[Section] = [
    {
        "label": f"T={length}, K={pairs}",
        "task": {"length": length, "pairs": pairs},
        "train": {"batch_size": batch_size},
    }
    for length, pairs, batch_size in SIZES
]
ZOOLOGY: Section = {
    "task": {"vocab_size": 8192, "noise": False},
    "model": {"num_layers": 2},
    "frame": ALONE,
    "train": {
        "epochs": 64, "warmup": 0.0, "betas": (0.9, 0.999), "eval_every": 200, "validation_samples": 1000,
        "test_samples": 3000,
    },
    "learning_rates": [1e-4, 4.64e-4, 2.15e-3, 1e-2],
    "widths": [64, 128, 256, 512],
    "mix": [{"samples": 100_000}],
}  # fmt: skip

BASED_TRAINING = ((64, 4, 100_000), (128, 8, 20_000), (256, 16, 20_000), (256, 32, 20_000), (256, 64, 20_000))
BASED_TESTS = ((64, 4), (64, 8), (64, 16), (128, 32), (256, 64), (512, 128), (1024, 256))
BASED: Section = {
    **ZOOLOGY,
    "task": {"vocab_size": 8192, "noise": True},
    "train": {**ZOOLOGY["train"], "epochs": 32, "batch_size": 256, "test_samples": 1000},
    "learning_rates": [1e-3, 3.16e-3, 1e-2, 3.16e-2],
    "widths": [64, 128, 256],
    "mix": [
        {"samples": samples, "task": {"length": length, "pairs": pairs}} for length, pairs, samples in BASED_TRAINING
    ],
    "tests": [{"length": length, "pairs": pairs} for length, pairs in BASED_TESTS],
}

PRESETS: dict[str, dict[str, Section]] = {
    "quick": QUICK,
    "default": DEFAULT,
    "zoology": {"mqar": {**ZOOLOGY, "cases": CASES[:4]}},
    "based": {"mqar": BASED},
    "rwkv7": {"mqar": {**ZOOLOGY, "cases": CASES}},
}
