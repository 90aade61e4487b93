"""Peak memory and time of a fine-tuning step: Bone and MiSS beside LoRA with as many parameters; writes JSON.

python benchmarks/finetune_memory.py [--out FILE] [--quick]

Memory: every number comes from a process of its own (Linux: VmHWM of /proc/self/status, which is set back before the
step), the median of several. Time: adapters of one model take turns, step by step. Needs "wkv[tune]".
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import wkv
from wkv import tuning
from wkv.files import replacing
from wkv.speed.evidence import evidence
from wkv.training import head_loss

RESULT = Path(__file__).parent / "results" / "finetune_memory.json"
MODEL = {"vocab_size": 8192, "hidden_size": 768, "num_layers": 12, "head_size": 64}
QUICK_MODEL = {"vocab_size": 256, "hidden_size": 128, "num_layers": 2, "head_size": 64}
RANKS, QUICK_RANKS = {"lora": 32, "miss": 64, "bone-row": 64, "bone-col": 64}, {"lora": 4, "bone-row": 8}
REFERENCE, FULL = "lora", "full"
BAR = 1.10  # of the peak of bone-row, as a part of LoRA's
LENGTH, WARM_LENGTH = 512, 16


class Training:
    """A step on one row of random tokens.

    Args:
        model: random weights.
        parameters: what is trained.
    """

    def __init__(self, model: Any, parameters: list[nn.Parameter]) -> None:
        self.model, self.parameters = model, parameters
        self.optimizer = torch.optim.AdamW(parameters, lr=1e-4, weight_decay=0.0)

    def step(self, tokens: Tensor) -> None:
        """Forward, loss, backward, clip and update on tokens [1, T + 1]."""
        self.optimizer.zero_grad()
        hidden, _ = self.model.forward_features(tokens[:, :-1])
        head_loss(hidden, self.model.head, tokens[:, 1:], l2wrap=0).backward()
        torch.nn.utils.clip_grad_norm_(self.parameters, 1.0)
        self.optimizer.step()


def random_tokens(sizes: dict[str, int], length: int) -> Tensor:
    """Tokens [1, length + 1]."""
    return torch.randint(sizes["vocab_size"], (1, length + 1))


# ---- memory ----


def memory_kib(name: str) -> int:
    """VmRSS or VmHWM of this process."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line.split()[1] for line in lines if line.startswith(name)))


def peak(method: str, sizes: dict[str, int], ranks: dict[str, int], length: int) -> None:
    """Print, as JSON, what is resident after a small step and the peak of a step with `length` tokens."""
    import peft  # noqa: F401  what importing it takes is no property of LoRA

    model = wkv.create_model("rwkv7", **sizes).train()
    if method == FULL:
        parameters = list(model.parameters())
    else:
        parameters = list(tuning.create(method, model, rank=ranks[method]).named_parameters().values())
    training = Training(model, parameters)
    training.step(random_tokens(sizes, WARM_LENGTH))
    tokens, before = random_tokens(sizes, length), memory_kib("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # sets VmHWM back to VmRSS
    training.step(tokens)
    count = sum(parameter.numel() for parameter in parameters)
    print(json.dumps({"parameters": count, "before_kib": before, "peak_kib": memory_kib("VmHWM")}))


def memory(method: str, repeats: int, options: argparse.Namespace) -> dict[str, Any]:
    """`peak` in processes of its own: medians, and all peaks."""
    command = [sys.executable, __file__, "--peak", method, "--threads", str(options.threads)]
    command += ["--seed", str(options.seed), *["--quick"] * options.quick]
    runs = []
    for _ in range(repeats):
        runs.append(json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout))
    found = {key: round(statistics.median(run[key] for run in runs)) for key in runs[0]}
    found["added_kib"] = round(statistics.median(run["peak_kib"] - run["before_kib"] for run in runs))
    print(f"{method}: {found}", flush=True)
    return {**found, "all_peaks_kib": [run["peak_kib"] for run in runs]}


def with_ratios(rows: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Peaks, and what steps add, as parts of LoRA's."""
    base = rows[REFERENCE]
    ratios = {
        name: {f"{what}_ratio": round(row[f"{what}_kib"] / base[f"{what}_kib"], 4) for what in ("peak", "added")}
        for name, row in rows.items()
    }
    return {name: row | ratios[name] for name, row in rows.items()}


# ---- time ----


def speed(sizes: dict[str, int], ranks: dict[str, int], length: int, rounds: int) -> dict[str, dict[str, Any]]:
    """Method -> seconds of a step and the median over rounds of its ratio to LoRA's step in the same round."""
    model = wkv.create_model("rwkv7", **sizes).train()
    adapters = {method: tuning.create(method, model, name=method, rank=rank) for method, rank in ranks.items()}
    trainings = {name: Training(model, list(each.named_parameters().values())) for name, each in adapters.items()}
    tokens, names = random_tokens(sizes, length), list(ranks)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for number in range(rounds + 1):
        turn = number % len(names)
        for name in names[turn:] + names[:turn]:
            adapters[name].activate()
            start = time.perf_counter()
            trainings[name].step(tokens)
            if number:  # the first round warms up
                seconds[name].append(time.perf_counter() - start)
        print(f"round {number} of {rounds}", flush=True)
    return {name: summary(own, seconds[REFERENCE]) for name, own in seconds.items()}


def summary(own: list[float], reference: list[float]) -> dict[str, Any]:
    """Of one method."""
    ratios = [a / b for a, b in zip(own, reference, strict=True)]
    return {
        "seconds": round(statistics.median(own), 3),
        "ratio": round(statistics.median(ratios), 3),
        "ratio_range": [round(min(ratios), 3), round(max(ratios), 3)],
        "ratio_of_medians": round(statistics.median(own) / statistics.median(reference), 3),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=RESULT, help="JSON file to write")
    parser.add_argument("--quick", action="store_true", help="a tiny model, nothing is written")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--peak", help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(options.seed)
    sizes, ranks = (QUICK_MODEL, QUICK_RANKS) if options.quick else (MODEL, RANKS)
    length, repeats, rounds = (64, 1, 1) if options.quick else (LENGTH, 2, 7)
    if options.peak:
        peak(options.peak, sizes, ranks, length)
        return
    rows = with_ratios({method: memory(method, repeats, options) for method in (*ranks, FULL)})
    counts = {method: rows[method]["parameters"] for method in ranks}
    if len(set(counts.values())) > 1:
        sys.exit(f"unequal numbers of parameters: {counts}")
    result = {
        **evidence(__file__, sys.argv[1:], ("torch", "peft")),
        "what": f"a training step of rwkv7 in float32, B = 1, T = {length}, with AdamW on what is trained",
        "seed": options.seed,
        "model": {"name": "rwkv7", **sizes},
        "ranks": ranks,
        "bar": {"peak_ratio": BAR, "met": rows["bone-row"]["peak_ratio"] <= BAR},
        "memory": rows,
        "speed": {"rounds": rounds, **speed(sizes, ranks, length, rounds)},
    }
    print(json.dumps({key: result[key] for key in ("bar", "memory", "speed")}, indent=1))
    if not options.quick:
        with replacing([options.out]) as [temporary]:
            temporary.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
