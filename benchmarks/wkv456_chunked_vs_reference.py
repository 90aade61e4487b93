"""Forward + backward of wkv4, wkv5 and wkv6: the chunked form against the token-by-token reference, on this CPU.

    python benchmarks/wkv456_chunked_vs_reference.py [--pairs 7] [--threads 2] [--output FILE]

Both forms alternate in one process; the ratio of every pair is taken, and the median is what counts.
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

from wkv import ops
from wkv.speed.evidence import evidence

ROOT = Path(__file__).resolve().parent.parent
B, T, H, N, C = 4, 512, 4, 64, 256
SEED = 0


def arguments(operator: str) -> tuple[list[Tensor], Tensor]:
    """Random inputs with gradients, decays as in trained models, and the gradient of y."""
    torch.manual_seed(SEED)
    if operator == "wkv4":
        inputs = [-torch.exp(torch.randn(C) - 2), torch.randn(C), torch.randn(B, T, C), torch.randn(B, T, C)]
        return [x.requires_grad_() for x in inputs], torch.randn(B, T, C)
    r, k, v, dy = torch.randn(4, B, T, H, N).unbind()
    log_w = -torch.exp(torch.randn(*((H, N) if operator == "wkv5" else (B, T, H, N))) - 2)
    return [x.requires_grad_() for x in (r, log_w, k, v, torch.randn(H, N))], dy


def seconds(function: Callable[..., Any], inputs: list[Tensor], dy: Tensor, backend: str) -> tuple[float, float]:
    """Wall-clock and processor seconds of one forward and backward."""
    wall, processor = time.perf_counter(), time.process_time()
    with ops.use_backend(backend):
        y, _ = function(*inputs)
    torch.autograd.grad(y, inputs, dy)
    return time.perf_counter() - wall, time.process_time() - processor


def measure(operator: str, pairs: int) -> dict[str, Any]:
    function, (inputs, dy) = getattr(ops, operator), arguments(operator)
    for backend in ("chunked", "reference"):
        seconds(function, inputs, dy, backend)
    runs = [{name: seconds(function, inputs, dy, name) for name in ("chunked", "reference")} for _ in range(pairs)]
    wall = [run["reference"][0] / run["chunked"][0] for run in runs]
    processor = [run["reference"][1] / run["chunked"][1] for run in runs]
    return {
        "operator": operator,
        "shape": {"B": B, "T": T, "C": C} if operator == "wkv4" else {"B": B, "T": T, "H": H, "N": N},
        "dtype": "float32",
        "median_chunked_seconds": statistics.median(run["chunked"][0] for run in runs),
        "median_reference_seconds": statistics.median(run["reference"][0] for run in runs),
        "ratios": wall,
        "median_ratio": statistics.median(wall),
        "median_ratio_of_processor_time": statistics.median(processor),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=7)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="default: all cores")
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks/results/wkv456_chunked_vs_reference.json")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    report = {
        **evidence(__file__, sys.argv[1:]),
        "seed": SEED,
        "results": [measure(operator, options.pairs) for operator in ("wkv4", "wkv5", "wkv6")],
    }
    temporary = options.output.with_suffix(".tmp")
    temporary.write_text(json.dumps(report, indent=2) + "\n")
    os.replace(temporary, options.output)
    for result in report["results"]:
        print(f"{result['operator']}: {result['median_ratio']:.1f} times faster than the reference")


if __name__ == "__main__":
    main()
