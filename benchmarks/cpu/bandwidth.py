"""How fast this machine reads memory: the limit of decoding.

    python benchmarks/cpu/bandwidth.py --threads 1,2

A buffer of at least 512 MiB, and 8 times the last-level cache, is added up with the widest vectors there are; best and
median of the passes, in pages of 2 MiB and in pages of the usual size.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from statistics import median

from wkv.cli.bench import check_native, make_settings
from wkv.speed.bandwidth import buffer, read_seconds
from wkv.speed.report import hardware


def main() -> None:
    """Measure and print JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", default="1,2")
    parser.add_argument("--passes", type=int, default=9)
    parser.add_argument("--megabytes", type=int, default=None)
    parser.add_argument("--native", type=Path, default=None, help="a build of the native library")
    options = parser.parse_args()
    check_native(options.native)
    size = options.megabytes * 10**6 if options.megabytes else None
    buffers = {"huge_pages": buffer(size, huge_pages=True), "usual_pages": buffer(size)}
    found: dict[int, dict[str, float]] = {}
    for threads in make_settings(options.threads, 1, False, 0, None).threads:
        found[threads] = {}
        for name, memory in buffers.items():
            times = read_seconds(memory, threads, options.passes)
            found[threads][f"{name}_best_gb_per_second"] = round(memory.numel() / min(times) / 1e9, 2)
            found[threads][f"{name}_median_gb_per_second"] = round(memory.numel() / median(times) / 1e9, 2)
    size = buffers["usual_pages"].numel()
    print(json.dumps({"buffer_bytes": size, "threads": found, "hardware": hardware()}, indent=1))


if __name__ == "__main__":
    main()
