"""Where the time of decoding and prefill goes, by function of the native library, with one thread.

    python benchmarks/cpu/where_time_goes.py --cache /some/folder    # the folder of decode_prefill.py

Linux's `perf` (Debian: linux-perf) looks 2000 times a second which function runs. Shares are of the time in the
library, which is nearly all of it once the model is loaded.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

from wkv.speed.contenders import CONTENDERS
from wkv.speed.evidence import evidence
from wkv.speed.files import shape_weights

HERE = Path(__file__).resolve()
WEIGHTS = ("wkv fp32", "wkv bf16", "wkv int8", "wkv int4")
PROMPT, SECONDS = 512, 8.0


def work(path: str, phase: str) -> None:
    """Decode or read prompts for some seconds; this runs under perf."""
    import torch

    import wkv
    from wkv.inference.huge_pages import use_huge_pages
    from wkv.inference.native_rwkv7 import NativeRWKV7

    torch.set_num_threads(1)
    model = wkv.load_model(path)
    use_huge_pages(model)
    run, state, started = NativeRWKV7(model), None, time.perf_counter()
    tokens = torch.randint(model.config.vocab_size, (1, PROMPT), generator=torch.Generator().manual_seed(0))
    count = 0
    while time.perf_counter() - started < SECONDS:
        if phase == "prefill":
            run.read(tokens)
        else:
            _, state = run.read(tokens[:, count % PROMPT, None], state, inplace=True)
        count += 1


def shares(path: Path, phase: str, folder: Path) -> dict[str, float]:
    """Function -> share of the samples in the native library."""
    data = folder / "perf.data"
    child = [sys.executable, str(HERE), "--work", str(path), "--phase", phase]
    subprocess.run(["perf", "record", "-q", "-e", "cpu-clock", "-F", "2000", "-o", str(data), "--", *child], check=True)
    report = ["perf", "report", "-i", str(data), "--stdio", "--no-children", "-g", "none", "-F", "sample,dso,symbol"]
    lines = subprocess.run(report, capture_output=True, text=True, check=True).stdout.splitlines()
    samples: Counter[str] = Counter()
    for line in lines:
        if found := re.match(r"\s*(\d+)\s+libwkv_native\S*\s+\[\.\]\s+(.*)", line):
            samples[short(found[2])] += int(found[1])
    total = sum(samples.values())
    return {name: round(count / total, 4) for name, count in samples.most_common() if count / total >= 0.002}


def short(symbol: str) -> str:
    """A function's name without namespaces, return type and arguments."""
    plain = re.sub(r"\(anonymous namespace\)::|wkv::(\w+::)?", "", symbol)
    return plain.split("(")[0].removeprefix("void ").strip()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="0.1b")
    parser.add_argument("--cache", type=Path, default=None, help="keeps the weights for the next time")
    parser.add_argument("--out", type=Path, default=HERE.parent / "results" / "where_time_goes.json")
    parser.add_argument("--work", default=None, help=argparse.SUPPRESS)
    parser.add_argument("--phase", default="decode", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.work:
        return work(options.work, options.phase)
    if shutil.which("perf") is None:
        sys.exit("perf is not installed (Debian: apt-get install linux-perf)")
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as temporary:
        weights = shape_weights(options.shape, options.cache or Path(temporary), 0)
        paths = {c.name: weights.path(c) for c in CONTENDERS if c.name in WEIGHTS}
        weights.forget()
        for name, path in paths.items():
            found[name] = {phase: shares(path, phase, Path(temporary)) for phase in ("decode", "prefill")}
            for phase, table in found[name].items():
                print(f"{name}, {phase}: " + ", ".join(f"{key} {value:.1%}" for key, value in list(table.items())[:6]))
    result = {"what": "share of the native library's time by function, one thread",
              **evidence(__file__, sys.argv[1:]), "shares": found}  # fmt: skip
    options.out.write_text(json.dumps(result, indent=1) + "\n")
    return None


if __name__ == "__main__":
    main()
