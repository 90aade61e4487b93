"""Training on the CPU: the operator's share of a step, speed beside other models, time against length.

    python benchmarks/cpu/training.py share
    python benchmarks/cpu/training.py peers [--peer rwkv7-hf|llama] [--precision fp32|bf16]
    python benchmarks/cpu/training.py slope
    python benchmarks/cpu/training.py plot

A step is forward, cross entropy, backward and torch's fused AdamW, on random tokens, without gradient checkpointing.
Results are written after every configuration; `--resume` goes on from there. `peers` needs `transformers` and
`rwkv7-hf` beside `wkv` in one environment; `plot` draws what `peers` found and needs matplotlib. `--quick` runs tiny
shapes in seconds and, without `--out`, writes nothing.
"""

from __future__ import annotations

import argparse
import gc
import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from training_contenders import PRECISIONS, Size, batch, largest_difference, llama, ours, rwkv7_hf
from training_measures import Row, Watch, pairs, share, slope_round, slope_summary

from wkv import native
from wkv.files import replacing
from wkv.speed.evidence import evidence
from wkv.training.loop import resolve_precision

ROOT = Path(__file__).resolve().parents[2]
RESULTS = Path(__file__).resolve().parent / "results"
PEERS = ("rwkv7-hf", "llama")
PACKAGES = ("torch", "transformers", "rwkv7-hf", "numpy")
SLOPE_BAR, HF_BAR = 1.05, 3.0
TINY, SMALL, BASE = Size(2, 128, 512), Size(6, 256, 4096), Size(12, 768, 8192)


@dataclass(frozen=True)
class Case:
    """One configuration.

    Args:
        size: of the model.
        rows, length: B and T.
        repeats: rounds or pairs.
        bar: what `share` must stay below, or the ratio of `peers` must reach; None where nothing was promised.
        peer: whom to compare with.
        precision: of the matrix products.
    """

    size: Size
    rows: int
    length: int
    repeats: int = 5
    bar: float | None = None
    peer: str = ""
    precision: str = "fp32"

    def name(self, threads: int) -> str:
        """The name of its result."""
        parts = (
            self.peer,
            self.size.name,
            f"B={self.rows} T={self.length}",
            self.precision,
            f"{threads} thread{'s' * (threads != 1)}",
        )
        return ", ".join(part for part in parts if part)


def share_cases(quick: bool) -> list[Case]:
    """Of `share`."""
    if quick:
        return [Case(TINY, 1, 64, 3)]
    large = Size(12, 768, 65536)
    return [Case(SMALL, 4, 512, bar=0.35), Case(BASE, 1, 512, bar=0.15), Case(large, 1, 512, bar=0.15)]


