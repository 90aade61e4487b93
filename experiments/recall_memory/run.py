"""Recall against memory: how many key-value pairs a mixer can find again with how many bytes of state.

python experiments/recall_memory/run.py            # all contenders, three seeds
python experiments/recall_memory/run.py --quick    # a few steps of everything, under 2 minutes

Every finished run stays in --runs; a second start, also after Ctrl-C, goes on from there. Several processes can share
the work by --contenders and --seeds.
"""

from __future__ import annotations

import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent)]

from figure import draw  # noqa: E402
from synthetic_runs import Study, main  # noqa: E402

WIDTHS = (16, 32, 64)
RECURRENT = ("rwkv4", "rwkv5", "rwkv6", "rwkv7")
# BASED: a short convolution, then one of its two kinds of attention, or both, or attention to everything.
CONV = "conv_form=zoology,rotary=false,hidden_size=64"
CONTENDERS = (
    *(f"{name}:hidden_size={width},label={name} {width}" for name in RECURRENT for width in WIDTHS),
    *(f"based:linear_layers=[1],{CONV},feature_size={size},label=based f={size}" for size in (4, 8, 16)),
    *(
        f"based:linear_layers=[],window_layers=[1],window={window},{CONV},label=window {window}"
        for window in (4, 16, 32)
    ),
    f"based:num_layers=3,window=8,feature_size=8,{CONV},label=based f=8 + window 8",
    f"based:linear_layers=[],window_layers=[],attention_layers=[1],{CONV},label=attention",
    "transformer:label=transformer",
)
STUDY = Study(
    folder=HERE,
    task="mqar",
    options={"vocab_size": 128, "length": 64, "pairs": 8, "noise": False},
    model={"num_layers": 2, "head_size": 16, "hidden_size": 64},
    frame={"channel_mix": False, "tied_head": True},
    train={"steps": 1500, "batch_size": 32, "eval_every": 100, "validation_samples": 256, "test_samples": 512},
    learning_rates=(1e-3, 3e-3, 1e-2),
    contenders=CONTENDERS,
)

if __name__ == "__main__":
    main(STUDY, __doc__, draw)
