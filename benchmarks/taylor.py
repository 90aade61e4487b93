"""Forward + backward of taylor_attention on this CPU: its backends, and torch's causal softmax attention beside them.

    python benchmarks/taylor.py [--lengths 512 2048 8192] [--rounds 5] [--threads 1] [--output FILE]

The contenders alternate in one process; medians count, and ratios are medians of the ratios of each round. The softmax
attention has queries and keys of the values' size, as in a transformer of equal width.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from wkv import ops
from wkv.speed.evidence import evidence

ROOT = Path(__file__).resolve().parent.parent
B, H, F, N = 1, 12, 16, 64
SEED = 0
REFERENCE_TOKENS = 512  # of 2048 tokens it takes most of a minute: autograd keeps the state of every one

Call = Callable[[], tuple[Tensor, list[Tensor], Tensor]]  # runs a forward pass: y, inputs, the gradient of y


def ours(backend: str, length: int) -> Call:
    q, k = (torch.randn(B, length, H, F, requires_grad=True) for _ in range(2))
    v, dy = torch.randn(B, length, H, N, requires_grad=True), torch.randn(B, length, H, N)

    def call() -> tuple[Tensor, list[Tensor], Tensor]:
        with ops.use_backend(backend):
            return ops.taylor_attention(q, k, v)[0], [q, k, v], dy

    return call


def softmax(length: int) -> Call:
    q, k, v = (torch.randn(B, H, length, N, requires_grad=True) for _ in range(3))
    dy = torch.randn(B, H, length, N)
    return lambda: (scaled_dot_product_attention(q, k, v, is_causal=True), [q, k, v], dy)


def seconds(call: Call) -> tuple[float, float]:
    """Of a forward pass, and of the backward pass behind it."""
    start = time.perf_counter()
    y, inputs, dy = call()
    middle = time.perf_counter()
    torch.autograd.grad(y, inputs, dy)
    return middle - start, time.perf_counter() - middle


def measure(length: int, rounds: int) -> dict[str, Any]:
    torch.manual_seed(SEED)
    calls = {name: ours(name, length) for name in ("chunked", "native")} | {"softmax": softmax(length)}
    if length <= REFERENCE_TOKENS:
        calls["reference"] = ours("reference", length)
    for call in calls.values():
        seconds(call)
    runs = [{name: seconds(call) for name, call in calls.items()} for _ in range(rounds)]
    return {
        "length": length,
        "milliseconds": {
            name: {
                "forward": 1e3 * statistics.median(run[name][0] for run in runs),
                "backward": 1e3 * statistics.median(run[name][1] for run in runs),
                "both": 1e3 * statistics.median(sum(run[name]) for run in runs),
            }
            for name in calls
        },
        "time_beside_native": {
            name: statistics.median(sum(run[name]) / sum(run["native"]) for run in runs) for name in calls
        },
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", type=int, nargs="+", default=[512, 2048, 8192])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks/results/taylor.json")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    report = {
        **evidence(__file__, sys.argv[1:]),
        "seed": SEED,
        "shape": {"B": B, "H": H, "F": F, "N": N, "dtype": "float32"},
        "rounds": options.rounds,
        "results": [measure(length, options.rounds) for length in options.lengths],
    }
    temporary = options.output.with_suffix(".tmp")
    temporary.write_text(json.dumps(report, indent=2) + "\n")
    os.replace(temporary, options.output)
    for result in report["results"]:
        times = ", ".join(f"{name} {ms['both']:.0f} ms" for name, ms in result["milliseconds"].items())
        print(f"T={result['length']}: {times}")


if __name__ == "__main__":
    main()
