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

FUSIONS = ("concat", "additive", "gated", "mean")
RWKV7 = "a_scale=2,decay_rank=8,iclr_rank=8"
ALONE = {"transformer": "transformer", "rwkv7": f"rwkv7:{RWKV7},value_rank=8,gate_rank=16"}
HYBRID = f"hybrid:{RWKV7},state_heads=2,branch_norm=true"
MIXED = f"hybrid:{RWKV7},base=rwkv7,value_rank=8,gate_rank=16,branch_norm=true"


def with_fusions(hybrid: str, name: str = "") -> dict[str, str]:
    """A hybrid without middle heads, and with those of every kind."""
    return {
        f"{name}none": f"{hybrid},middle_heads=0",
        **{f"{name}{kind}": f"{hybrid},fusion={kind}" for kind in FUSIONS},
    }


# The state heads of a transformer have no token shift, without which recall is rarely found in these steps: there the
# fusions are compared beside the time mix of RWKV-7, which has one.
RECALL = {**ALONE, "transformer none": f"{HYBRID},middle_heads=0", **with_fusions(MIXED, "rwkv7 ")}
TRACKING = {**ALONE, **with_fusions(HYBRID)}
MODEL = {"num_layers": 2, "head_size": 16, "hidden_size": 32}
TRAIN = {"batch_size": 32, "eval_every": 100, "validation_samples": 256, "test_samples": 512}


def matched(
    contenders: dict[str, str], task: str, options: dict[str, Any], model: dict[str, Any], frame: dict[str, Any]
) -> list[str]:
    """The contenders, of equal size, as text."""
    vocab_size = create_task(task, **options).vocab_size

    def size(text: str) -> int:
        """Parameters."""
        return Contender.parse(text).build(vocab_size, model, Frame(**frame)).num_parameters

    def with_ffn(text: str, width: int) -> str:
        """The same with this inner width of the channel mix."""
        return f"{text}{',' if ':' in text else ':'}ffn_size={width}"

    least = {label: with_ffn(text, model["hidden_size"] * 2) for label, text in contenders.items()}
    most = max(map(size, least.values()))
    texts = []
    for label, text in contenders.items():
        start = 2 * model["hidden_size"]
        step = size(with_ffn(text, start + 1)) - size(least[label])
        texts.append(f"{with_ffn(text, start + round((most - size(least[label])) / step))},label={label}")
    return texts


def study(contenders: dict[str, str], model: dict[str, Any], **more: Any) -> Study:
    """One comparison."""
    texts = matched(contenders, more["task"], more["options"], model, more["frame"])
    return Study(folder=HERE, model=model, contenders=texts, **more)


STUDIES = (
    study(
        RECALL, MODEL, task="mqar", options={"vocab_size": 128, "length": 64, "pairs": 12, "noise": False},
        frame={"tied_head": True, "channel_mix": True}, train={**TRAIN, "steps": 1500},
        learning_rates=(1e-3, 3e-3, 1e-2),
    ),
    study(
        TRACKING, MODEL, task="group_s3", options={"min_length": 3, "max_length": 10}, frame={},
        train={**TRAIN, "steps": 2000, "stop_at": None}, learning_rates=(4e-3, 1e-2), lengths=(10, 20, 40, 80),
    ),
)  # fmt: skip

if __name__ == "__main__":
    main(STUDIES, __doc__)
