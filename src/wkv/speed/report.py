"""What is made of the times: medians, ratios within rounds, shares of the read bandwidth, targets met or not."""

from __future__ import annotations

import os
import platform
from collections.abc import Iterable
from pathlib import Path
from statistics import median
from typing import Any

from wkv.speed.contenders import BEST_QUANTIZED, FLOOR_TARGETS, PAIRS, QUANTIZED_PEERS
from wkv.speed.rounds import Measured

GIGABYTE = 1e9
Row = dict[str, Any]
COLUMNS = ("decode ms/token", "tokens/s", "share of bandwidth", "in usual pages", "prefill tokens/s")


def summary(measured: Measured, prompt: int) -> dict[str, Any]:
    """The result for one model.

    Args:
        measured: at least one round of it.
        prompt: tokens read in prefill.
    """
    counts = list(measured.rounds[0]) if measured.rounds else []
    by_threads = {count: [row[count] for row in measured.rounds if count in row] for count in counts}
    return {
        "complete": measured.complete,
        "contenders": measured.facts,
        "failed": measured.failed,
        "threads": {count: _one_count(measured, rows, prompt) for count, rows in by_threads.items()},
        "raw_rounds": measured.rounds,
    }


def _one_count(measured: Measured, rows: list[Row], prompt: int) -> dict[str, Any]:
    """Everything about one number of threads."""
    rows = [row for row in rows if row["bandwidth"] is not None]
    bests = [row["bandwidth"]["best"] for row in rows]
    return {
        "bandwidth": {
            "gb_per_second": median(bests) / GIGABYTE if bests else None,
            "best_gb_per_second": max(bests, default=0) / GIGABYTE,
            **{
                f"{pages}_{which}_gb_per_second": median(row["bandwidth"][pages][which] for row in rows) / GIGABYTE
                for pages in ("huge_pages", "usual_pages")
                for which in ("best", "median")
                if rows
            },
            "buffer_bytes": rows[0]["bandwidth"]["bytes"] if rows else None,
        },
        "contenders": {name: _contender(name, facts, rows, prompt) for name, facts in measured.facts.items()},
        "pairs": [pair for phase in ("decode", "prefill") for pair in _pairs(rows, phase)],
        "floor_targets": _floor_targets(measured, rows),
    }


def _contender(name: str, facts: dict[str, Any], rows: list[Row], prompt: int) -> dict[str, Any]:
    """One line of the table."""
    found: dict[str, Any] = {}
    decoded = [row["decode"][name]["ms"] for row in rows if name in row["decode"]]
    if decoded:
        found["decode_ms"] = median(decoded)
        found["decode_tokens_per_second"] = 1e3 / found["decode_ms"]
        found["bandwidth_share"] = median(shares(name, facts["bytes_read"], rows))
        found["bandwidth_share_if_all_were_read"] = median(shares(name, facts["bytes_stored"], rows))
        usual = shares(name, facts["bytes_read"], rows, "usual_pages")
        found["share_of_bandwidth_in_usual_pages"] = median(usual)
    filled = [row["prefill"][name]["seconds"] for row in rows if name in row["prefill"]]
    if filled:
        found["prefill_tokens_per_second"] = prompt / median(filled)
    return found


def shares(name: str, size: int, rows: Iterable[Row], limit: str | None = None) -> list[float]:
    """By round: the time that reading `size` bytes takes at the bandwidth of that round, of the time of a token.

    Args:
        limit: "usual_pages" or "huge_pages" for the bandwidth in these; None for the higher one.
    """
    found = []
    for row in rows:
        if name in row["decode"]:
            bandwidth = row["bandwidth"] if limit is None else row["bandwidth"][limit]
            found.append(size / bandwidth["best"] / (row["decode"][name]["ms"] / 1e3))
    return found


def _pairs(rows: list[Row], phase: str) -> list[dict[str, Any]]:
    pairs = []
    for ours, peer, decode_target, prefill_target in PAIRS:
        if peer == BEST_QUANTIZED and phase == "decode":
            continue
        ratios = [ratio for row in rows if (ratio := _ratio(row[phase], ours, peer)) is not None]
        if not ratios:
            continue
        target = decode_target if phase == "decode" else prefill_target
        pair: dict[str, Any] = {
            "phase": phase, "ours": ours, "peer": peer, "times_faster": median(ratios),
            "min": min(ratios), "max": max(ratios), "rounds": len(ratios),
        }  # fmt: skip
        if target is not None:
            pair |= {"target": target, "met": pair["times_faster"] >= target}
        pairs.append(pair)
    return pairs


