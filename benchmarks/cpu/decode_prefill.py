"""Decoding and prefill of RWKV-7 on the CPU: wkv, the rwkv package and llama.cpp in alternating turns.

    pip install llama-cpp-python rwkv==0.8.32 matplotlib
    python benchmarks/cpu/decode_prefill.py --cache /some/folder

The same as `wkv bench`, with both shapes and the result kept in `results/`. Each contender runs in a process of its own
and waits while it is not its turn. In every round all decode (at least 20 tokens and 1.2 s), then all read a prompt of
512 tokens, with one number of threads after the other; another contender begins each round. Reported are medians over
rounds; ratios are taken within a round first. The read bandwidth is measured in the same rounds.
"""

from __future__ import annotations

import argparse
import shlex
import sys
import tempfile
from contextlib import ExitStack
from pathlib import Path

from rich.console import Console

from wkv.cli.bench import check_native, check_out, draw, find_models, make_settings, run, show
from wkv.speed.contenders import chosen
from wkv.speed.evidence import commit

ROOT = Path(__file__).resolve().parents[2]
FOLDER = Path(__file__).resolve().parent / "results"


def main() -> None:
    """Run and write JSON, Markdown and PNG; exit status 130 after Ctrl-C, with what was measured."""
    options = parse()
    console = Console(soft_wrap=True)
    check_native(options.native)
    options.out.parent.mkdir(exist_ok=True)
    check_out(options.out)
    settings = make_settings(options.threads, options.rounds, options.quick, options.seed, options.native)
    contenders, skipped = chosen(options.peers)
    wanted = options.contenders.split(",") if options.contenders else [c.name for c in contenders]
    contenders = [c for c in contenders if c.name in wanted]
    for name, reason in skipped.items():
        console.print(f"{name}: skipped, {reason}", highlight=False, markup=False)
    facts = {"command": command(options), "commit": commit(__file__), "skipped": skipped}
    with ExitStack() as stack:
        folder = options.cache or Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="wkv-bench-")))
        models = find_models(None, options.shape, folder, options.seed)
        result = run(console, models, contenders, settings, options.out, facts)
    show(console, result)
    draw(console, result, options.out)
    sys.exit(0 if result["complete"] else 130)


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="0.1b,0.4b", help="some of 0.1b, 0.4b, tiny")
    parser.add_argument("--peers", default="auto", help="auto, none, or some of llama.cpp,rwkv")
    parser.add_argument("--contenders", default=None, help="only these, names with commas between")
    parser.add_argument("--threads", default="1,2")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--quick", action="store_true", help="two short rounds")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--cache", type=Path, default=None, help="keeps the weights for the next time")
    parser.add_argument("--native", type=Path, default=None, help="a build of the native library")
    parser.add_argument("--out", type=Path, default=FOLDER / "decode_prefill.json")
    return parser.parse_args()


def command(options: argparse.Namespace) -> str:
    """What was run, without the folders of this machine."""
    given = {name: getattr(options, name) for name in ("shape", "peers", "threads", "rounds", "seed")}
    words = [word for name, value in given.items() for word in (f"--{name}", str(value))]
    words += ["--contenders", options.contenders] if options.contenders else []
    return shlex.join(["python", "benchmarks/cpu/decode_prefill.py", *words, *(["--quick"] if options.quick else [])])


if __name__ == "__main__":
    main()
