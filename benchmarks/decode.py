"""Time and memory per generated token after contexts of different lengths: they should not grow.

    python benchmarks/decode.py

One long random text is read in segments; the state is kept at every context length. Then single tokens are decoded from
each kept state in turn, in rounds and in changing order, so that a drift of the machine's speed hits all lengths
equally. Reported: the median over rounds of a round's median time per token, its ratio to the shortest context (paired
within rounds), and the memory of the process. Bar: flat within 5 percent.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import torch

import wkv
from wkv.layers.language_model import LanguageModel
from wkv.speed.evidence import evidence
from wkv.state import State

ROOT = Path(__file__).resolve().parent.parent


def main() -> None:
    """Run and write the result."""
    options = parse()
    if options.threads:
        torch.set_num_threads(options.threads)
    torch.manual_seed(options.seed)
    model = build(options)
    memory_before = process_memory()
    with torch.inference_mode():
        states, reading = read_contexts(model, options)
        rounds = time_rounds(model, states, options)
    result = {
        "what": "decode: milliseconds per token and process memory by context length",
        "model": {"name": model.name, **model.config.to_dict(), "parameters": model.num_parameters},
        "contexts": summary(rounds, reading, options.contexts),
        "state_bytes": states[options.contexts[0]].num_bytes,
        "memory_before_reading_mib": memory_before,
        "flat_within_5_percent": all(abs(ratio - 1) <= 0.05 for ratio in ratios(rounds, options.contexts).values()),
        "rounds": options.rounds,
        "tokens_per_round": options.tokens,
        "seed": options.seed,
        **evidence(__file__, sys.argv[1:]),
    }
    write(options.out, result)
    for context, row in result["contexts"].items():
        speed = f"{row['ms_per_token']:.2f} ms, ratio {row['ratio']:.3f}"
        print(f"{context:>8} tokens of context: {speed}, {row['mib']:.0f} MiB")


def parse() -> argparse.Namespace:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="rwkv7")
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--width", type=int, default=768)
    parser.add_argument("--vocab", type=int, default=1024, help="small, so that the layers are what is timed")
    parser.add_argument("--contexts", type=int, nargs="+", default=[1_000, 10_000, 100_000])
    parser.add_argument("--tokens", type=int, default=64, help="decoded per round and context")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--segment", type=int, default=512, help="prompt tokens read at a time")
    parser.add_argument("--threads", type=int, default=0, help="0: torch's default")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results" / "decode.json")
    options = parser.parse_args()
    options.contexts.sort()
    return options


def build(options: argparse.Namespace) -> LanguageModel:
    """A model of the asked shape; matrices that start at zero get small values, as if it were trained."""
    model = wkv.create_model(
        options.model, vocab_size=options.vocab, hidden_size=options.width, num_layers=options.layers
    )
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.squeeze().ndim == 2:
                parameter.add_(torch.randn_like(parameter), alpha=0.01)
    return model.eval()


def read_contexts(
    model: LanguageModel, options: argparse.Namespace
) -> tuple[dict[int, State], dict[int, dict[str, float]]]:
    """Read one random text up to the longest context; the state, time and memory at every length."""
    text = torch.randint(options.vocab, (1, options.contexts[-1]))
    states: dict[int, State] = {}
    reading: dict[int, dict[str, float]] = {}
    state, place, started = None, 0, time.perf_counter()
    for context in options.contexts:
        while place < context:
            end = min(place + options.segment, context)
            state = model.forward_features(text[:, place:end], state)[1]
            place = end
        assert state is not None
        states[context] = state
        reading[context] = {"seconds": time.perf_counter() - started, "mib": process_memory()}
        print(f"read {context:,} tokens in {reading[context]['seconds']:.1f} s", file=sys.stderr)
    return states, reading


def time_rounds(
    model: LanguageModel, states: dict[int, State], options: argparse.Namespace
) -> list[dict[int, dict[str, float]]]:
    """Per round and context: median milliseconds per token, and the memory of the process."""
    contexts = list(states)
    decode(model, states[contexts[0]], options.tokens)  # warm up
    rounds = []
    for number in range(options.rounds):
        shift = number % len(contexts)
        order = contexts[shift:] + contexts[:shift]
        rounds.append({context: decode(model, states[context], options.tokens) for context in order})
    return rounds


def decode(model: LanguageModel, state: State, count: int) -> dict[str, float]:
    """Decode greedily, one token at a time."""
    token = torch.zeros(1, 1, dtype=torch.long)
    times = []
    for _ in range(count):
        started = time.perf_counter()
        logits, state = model(token, state)
        token = logits[:, -1].argmax(-1, keepdim=True)
        times.append(time.perf_counter() - started)
    return {"ms": statistics.median(times) * 1e3, "mib": process_memory()}


def ratios(rounds: list[dict[int, dict[str, float]]], contexts: list[int]) -> dict[int, float]:
    """Median over rounds of the time per token relative to the shortest context in the same round."""
    return {
        context: statistics.median(row[context]["ms"] / row[contexts[0]]["ms"] for row in rounds)
        for context in contexts
    }


def summary(
    rounds: list[dict[int, dict[str, float]]], reading: dict[int, dict[str, float]], contexts: list[int]
) -> dict[int, dict[str, Any]]:
    """What is reported for each context length."""
    relative = ratios(rounds, contexts)
    return {
        context: {
            "ms_per_token": statistics.median(row[context]["ms"] for row in rounds),
            "ms_per_token_by_round": [round(row[context]["ms"], 4) for row in rounds],
            "ratio": relative[context],
            "mib": statistics.median(row[context]["mib"] for row in rounds),
            "mib_after_reading": reading[context]["mib"],
            "seconds_to_read": reading[context]["seconds"],
        }
        for context in contexts
    }


def process_memory() -> float:
    """Resident memory of this process in MiB (Linux)."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20


def write(path: Path, result: dict[str, Any]) -> None:
    """JSON, all of it or nothing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(result, indent=2) + "\n")
    os.replace(temporary, path)


if __name__ == "__main__":
    main()