def _ratio(turns: dict[str, dict[str, Any]], ours: str, peer: str) -> float | None:
    """The peer's time over ours in one round; None where one is missing."""
    times = {name: float(turn["ms"] if "ms" in turn else turn["seconds"]) for name, turn in turns.items()}
    if peer == BEST_QUANTIZED:
        quantized = [times[name] for name in QUANTIZED_PEERS if name in times]
        if len(quantized) == len(QUANTIZED_PEERS):  # the best of some is no statement about the best of all
            times[peer] = min(quantized)
    return times[peer] / times[ours] if ours in times and peer in times else None


def _floor_targets(measured: Measured, rows: list[Row]) -> list[dict[str, Any]]:
    """Against both bandwidths: weights in a mapped file lie in pages of the usual size."""
    targets = []
    for name, target in FLOOR_TARGETS.items():
        size = measured.facts.get(name, {}).get("bytes_read", 0)
        for limit in ("usual_pages", "huge_pages"):
            if found := shares(name, size, rows, limit):
                share = median(found)
                row = {
                    "contender": name,
                    "limit": limit,
                    "bandwidth_share": share,
                    "min": min(found),
                    "max": max(found),
                }
                targets.append({**row, "target": target, "met": share >= target})
    return targets


# ---- text ----


def markdown(result: dict[str, Any]) -> str:
    """The tables of a result, as Markdown."""
    parts = []
    for name, shape in result["shapes"].items():
        for threads, found in shape["threads"].items():
            parts += _section(f"{name}, {threads} thread{'s' * (threads != '1')}", found)
    return "\n".join(parts) + "\n"


def _section(title: str, found: dict[str, Any]) -> list[str]:
    rate = found["bandwidth"]["gb_per_second"]
    usual = found["bandwidth"].get("usual_pages_best_gb_per_second", 0)
    text = f" (read bandwidth {rate:.1f} GB/s, in pages of the usual size {usual:.1f})"
    lines = [f"### {title}" + (text if rate else ""), ""]
    lines += [f"| {' | '.join(['', *COLUMNS])} |", "|---|---|---|---|---|---|"]
    lines += [f"| {' | '.join(cells)} |" for cells in contender_rows(found)]
    if found["pairs"]:
        lines += ["", "| ours | peer | | times faster | range | target |", "|---|---|---|---|---|---|"]
        lines += [f"| {' | '.join(cells)} |" for cells in pair_rows(found)]
    return [*lines, ""]


def contender_rows(found: dict[str, Any]) -> list[list[str]]:
    """Cells: name, milliseconds, tokens per second, shares, prefill."""
    names = {
        "decode_ms": "{:.2f}", "decode_tokens_per_second": "{:.1f}", "bandwidth_share": "{:.0%}",
        "share_of_bandwidth_in_usual_pages": "{:.0%}",
        "prefill_tokens_per_second": "{:.0f}",
    }  # fmt: skip
    return [
        [name, *(text.format(row[key]) if key in row else "" for key, text in names.items())]
        for name, row in found["contenders"].items()
    ]


def pair_rows(found: dict[str, Any]) -> list[list[str]]:
    """Cells: ours, the peer, what, ratio, its range, target."""
    rows = []
    for pair in found["pairs"]:
        target = f"{pair['target']} ({'met' if pair['met'] else 'missed'})" if "target" in pair else ""
        span = f"{pair['min']:.2f} to {pair['max']:.2f}"
        rows.append([pair["ours"], pair["peer"], pair["phase"], f"{pair['times_faster']:.2f}", span, target])
    for floor in found["floor_targets"]:
        target = f"{floor['target']:.0%} ({'met' if floor['met'] else 'missed'})"
        span = f"{floor['min']:.0%} to {floor['max']:.0%}"
        limit = f"bandwidth, {floor['limit'].replace('_', ' ')}"
        rows.append([floor["contender"], limit, "decode", f"{floor['bandwidth_share']:.0%}", span, target])
    return rows


def hardware() -> dict[str, Any]:
    """The machine, as far as it can be told."""
    from wkv import native
    from wkv.speed.bandwidth import last_level_cache

    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    models = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return {
        "cpu": models[0] if models else platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "last_level_cache_bytes": last_level_cache(),
        "instruction_set": native.instruction_set() if native.available() else None,
        "system": f"{platform.system()} {platform.machine()}",
        "load_average": list(os.getloadavg()) if hasattr(os, "getloadavg") else None,
    }
