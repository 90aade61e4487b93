"""What the quick setting of recall (MQAR) tells: attention, linear recurrences, and a window that is too small.

python experiments/mqar_quick/run.py            # about 4 minutes on one core
python experiments/mqar_quick/run.py --quick    # a few steps of everything, under 2 minutes

The setting is that of `wkv eval mqar --quick`. Every finished run stays in --runs; a second start goes on from there.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

import torch  # noqa: E402
from synthetic_runs import Study, main  # noqa: E402

from wkv.evaluation.synthetic import create_task  # noqa: E402
from wkv.evaluation.synthetic.comparison import write_json  # noqa: E402
from wkv.evaluation.synthetic.presets import QUICK  # noqa: E402

TASK, WINDOW = QUICK["mqar"]["task"], 8
ALONE = "conv_form=zoology,rotary=false,linear_layers=[],window_layers="
STUDY = Study(
    folder=HERE,
    task="mqar",
    options=TASK,
    model={**QUICK[""]["model"], **QUICK["mqar"]["model"]},
    frame=QUICK["mqar"]["frame"],
    train={**QUICK[""]["train"], **QUICK["mqar"]["train"]},
    learning_rates=QUICK[""]["learning_rates"],
    contenders=(
        "rwkv4", "rwkv5", "rwkv6", "rwkv7", "based", f"based:{ALONE}[],attention_layers=[1],label=attention",
        f"based:{ALONE}[1],window={WINDOW},label=window {WINDOW}", "transformer",
    ),
)  # fmt: skip


def within_reach(window: int, rows: int = 20_000) -> float:
    """The share of queries whose value stands among the `window` tokens before them: no recall is needed for those."""
    samples = create_task("mqar", **TASK).sample(rows, seed=0, split="test")
    places = torch.arange(TASK["length"])
    found = 0
    for back in range(1, window + 1):
        before = samples.inputs.roll(back, 1)
        found += int(((before == samples.labels) & (places >= back)).sum())
    return found / int((samples.labels >= 0).sum())


if __name__ == "__main__":
    main(STUDY, __doc__)
    share = within_reach(WINDOW)
    print(f"values among the {WINDOW} tokens before their query: {share:.3f}")
    result = HERE / "result.json"
    if "--quick" not in sys.argv and result.is_file():
        write_json(result, {**json.loads(result.read_text()), "values_within_window": share})
