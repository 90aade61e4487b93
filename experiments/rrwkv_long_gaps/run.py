"""Long gaps: does RRWKV (our reconstruction) recall the first token, and copy selectively, where RWKV-4 forgets?

python experiments/rrwkv_long_gaps/run.py            # all contenders, three seeds
python experiments/rrwkv_long_gaps/run.py --quick    # a few steps of everything, under 2 minutes

Every finished run stays in --runs; a second start, also after Ctrl-C, goes on from there. Several processes can share
the work by --tasks, --contenders and --seeds.
"""

from __future__ import annotations

import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

from synthetic_runs import Study, main  # noqa: E402

GAPS = (16, 64, 256)
BEYOND = 1024


def contenders(period: int) -> tuple[str, ...]:
    """RWKV-4, as it is and with what RRWKV has more; RRWKV with a period of about the square root of the length."""
    kinds = ("last", "mean", "wkv")
    return (
        "rwkv4",
        "rwkv4:ffn_size=356,label=rwkv4 as many parameters",
        "rwkv4:attention_size=234,label=rwkv4 as much state",
        *(f"rrwkv:aggregate={kind},medium_period={period},label=rrwkv {kind}" for kind in kinds),
    )


COMMON = {
    "folder": HERE,
    "model": {"num_layers": 2, "hidden_size": 64},
    "frame": {},
}
TRAIN = {"steps": 400, "batch_size": 32, "eval_every": 100, "validation_samples": 256, "test_samples": 512}
STUDIES = (
    # Every gap up to the longest is trained, so that a test asks about memory and not about unknown lengths; and one
    # test is beyond.
    Study(
        task="first_token_recall", options={"vocab_size": 16, "min_gap": 0, "max_gap": max(GAPS)},
        lengths=tuple(gap + 2 for gap in (*GAPS, BEYOND)), train=TRAIN, contenders=contenders(16),
        learning_rates=(3e-3, 1e-2), **COMMON,
    ),
    Study(
        task="selective_copying", options={"vocab_size": 16, "length": 64, "tokens": 8}, lengths=(),
        train={**TRAIN, "steps": 800}, contenders=contenders(8), learning_rates=(3e-3, 1e-2, 3e-2), **COMMON,
    ),
)  # fmt: skip

if __name__ == "__main__":
    main(STUDIES, __doc__)
