"""Everything that needs a GPU, in one run of at most 8 minutes: are the kernels right, how fast are they, and what for?

    python benchmarks/gpu/run.py                               # all parts
    python benchmarks/gpu/run.py --parts limits operators      # some of them
    python benchmarks/gpu/run.py --quick [--device cpu]        # tiny shapes, to try the script

    limits     copy bandwidth and rate of bfloat16 products of this device
    checks     every Triton kernel against tests/golden and against float64, in parallel processes
    operators  ours, the `fla-core` package and plain torch in turns; the roofline of WKV-7, see gpu_operators.py
    decode     tokens per second with CUDA graphs and without, in bfloat16, 8 and 4 bits
    training   whole training steps with our kernel, with fla's plugged in, and in plain torch

Each part has a share of the time and leaves out what does not fit; batches are halved where memory is short. The
result, JSON and a Markdown table, is written after every measurement: an interruption keeps what was measured.
`fla-core` 0.6 is optional (pip install --no-deps fla-core==0.6.0 einops).
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import gpu_checks
import gpu_decode
import gpu_operators
import gpu_tables
import gpu_training
import torch
from gpu_operators import OPERATORS
from gpu_timing import Budget, Device, Row, Save, limits, reason_of

from wkv.cli.doctor import gpu_facts
from wkv.files import replacing
from wkv.ops import dispatch
from wkv.speed.evidence import evidence

HERE = Path(__file__).resolve().parent
PACKAGES = ("torch", "triton", "fla-core", "numpy")
# Seconds that are kept for a part; what the ones before it leave, and what parts left out would have had, is added.
SHARES = {"limits": 10, "checks": 150, "operators": 110, "decode": 90, "training": 100}


def main(arguments: Sequence[str] | None = None) -> Row:
    """Measure, print, write. Returns the result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--parts", nargs="+", choices=SHARES, default=list(SHARES))
    parser.add_argument("--operators", nargs="+", choices=OPERATORS, default=OPERATORS, help="of checks and operators")
    parser.add_argument("--backend", choices=dispatch.PRIORITY, default=None, help="what stands for us; the kernels")
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--seconds", type=float, default=460.0, help="for all parts together")
    parser.add_argument("--out", type=Path, default=None, help="of the JSON, the table lies beside it; quick: nothing")
    parser.add_argument("--worker", nargs=2, default=None, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("torch finds no GPU; --device cpu --quick tries the script without one")
    if options.device == "cpu" and not options.quick:
        parser.error("a CPU is measured by benchmarks/cpu; here it only tries the script, with --quick")
    device = Device(options.device, options.quick, options.backend)
    if options.worker:
        gpu_checks.worker(*options.worker, device, options.out)
        return {}
    given = sys.argv[1:] if arguments is None else list(arguments)
    out = options.out or (None if options.quick else HERE / "results/run.json")
    result = Result(out, device, given)
    measure(result, device, options.parts, options.operators, Budget(options.seconds))
    print(gpu_tables.markdown(result.content))
    return result.content


class Result:
    """The file of results.

    Args:
        path: of the JSON; None writes nothing.
        device: what is measured.
        arguments: the command line.
    """

    def __init__(self, path: Path | None, device: Device, arguments: Sequence[str]) -> None:
        self.path, self.began = path, time.monotonic()
        self.content: Row = {
            **evidence(__file__, arguments, PACKAGES),
            "gpu": gpu_facts() if device.is_gpu else None,
            "quick": device.quick,
            "parts": {},
        }
        if path is not None:
            path.parent.mkdir(parents=True, exist_ok=True)

    def save(self, part: str, found: Row) -> None:
        """Write all that is known."""
        self.content["parts"][part] = found
        self.content["seconds"] = round(time.monotonic() - self.began, 1)
        if self.path is not None:
            with replacing([self.path, self.path.with_suffix(".md")]) as [data, text]:
                data.write_text(json.dumps(self.content, indent=1) + "\n")
                text.write_text(gpu_tables.markdown(self.content))
        self.say(part, next(reversed(found), "nothing to do"))

    def say(self, part: str, text: str) -> None:
        """Progress."""
        print(f"[{time.monotonic() - self.began:6.1f} s] {part}: {text}", flush=True)


def measure(result: Result, device: Device, parts: Sequence[str], operators: Sequence[str], budget: Budget) -> None:
    """The parts, one after the other; one that fails does not keep the others from running."""
    chosen = [part for part in SHARES if part in parts]
    for place, part in enumerate(chosen):
        result.say(part, "begins")
        kept = sum(SHARES[later] for later in chosen[place + 1 :])
        found: Row = {}

        def save(rows: Row, part: str = part, found: Row = found) -> None:
            found.update(rows)
            result.save(part, found)

        try:
            known = result.content["parts"].get("limits")
            save(PARTS[part](device, budget.part(budget.left() - kept), known, operators, save))
        except Exception as error:  # whatever a part cannot do, others can
            result.save(part, {**found, "failed": {"failed": reason_of(error)}})
        device.clear()


def checks(device: Device, budget: Budget, known: Row | None, operators: Sequence[str], save: Save) -> Row:
    """See gpu_checks.py."""
    with_fla = True
    try:
        gpu_operators.fla("wkv7")
    except Exception:  # said where fla is measured
        with_fla = False
    return gpu_checks.measure(device, budget, operators, save, with_fla, Path(__file__))


PARTS: dict[str, Callable[..., Row]] = {
    "limits": lambda device, *others: limits(device),
    "checks": checks,
    "operators": gpu_operators.measure,
    "decode": lambda device, budget, known, operators, save: gpu_decode.measure(device, budget, known, save),
    "training": lambda device, budget, known, operators, save: gpu_training.measure(device, budget, save),
}


if __name__ == "__main__":
    main()