def peer_cases(quick: bool) -> list[Case]:
    """Of `peers`. The large model stops at T=4096: a step on 8192 tokens would take more than 20 GB."""
    if quick:
        hf = [Case(TINY, 2, 32, 3, peer="rwkv7-hf")]
        return [*hf, *(Case(TINY, 1024 // t, t, 3, None, "llama", p) for p in PRECISIONS for t in (128, 512, 1024))]
    hf = [Case(SMALL, rows, length, 5, HF_BAR, "rwkv7-hf") for rows, length in ((1, 128), (4, 128), (1, 512))]
    hf += [Case(BASE, rows, length, 3, HF_BAR, "rwkv7-hf") for rows, length in ((1, 128), (4, 128), (1, 512))]
    found = [llama_case(SMALL, t, 8192, 5, p) for p in PRECISIONS for t in (512, 1024, 2048, 4096, 8192)]
    found += [llama_case(BASE, t, 2048, 3, "fp32") for t in (512, 1024, 2048, 4096)]
    found += [llama_case(BASE, t, 2048, 3, "bf16") for t in (512, 4096)]
    return [*hf, *found]


def llama_case(size: Size, length: int, tokens: int, repeats: int, precision: str) -> Case:
    """About `tokens` tokens per step, at least one sequence."""
    bar = 1.0 if length >= 4096 else None
    return Case(size, max(1, tokens // length), length, repeats, bar, "llama", precision)


# ---- sub-commands ----


def run_share(options: argparse.Namespace) -> None:
    """Share of native WKV-7 forward + backward in a whole training step."""
    todo = [(case, threads) for case in share_cases(options.quick) for threads in options.threads or (1, 2)]
    result = Result("share", "WKV-7 forward + backward over a whole training step", options)

    def measure(case: Case, watch: Watch) -> Row:
        model = ours(case.size, options.seed)
        tokens = batch(case.size, case.rows, case.length, options.seed)
        row = share(model, case.size, tokens, options.repeats or case.repeats, watch)
        if case.bar is not None:
            row |= {"bar": case.bar, "met": max(row["alone"]["median"], row["profiler"]["share"]) < case.bar}
        return row

    run_cases(todo, result, measure)
    lines = []
    for name, row in result.rows.items():
        both = f"alone {row['alone']['median']:.1%}, profiler {row['profiler']['share']:.1%}"
        lines.append(f"{name}: {both}, step {row['step_seconds']['median']:.2f} s")
    print("\n".join(lines))


def run_peers(options: argparse.Namespace) -> None:
    """Whole-step tokens per second of our RWKV-7 and of a peer, in alternating turns."""
    cases = [case for case in peer_cases(options.quick) if options.peer in ("all", case.peer)]
    cases = [case for case in cases if options.precision in ("all", case.precision)]
    todo = [(case, threads) for case in cases for threads in options.threads or (torch.get_num_threads(),)]
    result = Result("peers", "tokens per second in training, ours over the peer's", options)
    result.head["default_precision_of_wkv_train"] = resolve_precision("auto")

    def measure(case: Case, watch: Watch) -> Row:
        tokens = batch(case.size, case.rows, case.length, options.seed)
        our = ours(case.size, options.seed)
        row: Row = {}
        if case.peer == "llama":
            peer = llama(case.size, our, options.seed)
        else:
            peer = rwkv7_hf(case.size, our)
            row = {"largest_relative_logit_difference": largest_difference(our, peer, tokens[:1, :32])}
        our.precision = peer.precision = case.precision
        row |= pairs(our, peer, tokens, options.repeats or case.repeats, watch)
        row |= {"rows": case.rows, "length": case.length, "size": case.size.name, "precision": case.precision}
        if case.bar is not None:
            row |= {"bar": case.bar, "met": row["ratio"]["median"] >= case.bar}
        return row

    run_cases(todo, result, measure)
    for name, row in result.rows.items():
        speeds = (f"{who} {x['tokens_per_second']['median']:,.0f}" for who, x in row["contenders"].items())
        ratio = row["ratio"]
        print(f"{name}: {', '.join(speeds)} tokens/s, {ratio['median']:.2f}x ({ratio['min']:.2f}-{ratio['max']:.2f})")


def run_slope(options: argparse.Namespace) -> None:
    """Time of a step against length, batch 1."""
    size, lengths = (TINY, (64, 128, 256, 512)) if options.quick else (SMALL, tuple(2**n for n in range(9, 15)))
    threads = (options.threads or [torch.get_num_threads()])[0]
    torch.set_num_threads(threads)
    result = Result(
        "slope", "seconds of a training step against T at B=1, log-log slope by least squares", options, threads=threads
    )
    result.head |= {"size": size.name, "bar": SLOPE_BAR, "precision": "fp32"}
    model = ours(size, options.seed)
    batches = {length: batch(size, 1, length, options.seed) for length in lengths}
    with display(1 + (options.repeats or 5)) as (watch, advance):
        for number in range(1 + (options.repeats or 5)):
            name = f"round {number}" if number else "warm-up"
            if name not in result.rows:
                tell = partial(say, watch, name)
                result.rows[name] = slope_round(model, batches, number, tell)
                result.write()
            advance()
    result.head |= slope_summary(list(result.rows.values()))
    result.head["met"] = result.head["slope"] <= SLOPE_BAR
    result.write()
    for length, seconds in result.head["seconds"].items():
        peak = result.head["peak_rss_mb"][length]
        print(f"T={length}: {seconds:.3f} s, {int(length) / seconds:,.0f} tokens/s, peak {peak:,.0f} MB")
    print(f"slope {result.head['slope']:.3f} (bar {SLOPE_BAR})")


def run_plot(options: argparse.Namespace) -> None:
    """Draw the result of `peers`."""
    from training_plot import draw

    source = options.source or RESULTS / "training_peers.json"
    draw(json.loads(source.read_text()), options.out or source.with_suffix(".png"))


# ---- running and writing ----


class Result:
    """What was found so far, and its file.

    Args:
        name: of the sub-command.
        what: one line for the reader of the file.
        options: `out`, `quick`, `resume` and `seed` count.
        more: what else all rows have in common.
    """

    def __init__(self, name: str, what: str, options: argparse.Namespace, **more: object) -> None:
        self.path: Path | None = options.out or (None if options.quick else RESULTS / f"training_{name}.json")
        self.head: Row = {
            "what": what,
            "quick": options.quick,
            "seed": options.seed,
            **more,
            **evidence(__file__, sys.argv[1:], PACKAGES),
        }
        self.rows: dict[str, Row] = {}
        if options.resume and self.path is not None and self.path.is_file():
            before = json.loads(self.path.read_text())
            for key in ("quick", "seed", "commit", "hardware", *more):
                if before.get(key) != self.head[key]:
                    found = f"{before.get(key)}, this run {self.head[key]}"
                    raise SystemExit(f"{self.path} cannot be resumed: its {key} is {found}; leave out --resume")
            self.rows = before["rows"]

    def write(self) -> None:
        """All at once, so that a file is never half written."""
        if self.path is None:
            return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with replacing([self.path]) as [temporary]:
            temporary.write_text(json.dumps({**self.head, "rows": self.rows}, indent=1) + "\n")


def run_cases(todo: list[tuple[Case, int]], result: Result, measure: Callable[[Case, Watch], Row]) -> None:
    """Measure what is not yet there, write after each."""
    with display(len(todo)) as (watch, advance):
        for case, threads in todo:
            name = case.name(threads)
            if name not in result.rows:
                torch.set_num_threads(threads)
                row = measure(case, partial(say, watch, name))
                result.rows[name] = {"threads": threads, **row}
                result.write()
                gc.collect()
            advance()


def say(watch: Watch, name: str, text: str) -> None:
    """What goes on within `name`."""
    watch(f"{name}: {text}")


@contextmanager
def display(total: int) -> Iterator[tuple[Watch, Callable[[], None]]]:
    """A progress bar: (say what is going on, one more is done)."""
    columns = (BarColumn(20), MofNCompleteColumn(), TimeElapsedColumn(), TextColumn("{task.description}"))
    with Progress(*columns, console=Console(stderr=True)) as progress:
        task = progress.add_task("", total=total)
        yield lambda text: progress.update(task, description=text), lambda: progress.advance(task)


def parse() -> argparse.Namespace:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    verbs = parser.add_subparsers(required=True, metavar="share|peers|slope|plot")
    for name, run in (("share", run_share), ("peers", run_peers), ("slope", run_slope)):
        verb = verbs.add_parser(name, help=run.__doc__)
        verb.set_defaults(run=run)
        verb.add_argument("--quick", action="store_true", help="tiny shapes, to see that it works")
        verb.add_argument("--resume", action="store_true", help="keep what the file already has")
        verb.add_argument("--out", type=Path, help="JSON to write; by default in results/")
        verb.add_argument("--native", type=Path, help="another build of the native library")
        verb.add_argument("--threads", type=int, nargs="+", help="by default 1 2 for share, else torch's default")
        verb.add_argument("--repeats", type=int, default=0, help="rounds or pairs; by default as many as committed")
        verb.add_argument("--seed", type=int, default=0)
        if name == "peers":
            verb.add_argument("--peer", choices=("all", *PEERS), default="all")
            verb.add_argument("--precision", choices=("all", *PRECISIONS), default="all")
    plot = verbs.add_parser("plot", help=run_plot.__doc__)
    plot.add_argument("source", type=Path, nargs="?", help="JSON of peers")
    plot.add_argument("--out", type=Path, help="PNG to write; by default beside the JSON")
    plot.set_defaults(run=run_plot, native=None)
    return parser.parse_args()


def main() -> None:
    """Run a sub-command."""
    options = parse()
    if options.native:
        native.load(options.native)
    if options.run is not run_plot and not native.available():
        raise SystemExit(
            f"this measures the native operators; name their library with --native: {native.unavailable()}"
        )
    options.run(options)


if __name__ == "__main__":
    main()
