"""Which fusion of attention heads and state heads helps: recall (MQAR) and state tracking (permutations of three).

python experiments/wuneng_fusion/run.py            # all contenders, three seeds
python experiments/wuneng_fusion/run.py --quick    # a few steps of everything, under 2 minutes

All contenders of a task have as many parameters as the largest of them without changes, up to one row and column of
their channel mix: that is what is widened. Every finished run stays in --runs; a second start, also after Ctrl-C, goes
on from there. Several processes can share the work by --tasks, --contenders and --seeds.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

from synthetic_runs import Study, main  # noqa: E402

from wkv.evaluation.synthetic.contenders import Contender, Frame  # noqa: E402
from wkv.evaluation.synthetic.task import create_task  # noqa: E402

HYBRID = "hybrid:state_heads=2,a_scale=2,branch_norm=true,decay_rank=8,iclr_rank=8"
RWKV7 = "rwkv7:a_scale=2,decay_rank=8,iclr_rank=8,value_rank=8,gate_rank=16"
CONTENDERS = {
    "transformer": "transformer",
    "rwkv7": RWKV7,
    "none": f"{HYBRID},middle_heads=0",
    "concat": f"{HYBRID},fusion=concat",
    "additive": f"{HYBRID},fusion=additive",
    "gated": f"{HYBRID},fusion=gated",
    "mean": f"{HYBRID},fusion=mean",
}
TRAIN = {"batch_size": 32, "eval_every": 100, "validation_samples": 256, "test_samples": 512}


def matched(task: str, options: dict[str, Any], model: dict[str, Any], frame: dict[str, Any]) -> list[str]:
    """The contenders, of equal size, as text."""
    vocab_size = create_task(task, **options).vocab_size

    def size(text: str) -> int:
        """Parameters."""
        return Contender.parse(text).build(vocab_size, model, Frame(**frame)).num_parameters

    def with_ffn(text: str, width: int) -> str:
        """The same with this inner width of the channel mix."""
        return f"{text}{',' if ':' in text else ':'}ffn_size={width}"

    least = {label: with_ffn(text, model["hidden_size"] * 2) for label, text in CONTENDERS.items()}
    most = max(map(size, least.values()))
    texts = []
    for label, text in CONTENDERS.items():
        start = 2 * model["hidden_size"]
        step = size(with_ffn(text, start + 1)) - size(least[label])
        texts.append(f"{with_ffn(text, start + round((most - size(least[label])) / step))},label={label}")
    return texts


def study(task: str, options: dict[str, Any], model: dict[str, Any], frame: dict[str, Any], **more: Any) -> Study:
    """One comparison."""
    return Study(
        folder=HERE, task=task, options=options, model=model, frame=frame,
        contenders=matched(task, options, model, frame), **more,
    )  # fmt: skip


STUDIES = (
    study(
        "mqar", {"vocab_size": 128, "length": 64, "pairs": 12, "noise": False},
        {"num_layers": 2, "head_size": 16, "hidden_size": 32}, {"tied_head": True, "channel_mix": True},
        train={**TRAIN, "steps": 1500}, learning_rates=(3e-3, 1e-2),
    ),
    study(
        "group_s3", {"min_length": 3, "max_length": 10}, {"num_layers": 2, "head_size": 16, "hidden_size": 32}, {},
        train={**TRAIN, "steps": 2000, "stop_at": None}, learning_rates=(4e-3, 1e-2), lengths=(10, 20, 40, 80),
    ),
)  # fmt: skip

if __name__ == "__main__":
    main(STUDIES, __doc__)
