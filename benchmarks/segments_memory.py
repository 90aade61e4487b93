"""Peak memory of training in segments against the length of the sequence, and of head_loss; writes JSON.

python benchmarks/segments_memory.py [--out FILE] [--quick]

Every number comes from a process of its own (Linux: VmHWM of /proc/self/status). "Added" is what a call added to the
process as it was after a call on a few tokens.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch

import wkv
from wkv.speed.evidence import evidence
from wkv.training.head_loss import head_loss
from wkv.training.losses import next_token_loss
from wkv.training.segments import segmented_backward

RESULT = Path(__file__).parent / "results" / "segments_memory.json"
MODEL = {"vocab_size": 256, "hidden_size": 128, "num_layers": 3, "head_size": 64}
SEGMENT = 512
LENGTHS, QUICK_LENGTHS = (8192, 65536), (1024, 4096)
VOCABULARY, POSITIONS, HIDDEN = 65536, 2048, 64


def peak_kib() -> int:
    """Largest resident memory of this process so far."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line.split()[1] for line in lines if line.startswith("VmHWM")))


def train(mode: str, length: int) -> None:
    """Gradients of one sequence; "whole" is one segment."""
    model = wkv.create_model("rwkv7", **MODEL)
    tokens = torch.randint(MODEL["vocab_size"], (1, length + 1))

    def call(end: int, segment: int) -> None:
        mode_here = "truncated" if mode == "whole" else mode
        segmented_backward(model, tokens[:, :end], tokens[:, 1 : end + 1], segment=segment, mode=mode_here)

    call(8, 4)
    report(lambda: call(length, length if mode == "whole" else SEGMENT))


def score(form: str, length: int) -> None:
    """Loss and gradients of a head over the World vocabulary."""
    head = torch.nn.Linear(HIDDEN, VOCABULARY, bias=False)
    hidden = torch.randn(1, length, HIDDEN, requires_grad=True)
    targets = torch.randint(VOCABULARY, (1, length))

    def call(end: int) -> None:
        part, wanted = hidden[:, :end], targets[:, :end]
        loss = head_loss(part, head, wanted) if form == "head_loss" else next_token_loss(head(part), wanted)
        loss.backward()

    call(2)
    report(lambda: call(length))


def report(call: Any) -> None:
    """Print the memory before and after, and the seconds in between."""
    before, start = peak_kib(), time.perf_counter()
    call()
    print(json.dumps({"before_kib": before, "peak_kib": peak_kib(), "seconds": round(time.perf_counter() - start, 2)}))


def measure(part: str, form: str, length: int, options: argparse.Namespace) -> dict[str, Any]:
    """One run in a process of its own."""
    command = [sys.executable, __file__, "--run", part, form, str(length)]
    command += ["--threads", str(options.threads), "--seed", str(options.seed)]
    output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    run: dict[str, Any] = json.loads(output)
    run["added_kib"] = run["peak_kib"] - run["before_kib"]
    print(f"{part} {form} {length}: peak {run['peak_kib']} KiB, added {run['added_kib']} KiB, {run['seconds']} s")
    return run


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=RESULT, help="JSON file to write")
    parser.add_argument("--quick", action="store_true", help="short sequences, nothing is written")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--run", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(options.seed)
    if options.run:
        part, form, length = options.run
        (train if part == "segments" else score)(form, int(length))
        return
    short, long = QUICK_LENGTHS if options.quick else LENGTHS
    cases = [("truncated", short), ("truncated", long), ("exact", short), ("exact", long), ("whole", short)]
    segments = [{"mode": m, "tokens": n, **measure("segments", m, n, options)} for m, n in cases]
    forms = ("head_loss", "next_token_loss")
    result = {
        **evidence(__file__, sys.argv[1:]),
        "what": "peak resident memory of one backward pass, float32, batch 1",
        "seed": options.seed,
        "model": {"name": "rwkv7", **MODEL},
        "segment": SEGMENT,
        "segments": segments,
        "peak_ratio_truncated_long_over_short": round(segments[1]["peak_kib"] / segments[0]["peak_kib"], 4),
        "head": {"vocab_size": VOCABULARY, "hidden_size": HIDDEN, "positions": POSITIONS}
        | {form: measure("head", form, POSITIONS, options) for form in forms},
    }
    if not options.quick:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        temporary = options.out.with_suffix(".tmp")
        temporary.write_text(json.dumps(result, indent=2) + "\n")
        os.replace(temporary, options.out)


if __name__ == "__main__":
    main()
