"""The result of run.py as Markdown."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

Row = dict[str, Any]


def markdown(result: Row) -> str:
    """All parts that were measured."""
    gpu = result.get("gpu") or {}
    where = ", ".join(str(gpu[key]) for key in ("name", "runtime") if key in gpu) or "CPU, no GPU"
    commit = result.get("commit") or "unknown"
    commit = commit[:12] + ("+" if commit.endswith("+") else "")
    lines = [f"# GPU benchmark: {where}", "", f"Commit {commit}; `{result['command']}`; {versions(result)}.", ""]
    if result.get("quick"):
        lines += ["Tiny shapes, to try the script: the times mean nothing.", ""]
    for part, write in WRITERS.items():
        if part in result["parts"]:
            lines += write(result["parts"][part])
    return "\n".join(lines).rstrip() + "\n"


def versions(result: Row) -> str:
    """In one line."""
    return ", ".join(f"{name} {version}" for name, version in result["versions"].items())


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    """With an empty line behind it."""
    return [f"| {' | '.join(head)} |", "|" + "---|" * len(head), *(f"| {' | '.join(row)} |" for row in rows), ""]


def limits(part: Row) -> list[str]:
    """Copy bandwidth and rate of products."""
    if "bytes_per_second" not in part:
        return ["## Limits of the device", "", part.get("failed", {}).get("failed", "not measured"), ""]
    bandwidth, rate = part["bytes_per_second"] / 1e12, part["flops_per_second"] / 1e12
    text = (
        f"Copy {bandwidth:.2f} TB/s (read + written), bfloat16 products of {part['product_side']} {rate:.0f} TFLOP/s."
    )
    return ["## Limits of the device", "", text, ""]


def checks(part: Row) -> list[str]:
    """One line per operator and type, one per check that failed."""
    rows, notes = [], []
    for name, row in part.items():
        if "skipped" in row or "checks" not in row:
            rows.append([name, "skipped" if "skipped" in row else "", "", row.get("skipped", row.get("failed", ""))])
            continue
        done = [check for check in row["checks"] if "error" in check]
        worst = max((check["error"] / check["bar"] for check in done), default=0.0)
        rms = next((check["rms"] for check in done if "rms" in check), {})
        errors = f"y {rms['y']:.1e}, gradients {max(x for n, x in rms.items() if n[0] == 'd'):.1e}" if rms else ""
        verdict = "passed" if row["passed"] else "**failed**"
        said = f"; {row['failed']}" if "failed" in row else ""
        rows.append([name, verdict, f"{len(done)}, worst {worst:.2f} of its bar{said}", errors])
        notes += [
            f"* {name}, {check['case']}: {check['error']:.1e} above {check['bar']:.1e}"
            for check in done
            if not check["error"] <= check["bar"]
        ]
    head = ["operator and type", "", "checks", "relative RMS against float64"]
    return ["## Checks", "", *table(head, rows), *notes, *([""] if notes else [])]


def operators(part: Row) -> list[str]:
    """Times, ratios, roofline."""
    rows, notes = [], []
    for name, row in part.items():
        if "forward" not in row:
            notes.append(f"* {name}: {row.get('skipped', row.get('failed', ''))}")
            continue
        for what in ("forward", "forward_backward"):
            rows.append([name, what.replace("_", " + "), *timed(row[what], ("ours", "fla", "torch"))])
        notes += [f"* {name}: {who} skipped, {reason}" for who, reason in row["skipped"].items()]
        notes += dropped(name, row["forward"], row["forward_backward"])
        if row["backends"]["ours"] != "triton":
            notes.append(
                f"* {name}: ours is the {row['backends']['ours']} backend, the Triton kernel does not run here"
            )
        if "roofline" in row:
            found = row["roofline"]
            best = max(found["seconds_by_bytes"], found["seconds_by_flops"]) * 1e3
            notes.append(
                f"* {name}: at best {best:.3f} ms for forward + backward (bound by {found['bound_by']}), "
                f"of which {found['share']:.0%} is reached"
            )
    head = ["case", "", "ours ms", "fla ms", "torch ms", "fla / ours", "torch / ours"]
    return ["## Operators", "", *table(head, rows), *notes, ""]


def timed(times: Row, names: Sequence[str]) -> list[str]:
    """Milliseconds of all, then ratios to the first."""
    ms = [f"{times['ms'][name]['median']:.3f}" if name in times["ms"] else "" for name in names]
    ratios = times.get("ratios", {})
    return ms + [ratio(ratios[name]) if name in ratios else "" for name in names[1:]]


def ratio(found: Row) -> str:
    """Median and range."""
    return f"{found['median']:.2f} ({found['min']:.2f} to {found['max']:.2f})"


def dropped(name: str, *times: Row) -> list[str]:
    """Who failed."""
    found = {who: reason for row in times for who, reason in row.get("dropped", {}).items()}
    return [f"* {name}: {who} failed, {reason}" for who, reason in found.items()]


def decode(part: Row) -> list[str]:
    """Tokens per second and shares of the bandwidth."""
    rows, notes = [], []
    for name, row in part.items():
        if "tokens_per_second" not in row:
            notes += [
                f"* {name}: {value if key in ('skipped', 'failed') else f'{key}, {value}'}"
                for key, value in row.items()
            ]
            continue
        for way, rate in row["tokens_per_second"].items():
            shares = (row.get(key, {}).get(way) for key in ("share_of_bandwidth", "share_of_bandwidth_with_states"))
            rows.append([name, way, f"{rate:.0f}", *("" if share is None else f"{share:.0%}" for share in shares)])
        notes += [f"* {name}: {who} skipped, {reason}" for who, reason in row["skipped"].items()]
        notes += dropped(name, row)
    head = ["model", "", "tokens/s", "weights, of the bandwidth", "weights and states"]
    return ["## Decoding", "", *table(head, rows), *notes, ""]


CONTENDERS = ("ours", "ours, fused stages", "fla", "torch")  # of whole steps


def training(part: Row) -> list[str]:
    """Tokens per second of whole steps."""
    rows, notes = [], []
    for name, row in part.items():
        if "tokens_per_second" not in row:
            notes.append(f"* {name}: {row.get('skipped', row.get('failed', ''))}")
            continue
        known = row["tokens_per_second"]
        rates = [f"{known[who]:.0f}" if who in known else "" for who in CONTENDERS]
        ratios = [ratio(row["ratios"][who]) if who in row.get("ratios", {}) else "" for who in CONTENDERS[1:]]
        rows.append([f"{name} B{row['batch']} T{row['length']}", *rates, *ratios])
        notes += [f"* {name}: {who} skipped, {reason}" for who, reason in row["skipped"].items()]
        notes += dropped(name, row)
    head = ["model", *(f"{who} tokens/s" for who in CONTENDERS), *(f"{who} / ours time" for who in CONTENDERS[1:])]
    return ["## Training steps", "", *table(head, rows), *notes, ""]


WRITERS = {"limits": limits, "checks": checks, "operators": operators, "decode": decode, "training": training}
