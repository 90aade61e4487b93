"""Chunked WKV-7 against the reference, forward + backward, in alternating runs of one process; writes JSON.

python benchmarks/wkv7_chunked_vs_reference.py [--out FILE] [--pairs N] [--threads N]
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
from torch.nn.functional import normalize

from wkv.ops import use_backend, wkv7
from wkv.speed.evidence import evidence

RESULT = Path(__file__).parent / "results" / "wkv7_chunked_vs_reference.json"
SHAPES = {
    "B4 T512 H4": (4, 512, 4, 64),
    "demo": (8, 128, 3, 64),
    "long": (1, 4096, 12, 64),
}
BACKENDS = ("reference", "chunked")


def inputs(shape: tuple[int, ...], seed: int) -> tuple[list[Tensor], Tensor]:
    """Leaves (r, log_w, k, v, a, b) as a trained RWKV-7 makes them, and a gradient for y."""
    generator = torch.Generator().manual_seed(seed)
    r, q, k, v, kk, iclr, dy = (torch.randn(shape, generator=generator) for _ in range(7))
    log_w, kk = -0.60653 * torch.sigmoid(q), normalize(kk, dim=-1)
    leaves = [r, log_w, k, v, -kk, kk * torch.sigmoid(iclr)]
    return [x.requires_grad_() for x in leaves], dy


def seconds(run: Callable[[], object]) -> float:
    """Wall-clock time of one call."""
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def measure(shape: tuple[int, ...], pairs: int, seed: int) -> dict[str, Any]:
    """Alternating times of both backends in ms, ratio of every pair, median ratio, and how far the gradients differ."""
    leaves, dy = inputs(shape, seed)

    def step() -> tuple[Tensor, ...]:
        y, _ = wkv7(*leaves)
        return torch.autograd.grad(y, leaves, dy)

    times: dict[str, list[float]] = {name: [] for name in BACKENDS}
    gradients = {}
    for name in BACKENDS:
        with use_backend(name):
            step()
            gradients[name] = step()
    for _ in range(pairs):
        for name in BACKENDS:
            with use_backend(name):
                times[name].append(seconds(step) * 1e3)
    ratios = [a / b for a, b in zip(times["reference"], times["chunked"], strict=True)]
    with torch.no_grad():
        forward = statistics.median(seconds(lambda: wkv7(*leaves)) * 1e3 for _ in range(pairs))
    errors = [((x - y).abs().max() / y.abs().max()).item() for x, y in zip(*reversed(gradients.values()), strict=True)]
    return {
        "shape_BTHN": shape,
        "milliseconds": {name: [round(t, 3) for t in values] for name, values in times.items()},
        "median_milliseconds": {name: round(statistics.median(values), 3) for name, values in times.items()},
        "median_milliseconds_chunked_forward_without_grad": round(forward, 3),
        "ratios": [round(x, 2) for x in ratios],
        "median_ratio": round(statistics.median(ratios), 2),
        "largest_gradient_difference_over_maximum": max(errors),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=RESULT, help="JSON file to write")
    parser.add_argument("--pairs", type=int, default=5, help="alternating pairs per shape")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    result = {
        **evidence(__file__, sys.argv[1:]),
        "what": "forward + backward of every input from dy, float32",
        "seed": options.seed,
        "runs": {name: measure(shape, options.pairs, options.seed) for name, shape in SHAPES.items()},
    }
    options.out.parent.mkdir(parents=True, exist_ok=True)
    temporary = options.out.with_suffix(".tmp")
    temporary.write_text(json.dumps(result, indent=2) + "\n")
    os.replace(temporary, options.out)
    for name, run in result["runs"].items():
        print(f"{name} {run['shape_BTHN']}: {run['median_milliseconds']} ms, median ratio {run['median_ratio']}")


if __name__ == "__main__":
    main()
