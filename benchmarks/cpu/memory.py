"""Peak memory of `wkv generate` with a 4-bit model of the 0.1B shape (12 layers x 768, 65536 tokens), and its split.

python benchmarks/cpu/memory.py

A model with random weights is quantised and written; its memory is measured too. Then the real command line runs in a
process of its own while this one watches /proc: the peak is the largest VmHWM, its split (RssAnon: memory of the
process; RssFile: mapped libraries and weights) that of the largest sample. A third process does the same step by step
and says what each step adds. Linux only.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from wkv.speed.evidence import evidence

HERE = Path(__file__).resolve().parent
BAR_MB = 350
FIELDS = ("VmHWM", "VmRSS", "RssAnon", "RssFile")
PROMPT = "The state of the Union is"


def memory(process: str | int = "self") -> dict[str, float]:
    """MB (10^6 bytes) of a process, by the names of /proc/PID/status."""
    lines = Path(f"/proc/{process}/status").read_text().splitlines()
    fields = dict(line.split(":", 1) for line in lines if ":" in line)
    return {name: int(fields[name].split()[0]) * 1024 / 1e6 for name in FIELDS if name in fields}


def make(path: Path, seed: int, bits: int) -> None:
    """Write a quantised model with random weights."""
    import torch

    import wkv
    from wkv.quantization.model import quantize_model, set_parameter

    torch.manual_seed(seed)
    with torch.device("meta"):  # the official initial values would take minutes
        model = wkv.create_model("rwkv7", preset="0.1b")
    for name, parameter in list(model.named_parameters()):
        large = parameter.squeeze().ndim == 2
        scale = parameter.shape[-1] ** -0.5 if large else 0.3
        set_parameter(model, name, torch.randn(parameter.shape) * scale)
    wkv.save_model(quantize_model(model.eval(), bits), path)


def stages(path: Path, tokens: int, native: Path | None) -> None:
    """Do what `wkv generate` does, step by step; print one JSON line after each."""

    def tell(name: str) -> None:
        print(json.dumps({"stage": name, **memory()}), flush=True)

    tell("python")
    import torch

    tell("import torch")
    import wkv
    import wkv.cli.generate
    import wkv.inference
    import wkv.native
    from wkv.inference.huge_pages import use_huge_pages
    from wkv.inference.native_rwkv7 import NativeRWKV7
    from wkv.inference.pages import give_back_libraries

    assert wkv.generate
    wkv.native.load(native) if native else wkv.native.available()
    tell("import wkv, its command line and inference")
    model = wkv.load_model(path)
    tell("load the model (weights stay in the file)")
    give_back_libraries()
    tell("code of torch that only its start needed, given back")
    use_huge_pages(model)
    tell("matrices and head to large pages")
    kept = wkv.tokenizers.WorldTokenizer()
    ids = torch.tensor([kept.encode(PROMPT)])
    tell("World tokenizer")
    run = NativeRWKV7(model)
    tell("native copy of low-rank maps and vectors")
    run.read(ids)
    tell("native work space and state: read the prompt")
    del run
    wkv.generate(model, PROMPT, max_tokens=tokens, seed=1)
    tell(f"rest: sampling {tokens} tokens, rows of the embedding")


def watch(command: list[str]) -> dict[str, float]:
    """The peak of a command, and its split."""
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    peak: dict[str, float] = {}
    while process.poll() is None:
        try:
            now = memory(process.pid)
        except (OSError, KeyError):
            break
        if now.get("VmRSS", 0) >= peak.get("VmRSS", 0) and "RssAnon" in now:
            peak = {**now}
        elif "VmHWM" in now:
            peak["VmHWM"] = max(now["VmHWM"], peak["VmHWM"])
        time.sleep(0.002)
    _, errors = process.communicate()
    if process.returncode != 0:
        sys.exit(f"{' '.join(command)} failed:\n{errors}")
    return peak


def itself(*arguments: object, native: Path | None) -> list[str]:
    """This script as a command."""
    extra = ["--native", str(native)] if native else []
    return [sys.executable, str(Path(__file__).resolve()), *map(str, arguments), *extra]


def command_line(path: Path, tokens: int, native: Path | None, giving_back: bool = True) -> list[str]:
    """`wkv generate`; with another native library, the same entry point after loading it.

    Without `giving_back`, torch's start-up code stays resident as it would be if nothing were done about it.
    """
    start = f"import wkv.native; wkv.native.load({str(native)!r}); " if native else ""
    if not giving_back:
        start += "import wkv.inference.pages as pages; pages.give_back_libraries = lambda: None; "
    code = f"{start}from wkv.cli import main; main()"
    return [sys.executable, "-c", code, "generate", str(path), PROMPT, "--max-tokens", str(tokens), "--seed", "1"]


def measure(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """All processes, one after the other."""
    path = options.model or folder / "model-int4.safetensors"
    making = None
    if not path.is_file():
        making = watch(itself("--make", path, "--seed", options.seed, native=options.native))
    forget(path)
    runs = [watch(command_line(path, options.tokens, options.native)) for _ in range(options.repeats)]
    kept = watch(command_line(path, options.tokens, options.native, giving_back=False))
    output = subprocess.run(
        itself("--stages", path, "--tokens", options.tokens, native=options.native),
        capture_output=True, text=True, check=True,
    ).stdout  # fmt: skip
    steps = [json.loads(line) for line in output.splitlines()]
    largest = max(runs, key=lambda run: run["VmHWM"])
    return {
        "what": "peak memory of `wkv generate`, 4-bit RWKV-7 of 12 x 768 with 65536 tokens, in MB (10^6 bytes)",
        "peak": {name: round(value, 1) for name, value in largest.items()},
        "peaks_of_all_runs": [round(run["VmHWM"], 1) for run in runs],
        "peak_without_giving_back_code": round(kept["VmHWM"], 1),
        "bar": BAR_MB,
        "met": largest["VmHWM"] < BAR_MB,
        "steps": [{key: round(v, 1) if key in FIELDS else v for key, v in step.items()} for step in steps],
        "making_the_file": making and {name: round(value, 1) for name, value in making.items()},
        "file_bytes": path.stat().st_size,
        "data_offset_mod_64": data_offset(path) % 64,
        "tokens": options.tokens,
        "seed": options.seed,
    }


def forget(path: Path) -> None:
    """Drop the file from the page cache, as after a restart.

    A file that was just written lies there in pieces of up to 2 MB, and Linux maps a whole piece for every row of the
    embedding that is looked up: some 30 MB more, which say nothing about the program.
    """
    with open(path, "rb") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def data_offset(path: Path) -> int:
    """Where the first tensor of a safetensors file begins."""
    with open(path, "rb") as file:
        return 8 + int.from_bytes(file.read(8), "little")


def show(result: dict[str, Any]) -> None:
    """Print the split."""
    before = 0.0
    for step in result["steps"]:
        rss, anon, mapped = step["VmRSS"], step["RssAnon"], step["RssFile"]
        print(f"{step['stage']:50} {rss:7.1f} MB ({rss - before:+6.1f}): anonymous {anon:6.1f}, files {mapped:6.1f}")
        before = rss
    peak = result["peak"]
    split = f"anonymous {peak['RssAnon']:.1f}, files {peak['RssFile']:.1f}"
    print(f"peak of `wkv generate`: {peak['VmHWM']:.1f} MB ({split}), bar {BAR_MB} MB")
    print(f"if torch's start-up code is kept: {result['peak_without_giving_back_code']:.1f} MB")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, help="a model file; made in a temporary folder by default")
    parser.add_argument("--tokens", type=int, default=50)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--native", type=Path, help="another build of the native library")
    parser.add_argument("--out", type=Path, default=HERE / "results" / "memory.json")
    parser.add_argument("--make", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--stages", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.native and options.make:
        import wkv.native

        wkv.native.load(options.native)
    if options.make:
        make(options.make, options.seed, bits=4)
    elif options.stages:
        stages(options.stages, options.tokens, options.native)
    else:
        with tempfile.TemporaryDirectory() as folder:
            result = {
                **measure(options, Path(folder)),
                **evidence(__file__, sys.argv[1:], ("torch", "numpy", "safetensors")),
            }
        options.out.write_text(json.dumps(result, indent=1) + "\n")
        show(result)


if __name__ == "__main__":
    main()
