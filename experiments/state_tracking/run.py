"""State tracking: which mixers learn parity and the permutations of three things, and how far they extrapolate.

python experiments/state_tracking/run.py            # all contenders, three seeds
python experiments/state_tracking/run.py --quick    # a few steps of everything, under 2 minutes

Every finished run stays in --runs; a second start, also after Ctrl-C, goes on from there. Several processes can share
the work by --tasks, --contenders and --seeds.
"""

from __future__ import annotations

import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

from synthetic_runs import Study, main  # noqa: E402

CONTENDERS = (
    "rwkv4",
    "rwkv5",
    "rwkv6",
    "rwkv7:a_scale=1,label=rwkv7",
    "rwkv7:a_scale=2,label=rwkv7 a_scale 2",
    "based:linear_layers=[0],window_layers=[],feature_size=8,label=based",
    "transformer",
)
COMMON = {
    "folder": HERE,
    "model": {"num_layers": 1, "head_size": 16, "hidden_size": 32},
    "frame": {},
    "learning_rates": (4e-3, 1e-2),
    "contenders": CONTENDERS,
}
TRAIN = {"batch_size": 48, "eval_every": 100, "validation_samples": 256, "test_samples": 512, "stop_at": None}
STUDIES = (
    Study(
        task="running_parity", options={"min_length": 3, "max_length": 12}, lengths=(12, 24, 48, 96),
        train={**TRAIN, "steps": 1000}, **COMMON,
    ),
    Study(
        task="group_s3", options={"min_length": 3, "max_length": 10}, lengths=(10, 20, 40, 80),
        train={**TRAIN, "steps": 2500}, **COMMON,
    ),
    # One length, one answer, at the end: nothing to climb up by from shorter sequences.
    Study(
        task="parity", options={"min_length": 12, "max_length": 12}, lengths=(12, 24, 48, 96),
        train={**TRAIN, "steps": 2000}, **{**COMMON, "contenders": CONTENDERS[3:5], "seeds": range(5)},
    ),
)  # fmt: skip

if __name__ == "__main__":
    main(STUDIES, __doc__)
